"""Seconds of training by phase, measured on request."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

#: The phases of training; the rest of a process's time goes into building networks, starting up and waiting.
PHASES = ("data", "forward/backward", "optimizer", "evaluation")


class Phases:
    """Sums of seconds by phase. Those of an accelerator include the work in its queue.

    Args:
        device: where the work is done; None measures nothing, at no cost.

    Attributes:
        seconds: by phase of `PHASES`.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device

    @property
    def on(self) -> bool:
        """Whether phases are measured."""
        return self._device is not None

    def measure(self, phase: str) -> AbstractContextManager[None]:
        """Add the time of a `with` block to a phase. Phases do not nest."""
        return nullcontext() if self._device is None else self._measured(phase, self._device)

    @contextmanager
    def _measured(self, phase: str, device: torch.device) -> Iterator[None]:
        _finish(device)
        began = time.perf_counter()
        yield
        _finish(device)
        self.seconds[phase] += time.perf_counter() - began


def _finish(device: torch.device) -> None:
    """Wait for the work in an accelerator's queue, which would otherwise count towards the next phase."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
