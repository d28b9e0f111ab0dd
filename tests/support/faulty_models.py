"""User-defined networks that fail or wait during training if an environment variable of the service names a folder for that.

In other processes they train normally: their options are equal in both, so scores can be compared with those of an undisturbed run.
"""

import math
import os
import signal
import time
from pathlib import Path

from torch import Tensor, nn

_SECONDS = 1.0
_admitted = 0


def faulty(image_shape: tuple[int, int, int], classes: int, how: str, always: bool = False) -> nn.Module:
    """Inject a fault, then build a small network; `how` is "segfault", "memory", "raise", "hang" or "killed".

    FAULT_FOLDER records the fault, so that it occurs once; with `always` it occurs until the folder holds a file "fixed".
    """
    folder = os.environ.get("FAULT_FOLDER")
    if folder:
        marker = Path(folder) / how
        if (always and not marker.with_name("fixed").exists()) or (not always and _is_first(marker)):
            _go_wrong(how)
    return nn.Sequential(*_layers(image_shape, classes))


def _is_first(marker: Path) -> bool:
    """Make the marker; returns whether this process was the first to do so."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def gated(image_shape: tuple[int, int, int], classes: int, trials: int) -> nn.Module:
    """Build a small network whose training waits until `Gate` admits its shard; `trials` is the number of trials of a shard.

    A process with DEVIATION in its environment computes something else.
    """
    network = _Gated(*_layers(image_shape, classes))
    network.trials = trials
    return network


class Gate:
    """Holds back shards of `gated` networks; a folder that all processes share."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._tickets = folder, 0
        folder.mkdir(exist_ok=True)

    def admit(self, shards: int) -> None:
        """Admit a number of further shards."""
        for _ in range(shards):
            self._tickets += 1
            (self._folder / f"ticket-{self._tickets}").touch()

    @property
    def waiting(self) -> int:
        """Number of processes that wait for admission."""
        return len(list(self._folder.glob("waiting-*")))

    def open(self) -> None:
        """Admit all shards from now on."""
        (self._folder / "open").touch()

    def close(self) -> None:
        """Admit no further shard."""
        for path in self._folder.iterdir():
            path.unlink(missing_ok=True)


class _Gated(nn.Sequential):  # a subclass is not stackable, so that its trials are trained one by one
    trials = 1
    _passed = False

    def forward(self, images: Tensor) -> Tensor:
        if self.training and not self._passed:
            self._passed = _pass(self.trials)
        logits: Tensor = super().forward(images * float(os.environ.get("DEVIATION", "1")))
        return logits


def _pass(trials: int) -> bool:
    """Wait up to a second for admission; return whether it was granted. Without it one step is taken, since only steps check for a stop."""
    global _admitted  # noqa: PLW0603 - one ticket admits all trials of a shard, which one process trains
    folder = os.environ.get("GATE_FOLDER")
    if folder is None:
        return True
    waiting = Path(folder, f"waiting-{os.getpid()}")
    waiting.touch()
    end = time.monotonic() + _SECONDS
    while time.monotonic() < end:
        admitted = bool(_admitted or _claim(Path(folder)))
        if admitted:
            _admitted = (_admitted or trials) - 1
        if admitted or Path(folder, "open").exists():
            waiting.unlink(missing_ok=True)
            return True
        time.sleep(0.02)
    return False


def _claim(folder: Path) -> bool:
    """Take a ticket; of several processes exactly one gets it."""
    for ticket in folder.glob("ticket-*"):
        try:
            ticket.unlink()
        except FileNotFoundError:
            continue
        return True
    return False


def _layers(image_shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    return nn.Flatten(), nn.Linear(math.prod(image_shape), classes)


def _go_wrong(how: str) -> None:
    if how == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "memory":
        raise MemoryError("no memory left")
    elif how == "raise":
        raise ValueError("this network cannot be built")
    elif how == "hang":
        time.sleep(3600)
