"""GPUs that a worker may use, known without torch: those that `CUDA_VISIBLE_DEVICES` names, or all of the machine."""

import os
from itertools import takewhile

VARIABLE = "CUDA_VISIBLE_DEVICES"


def worker_devices(setting: str) -> list[str]:
    """Return the device of each training process.

    Args:
        setting: devices separated by commas, or `auto`: every visible GPU, or what torch chooses where there is none.
    """
    if setting != "auto":
        return setting.split(",")
    found = _count()
    named = _named()
    if named is not None:  # CUDA ignores what follows an entry that names no GPU
        found = len(list(takewhile(lambda entry: not entry.isdecimal() or int(entry) < found, named))) if found else 0
    return [f"cuda:{index}" for index in range(found)] or ["auto"]


def show_only(index: int) -> None:
    """Hide all visible GPUs but one from CUDA in this process; call it before CUDA starts.

    Args:
        index: of a visible GPU; if there is none of this index, all are hidden.
    """
    named = _named()
    os.environ[VARIABLE] = str(index) if named is None else "".join(named[index : index + 1])


def _named() -> list[str] | None:
    """Return the GPUs that are named to CUDA, by index or UUID; None if all are visible."""
    text = os.environ.get(VARIABLE)
    if text is None:
        return None
    return list(takewhile(lambda entry: entry and entry != "-1", (entry.strip() for entry in text.split(","))))


def _count() -> int:
    """Return the number of GPUs of this machine."""
    try:
        import pynvml
    except ModuleNotFoundError:
        return 0
    try:
        pynvml.nvmlInit()
        try:
            return int(pynvml.nvmlDeviceGetCount())
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return 0
