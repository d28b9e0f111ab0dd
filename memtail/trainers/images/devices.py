"""Devices of this machine: lists them, sets them up so that equal work gives equal bits, and tells their faults from those of a shard."""

import errno
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from memtail.errors import MemtailError, SpecError, TrainingStopped, WorkerFaultError
from memtail.processes import cores
from memtail.settings import use_deterministic_cublas

_deterministic: Any = torch.utils.deterministic  # its attributes are made at run time, where mypy does not see them


def available_devices(requested: str) -> list[torch.device]:
    """Return the devices to train on, one entry per shard trained at a time.

    Args:
        requested: "auto" (all CUDA devices, else MPS, else the CPU), "cpu" (one entry per core), "mps", "cuda" (all) or "cuda:N".

    Raises:
        SpecError: this machine has no such device.
    """
    cuda = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    mps = [torch.device("mps")] if torch.backends.mps.is_available() else []
    cpu = [torch.device("cpu")] * cores()
    if requested == "auto":
        return cuda or mps or cpu
    available = {"cpu": cpu, "mps": mps, "cuda": cuda} | {str(device): [device] for device in cuda}
    if not available.get(requested):
        names = ", ".join(name for name, devices in available.items() if devices)
        raise SpecError(f"execution.device: there is no '{requested}' here: use {names}")
    return available[requested]


def device_name(device: torch.device) -> str:
    """Return the name of a device, for provenance."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"


@cache
def cpu_name() -> str:
    """Return the kind of this machine's processor: its model, and the instructions that torch uses on it, on which bits depend."""
    model = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):  # Linux, where `platform` does not know the model
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"


def device_kind(device: torch.device) -> str:
    """Return the kind of a device, as `Provenance.kind` has it."""
    return f"{device_name(device)}, {cpu_name()}"


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process in bytes: of the device on CUDA, of the host elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration):  # Linux; its getrusage also counts the parent's memory at the start of the process
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Use deterministic kernels within the block, in full precision; on a CPU also a single thread, on which the order of sums depends.

    A CUDA device is the current one, where graphs are captured and compiled kernels run. Settings of torch are restored at its end.
    """
    threads = torch.get_num_threads()
    mode = torch.get_deterministic_debug_mode()
    benchmark = torch.backends.cudnn.benchmark
    fill = _deterministic.fill_uninitialized_memory
    use_deterministic_cublas()
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.set_deterministic_debug_mode("warn")  # `use_deterministic_algorithms` does the same, but imports the compiler: a second
    _deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    try:
        with float32_products(tf32=False), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_deterministic_debug_mode(mode)
        _deterministic.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark = benchmark


@contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Compute products and convolutions of float32 tensors on CUDA in TF32, or in float32, whatever the process has set.

    Settings of torch are restored at the end of the block.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    switches: list[tuple[Any, str, Any]] = [(matmul, "allow_tf32", tf32), (cudnn, "allow_tf32", tf32)]
    if hasattr(cudnn, "conv"):  # torch 2.9 has a second set, which must agree with the first
        switches += [(holder, "fp32_precision", "tf32" if tf32 else "ieee") for holder in (matmul, cudnn.conv, cudnn.rnn)]
    before = []
    for holder, name, _ in switches:
        with suppress(RuntimeError):  # the process has set the two sets to contradict each other
            before.append((holder, name, getattr(holder, name)))
    for holder, name, value in switches:
        setattr(holder, name, value)
    try:
        yield
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error reports that the device, or the host in torch's allocator, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and bool(_FULL.search(str(error))))


# Side of the square matrices that a check multiplies.
_CHECK_SIZE = 64
# Longest seconds of a check in a new process, which imports torch and opens the device.
_CHECK_SECONDS = 120.0
# Bytes that a disk must take which is not at fault.
_TRIED_BYTES = 1 << 20
# Errors of the operating system that are the machine's: no space, quota, read-only or broken disk, lost device, no file handles.
_MACHINE_ERRORS = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EROFS", "EIO", "ENODEV", "ENXIO", "EMFILE", "ENFILE", "ESTALE")
    if hasattr(errno, name)
}
# cuDNN finds no engine where none has the workspace that it needs.
_FULL = re.compile(r"out of memory|can't allocate memory|CU(BLAS|DNN)_STATUS_ALLOC_FAILED|unable to find an engine")
_DEVICE_ERROR = re.compile(r"CUDA error|CUDA driver|CUDNN_STATUS|CUBLAS_STATUS|CUSOLVER_STATUS|NVIDIA driver|No CUDA GPUs|HIP error|NVML")


def check_device(device: torch.device) -> None:
    """Multiply two small matrices on a device.

    Raises:
        WorkerFaultError: the device cannot be used, or its product is wrong.
    """
    try:
        ones = torch.ones(_CHECK_SIZE, _CHECK_SIZE, device=device)
        total = float((ones @ ones).sum())
    except Exception as error:  # torch raises many kinds; a driver may raise its own
        raise WorkerFaultError(f"device {device} cannot be used: {_first_line(error)}") from error
    if total != _CHECK_SIZE**3:
        raise WorkerFaultError(f"device {device} computes wrongly: a sum of {_CHECK_SIZE**3} came out as {total}")


def check_in_new_process(device: torch.device) -> None:
    """Check a device from a process of its own, since an error of CUDA leaves the process that caused it unusable.

    Raises:
        WorkerFaultError: the device cannot be used.
    """
    code = f"import torch; from memtail.trainers.images.devices import check_device; check_device(torch.device({str(device)!r}))"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=_CHECK_SECONDS)
    except subprocess.TimeoutExpired:
        raise WorkerFaultError(f"device {device} does not respond within {_CHECK_SECONDS:.0f} s") from None
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        told = reason.partition(f"{WorkerFaultError.__name__}: ")[2]
        raise WorkerFaultError(told or f"device {device} cannot be used: {reason}")


def check_unopened(device: torch.device) -> None:
    """Check a device without opening it in this process, if it is an accelerator; so one that hangs does not hang this process.

    Raises:
        WorkerFaultError: the device cannot be used.
    """
    (check_device if device.type == "cpu" else check_in_new_process)(device)


def fault_of_machine(device: str) -> WorkerFaultError | None:
    """Return a fault of a device or of the disk of temporary files, None if there is none; whoever has met an error is not asked."""
    try:
        check_unopened(torch.device(device))
        with tempfile.TemporaryFile() as file:
            file.write(bytes(_TRIED_BYTES))
    except WorkerFaultError as error:
        return error
    except OSError as error:
        return WorkerFaultError(f"this machine cannot train: {error}")
    return None


def is_device_error(error: BaseException | None) -> bool:
    """Return whether an error comes from a device's driver; the process can then not use the device any more."""
    if error is None or is_out_of_memory(error):
        return False
    accelerator = any(kind.__name__ == "AcceleratorError" for kind in type(error).__mro__)  # torch has it since 2.8
    return accelerator or (isinstance(error, RuntimeError) and bool(_DEVICE_ERROR.search(str(error)))) or is_device_error(error.__cause__)


@contextmanager
def attributed(device: torch.device) -> Iterator[None]:
    """Attribute an error of the block to this machine or to the shard: errors of the shard pass through.

    After any error the device is checked; after one of the device's driver from a new process. A model that makes a kernel fail on a
    healthy device is thus the shard's fault.

    Raises:
        WorkerFaultError: the machine is at fault.
    """
    try:
        yield
    except (MemtailError, TrainingStopped):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _MACHINE_ERRORS:
            raise WorkerFaultError(f"this machine cannot train: {_first_line(error)}") from error
        if is_device_error(error):
            check_in_new_process(device)
        else:
            check_device(device)
        raise


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
