"""What models that did not see an example take it for: counts of (example, class), kept sparse since most examples are rarely mistaken."""

import numpy as np
import numpy.typing as npt

# Bits of a key that are the class; the rest are the example.
_CLASS_BITS = 16
# Mistakes that wait before they are counted, or half as many as there are counts if that is more: so all is gone through rarely.
_WAITING = 1 << 16


class Mistakes:
    """Counts of mistakes, the same in whatever order they are added."""

    def __init__(self) -> None:
        self._keys = np.empty(0, np.int64)
        self._counts = np.empty(0, np.int32)
        self._new: list[npt.NDArray[np.int64]] = []
        self._waiting = 0

    def add(self, examples: npt.NDArray[np.int64], classes: npt.NDArray[np.uint16]) -> None:
        """One trial's: the examples that it got wrong, and the classes that it gave them."""
        self._new.append(examples << _CLASS_BITS | classes.astype(np.int64))
        self._waiting += len(examples)
        if self._waiting > max(_WAITING, len(self._keys) // 2):
            self._count()

    def most_frequent(self, n: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """For each of n examples the class that it was most often taken for (the first such), and how often; -1 and 0 if it never was."""
        self._count()
        most, times = np.full(n, -1, np.int64), np.zeros(n, np.int64)
        if len(self._keys):
            examples = self._keys >> _CLASS_BITS  # ascending
            first = np.flatnonzero(np.append(True, examples[1:] != examples[:-1]))
            greatest = np.maximum.reduceat(self._counts, first)
            top = np.flatnonzero(self._counts == np.repeat(greatest, np.diff(np.append(first, len(examples)))))
            found, place = np.unique(examples[top], return_index=True)
            most[found], times[found] = self._keys[top[place]] & ((1 << _CLASS_BITS) - 1), greatest
        return most, times

    def _count(self) -> None:
        if not self._waiting:
            return
        new, times = np.unique(np.concatenate(self._new), return_counts=True)
        self._new, self._waiting = [], 0
        keys = np.concatenate([self._keys, new])
        order = np.argsort(keys, kind="stable")  # which merges two runs
        keys = keys[order]
        first = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
        self._keys = keys[first]
        self._counts = np.add.reduceat(np.concatenate([self._counts, times.astype(np.int32)])[order], first)
