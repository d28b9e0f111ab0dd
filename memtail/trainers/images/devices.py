"""Devices: which there are, and how they are set so that equal work gives equal bits."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from memtail.errors import SpecError
from memtail.processes import cores

_deterministic: Any = torch.utils.deterministic  # its attributes are made at run time, out of mypy's sight


def available_devices(wanted: str) -> list[torch.device]:
    """The devices to run on: one entry per shard that is to be trained at a time.

    Args:
        wanted: "auto" (all CUDA devices, else MPS, else the CPU), "cpu" (one entry per core), "mps", "cuda" (all) or "cuda:N".

    Raises:
        SpecError: the device is not there.
    """
    cuda = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    mps = [torch.device("mps")] if torch.backends.mps.is_available() else []
    cpu = [torch.device("cpu")] * cores()
    if wanted == "auto":
        return cuda or mps or cpu
    there = {"cpu": cpu, "mps": mps, "cuda": cuda} | {str(device): [device] for device in cuda}
    if not there.get(wanted):
        names = ", ".join(name for name, devices in there.items() if devices)
        raise SpecError(f"execution.device: there is no '{wanted}' here; there: {names}")
    return there[wanted]


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Deterministic kernels throughout; on a CPU one thread, so that sums are taken in one order however many cores there are."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, tf32 = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    fill = _deterministic.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    _deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        _deterministic.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = benchmark, tf32


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device (or the host, as torch's allocator sees it) has no memory left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
