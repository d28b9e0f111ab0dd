"""Networks of a user's own that go wrong or wait, where the environment of a service says so; elsewhere they train as any other.

They take no option by which two runs of an experiment could differ, so that scores can be compared with those of an undisturbed run.
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
    """A small network, after `how` has happened in FAULT_FOLDER: "segfault", "memory", "raise", "hang" or "killed".

    It happens once, or with `always` until there is a file of the name "fixed".
    """
    folder = os.environ.get("FAULT_FOLDER")
    if folder:
        marker = Path(folder) / how
        if (always and not marker.with_name("fixed").exists()) or not (always or marker.exists()):
            marker.touch()
            _go_wrong(how)
    return nn.Sequential(*_layers(image_shape, classes))


def gated(image_shape: tuple[int, int, int], classes: int, trials: int) -> nn.Module:
    """A small network whose training waits in each step until GATE_FOLDER admits the shard, which has so many trials; see `Gate`."""
    network = _Gated(*_layers(image_shape, classes))
    network.trials = trials
    return network


class Gate:
    """Decides when shards of `gated` networks are trained to their end."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._tickets = folder, 0
        folder.mkdir(exist_ok=True)

    def admit(self, shards: int) -> None:
        """Let so many more shards pass."""
        for _ in range(shards):
            self._tickets += 1
            (self._folder / f"ticket-{self._tickets}").touch()

    @property
    def waiting(self) -> int:
        """Number of processes that train and have not been let pass since."""
        return len(list(self._folder.glob("waiting-*")))

    def open(self) -> None:
        """Let all pass, now and later."""
        (self._folder / "open").touch()

    def close(self) -> None:
        """Let none pass from now on."""
        for path in self._folder.iterdir():
            path.unlink(missing_ok=True)


class _Gated(nn.Sequential):  # no plain sequence, so that its trials are trained one by one
    trials = 1
    _passed = False

    def forward(self, images: Tensor) -> Tensor:
        if self.training and not self._passed:
            self._passed = _pass(self.trials)
        logits: Tensor = super().forward(images)
        return logits


def _pass(trials: int) -> bool:
    """Whether this network may go on; after a second without leave it does one step, between which shards can be stopped."""
    global _admitted  # noqa: PLW0603 - one leave is for all trials of a shard, which one process trains
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
    """Take a ticket; of several processes one gets it."""
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
        raise ValueError("this network cannot be made")
    elif how == "hang":
        time.sleep(3600)
