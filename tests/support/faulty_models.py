"""Networks of a user's own that go wrong, the first time or always; without FAULT_FOLDER in the environment they never do."""

import os
import signal
import time
from pathlib import Path

from torch import nn


def faulty(image_shape: tuple[int, int, int], classes: int, how: str, always: bool = False) -> nn.Module:
    """A small network, after `how` has happened: "segfault", "memory", "raise", "hang" or "killed"."""
    folder = os.environ.get("FAULT_FOLDER")
    if folder:
        marker = Path(folder) / how
        if always or not marker.exists():
            marker.touch()
            _go_wrong(how)
    channels, height, width = image_shape
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, classes))


def _go_wrong(how: str) -> None:
    if how == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "memory":
        raise MemoryError("no memory left")
    elif how == "raise":
        raise ValueError("this network cannot be made")
    elif how == "hang":
        time.sleep(3600)
