"""Estimates when an experiment will be complete, from its recent rate of commits."""

from collections import deque

#: Length in seconds of the period over which the rate is measured.
WINDOW = 900.0


class Completion:
    """Extrapolates the rate at which an experiment's trials are committed.

    Create a new object after an interruption (a pause, for one), since the rate would include it.
    """

    def __init__(self) -> None:
        self._history: deque[tuple[float, int]] = deque()  # (time, committed trials)

    def seconds_left(self, now: float, committed: int, missing: int) -> float | None:
        """Estimate the time until all trials are committed.

        Args:
            now: monotonic time in seconds, not before that of the previous call.
            committed: number of committed trials.
            missing: number of trials still to be committed.

        Returns:
            Seconds from `now`; None if no trial was committed in the window, or none is missing.
        """
        self._history.append((now, committed))
        while now - self._history[0][0] > WINDOW:
            self._history.popleft()
        began, before = self._history[0]
        if not missing or committed <= before:
            return None
        return missing * (now - began) / (committed - before)
