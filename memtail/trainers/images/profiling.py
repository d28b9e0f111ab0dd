"""Seconds of training by phase."""

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

#: The phases in which a device computes.
COMPUTATION = ("forward/backward", "optimizer", "evaluation")
#: The phases of training; the rest of a process's time goes into building networks, starting up and waiting.
PHASES = ("data", *COMPUTATION)


class Phases:
    """Sums of seconds by phase. On CUDA they are measured by the device, which no measurement makes wait.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self._queued: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    def measure(self, phase: str) -> AbstractContextManager[None]:
        """Add the time of a `with` block to a phase of `PHASES`. Phases do not nest."""
        return self._on_cuda(phase) if self._device.type == "cuda" else self._on_host(phase)

    def seconds(self) -> dict[str, float]:
        """Return the seconds by phase; waits for the measured work."""
        while self._queued:
            self._queued[0][2].synchronize()
            self._count_finished()
        return dict(self._seconds)

    @contextmanager
    def _on_host(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if self._device.type == "mps":
            torch.mps.synchronize()  # work in its queue would count towards the next phase
        self._seconds[phase] += time.perf_counter() - began

    @contextmanager
    def _on_cuda(self, phase: str) -> Iterator[None]:
        stream = torch.cuda.current_stream(self._device)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record(stream)
        yield
        stop.record(stream)
        self._queued.append((phase, start, stop))
        self._count_finished()

    def _count_finished(self) -> None:
        while self._queued and self._queued[0][2].query():  # type: ignore[no-untyped-call]
            phase, start, stop = self._queued.popleft()
            self._seconds[phase] += start.elapsed_time(stop) / 1000
