"""Jobs whose pods failed and were not replaced, because the Job controller waits.

It waits longer with each failed pod, up to ten minutes, so that a node that rejects twenty pods at once stops a Job for as long. The
dispatcher replaces such workers itself, after pauses that grow with each time and not with each pod.
"""

import time
from collections.abc import Callable, Iterable

from services.dispatcher.worker_sets import WorkerSet

# Pauses in seconds: the first, after which the Job controller has replaced a single pod, and the longest.
_FIRST, _LONGEST = 15.0, 300.0
# Seconds without a replacement after which the pauses of an experiment begin again.
_FORGOTTEN = 2 * _LONGEST


class Stalls:
    """Remembers since when Jobs are stalled, and how often the workers of an experiment were replaced.

    Args:
        clock: seconds of a monotonic clock.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: dict[str, float] = {}
        self._replaced: dict[str, tuple[int, float]] = {}  # number of times in a row, and the last one, by experiment

    def overdue(self, sets: Iterable[WorkerSet]) -> dict[str, int]:
        """Return the numbers of workers to replace now, by the name of their Job."""
        now = self._clock()
        stalled = [each for each in sets if each.stalled]
        self._since = {each.name: self._since.get(each.name, now) for each in stalled}
        self._replaced = {name: (times, last) for name, (times, last) in self._replaced.items() if now - last < _FORGOTTEN}
        times = {each.experiment: self._replaced.get(each.experiment, (0, now))[0] for each in stalled}
        due = [each for each in stalled if now - self._since[each.name] >= min(_LONGEST, _FIRST * 2 ** times[each.experiment])]
        self._replaced |= {each.experiment: (times[each.experiment] + 1, now) for each in due}
        return {each.name: each.stalled for each in due}
