"""Lists the devices of this machine, and sets them up so that equal work gives equal bits."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from memtail.errors import SpecError
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


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Use deterministic kernels within the block; on a CPU also a single thread, so that the order of sums does not depend on the cores.

    Settings of torch are restored at its end.
    """
    threads = torch.get_num_threads()
    mode = torch.get_deterministic_debug_mode()
    benchmark, tf32 = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    fill = _deterministic.fill_uninitialized_memory
    use_deterministic_cublas()
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.set_deterministic_debug_mode("warn")  # `use_deterministic_algorithms` does the same, but imports the compiler: a second
    _deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False  # TF32 has fewer bits than the declared float32
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_deterministic_debug_mode(mode)
        _deterministic.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = benchmark, tf32


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error reports that the device, or the host in torch's allocator, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
