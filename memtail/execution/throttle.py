"""Limit of the time that repeated work may take."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Throttle:
    """Pauses repeated work for a multiple of its own duration, so that it takes a bounded share of the time.

    Args:
        rest: pause after each run of the work, as a multiple of its duration. 9: the work takes a tenth of the time at most.
        at_least: the shortest pause, in seconds.
        first: seconds before the first run.
        clock: seconds of a monotonic clock.
    """

    def __init__(self, rest: float, at_least: float = 0.0, first: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._rest, self._at_least, self._clock = rest, at_least, clock
        self._next = clock() + first if first else float("-inf")

    @property
    def due(self) -> bool:
        """Whether the pause is over."""
        return self._clock() >= self._next

    @contextmanager
    def working(self) -> Iterator[None]:
        """Measure one run of the work; the pause begins at its end, also if it raises."""
        began = self._clock()
        try:
            yield
        finally:
            ended = self._clock()
            self._next = ended + max(self._at_least, self._rest * (ended - began))
