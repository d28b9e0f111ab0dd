"""Jobs of experiments that are missing from the bucket.

An experiment may be missing because someone removed it, but also because a listing lags behind, a restore is in progress, or the prefix of
the bucket is wrong. Its busy workers are therefore deleted late, and a few at a time. Those that are not deleted end by themselves: they
finish their shard, then get no other.
"""

import time
from collections.abc import Callable, Iterable

import structlog

from services.dispatcher.worker_sets import Changes, WorkerSet

log = structlog.get_logger()

#: Seconds for which an experiment must be missing until its Jobs are deleted.
PATIENCE = 600.0
# Share of all workers that may be deleted while they run, and seconds until the next may be.
_SHARE, _PAUSE = 0.1, 60.0


class Absences:
    """Decides which Jobs are deleted because their experiment is missing.

    Running workers are deleted only if this dispatcher has seen their experiment, and still sees another one that it had seen: otherwise
    all may be missing for one cause.

    Args:
        clock: seconds of a monotonic clock.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: dict[str, float] = {}  # when the first pass without each missing experiment began
        self._seen: set[str] = set()
        self._next = float("-inf")
        self._saved = 0  # workers that might have been deleted, but for the size of their Jobs

    def remove(self, sets: Iterable[WorkerSet], listed: set[str], elastic: bool, changes: Changes) -> int:
        """Add the changes to the Jobs of missing experiments.

        Args:
            sets: unfinished Jobs.
            listed: names of the experiments in the bucket.
            elastic: whether the parallelism of a Job may be reduced.
            changes: where the changes are added.

        Returns:
            The number of workers of missing experiments.
        """
        now, sets = self._clock(), list(sets)
        missing = [each for each in sets if each.experiment not in listed]
        for name in {each.experiment for each in missing} - self._since.keys():
            log.warning("experiment missing from the bucket, its workers are kept for now", experiment=name, seconds=PATIENCE)
        self._since = {each.experiment: self._since.get(each.experiment, now) for each in missing}
        others, seen = bool(self._seen & listed), set(self._seen)
        self._seen |= listed
        due = [each for each in missing if now - self._since[each.experiment] >= PATIENCE]
        changes.delete.extend(each.name for each in due if not each.running)
        busy = [each for each in due if each.running and each.experiment in seen]
        if not busy:
            self._saved = 0
        elif others and now >= self._next:
            self._next = now + _PAUSE
            most = self._saved + max(1, int(_SHARE * sum(each.running for each in sets)))
            self._saved = self._remove_busy(busy, most, elastic, changes)
        return sum(each.workers for each in missing)

    def _remove_busy(self, busy: list[WorkerSet], most: int, elastic: bool, changes: Changes) -> int:
        """Remove at most a number of running workers; returns the rest of it, with which a later pass deletes a larger Job."""
        for worker_set in busy:
            if worker_set.running <= most:
                changes.delete.append(worker_set.name)
                most -= worker_set.running
            elif elastic:
                if most and not worker_set.winding_down:  # one that winds down ends by itself
                    changes.shrink[worker_set.name] = worker_set.running - most
                return 0
        return most
