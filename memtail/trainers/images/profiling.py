"""Where the seconds of training go, by phase; measured only if asked for."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

#: What a training process does; the rest of its time goes into building networks, starting up and waiting.
PHASES = ("data", "forward/backward", "optimizer", "evaluation")


class Phases:
    """Seconds by phase, summed up; those of an accelerator include what it has been given to do.

    Args:
        device: where the work is done; None measures nothing, and costs nothing.

    Attributes:
        seconds: by phase, of `PHASES`.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device

    @property
    def on(self) -> bool:
        """Whether anything is measured."""
        return self._device is not None

    def measure(self, phase: str) -> AbstractContextManager[None]:
        """Count the time inside to a phase. Phases do not nest."""
        return nullcontext() if self._device is None else self._measured(phase, self._device)

    @contextmanager
    def _measured(self, phase: str, device: torch.device) -> Iterator[None]:
        _finish(device)
        began = time.perf_counter()
        yield
        _finish(device)
        self.seconds[phase] += time.perf_counter() - began


def _finish(device: torch.device) -> None:
    """An accelerator works through a queue: what was asked of it before must be done, else the next phase pays for it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
