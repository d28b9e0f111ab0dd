"""Workers that were lost while they trained a shard, by what this dispatcher saw.

Redis is not trusted with their numbers. A lease that expired tells of a lost worker only if the dispatcher had watched it for half of its
duration, and if its holder does not come back. A new dispatcher counts from zero.
"""

from collections import Counter
from collections.abc import Callable, Mapping


class LostWorkers:
    """Lost workers by assignment.

    Args:
        seconds: time for which a lease must have been seen to count when it expires.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._seen: dict[tuple[str, str], float] = {}  # when the lease of each assignment and holder was first seen
        self._lost: dict[str, set[str]] = {}  # lost holders by the id of the assignment

    def update(self, leased: Mapping[str, str], expired: Mapping[str, str], now: float) -> None:
        """Update with the leases at a time.

        Args:
            leased: holders of the leases that have not expired, by the id of the assignment. One that is back was not lost.
            expired: holders of those that have expired since the last update.
            now: the time, in seconds.
        """
        for id_, holder in expired.items():
            if now - self._seen.get((id_, holder), now) >= self._seconds:
                self._lost.setdefault(id_, set()).add(holder)
        self._seen = {lease: self._seen.get(lease, now) for lease in leased.items()}
        for id_ in self._lost.keys() & leased:
            self._lost[id_].discard(leased[id_])

    def keep_only(self, remains: Callable[[str], bool]) -> None:
        """Forget the lost workers of assignments that no longer remain."""
        self._lost = {id_: lost for id_, lost in self._lost.items() if lost and remains(id_)}

    def forget(self, id_: str) -> None:
        """Forget the lost workers of an assignment, after they were recorded as a failure."""
        self._lost.pop(id_, None)

    @property
    def watched(self) -> Mapping[tuple[str, str], float]:
        """Times at which the leases of the last update, as (id of the assignment, holder), were first seen."""
        return self._seen

    @property
    def counts(self) -> Counter[str]:
        """Numbers of lost workers by the id of the assignment."""
        return Counter({id_: len(lost) for id_, lost in self._lost.items()})
