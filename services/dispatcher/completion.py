"""When an experiment will be complete, as the last minutes went."""

from collections import deque

#: Seconds of the past by which the future is judged.
WINDOW = 900.0


class Completion:
    """The rate at which trials are committed, and what follows from it.

    Where trials are not trained for a while on purpose, make a new one: what was before says nothing then.
    """

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()  # when how many were committed

    def after(self, now: float, committed: int, left: int) -> float | None:
        """How long it will be until all trials are committed.

        Args:
            now: seconds since any fixed moment, not before that of the call before.
            committed: trials that are committed now.
            left: trials that are still to be committed.

        Returns: seconds from now on; None while none was committed in the time looked at, and when none is left.
        """
        self._seen.append((now, committed))
        while now - self._seen[0][0] > WINDOW:
            self._seen.popleft()
        began, before = self._seen[0]
        if not left or committed <= before:
            return None
        return left * (now - began) / (committed - before)
