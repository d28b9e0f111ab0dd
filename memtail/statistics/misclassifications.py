"""Counts of misclassifications by (example, predicted class), stored sparsely since most examples are rarely misclassified."""

import numpy as np
import numpy.typing as npt

# Low bits of a key are the class, high bits the example.
_CLASS_BITS = 16
# Misclassifications buffered before they are merged, or half of the number of counts if that is more, so that merges are rare.
_BUFFERED = 1 << 16


class Misclassifications:
    """Counts that do not depend on the order of additions.

    Args:
        keys, counts: earlier counts, from `merged`; none by default.
    """

    def __init__(self, keys: npt.NDArray[np.int64] | None = None, counts: npt.NDArray[np.int32] | None = None) -> None:
        self._keys = np.empty(0, np.int64) if keys is None else keys
        self._counts = np.empty(0, np.int32) if counts is None else counts
        self._buffer: list[npt.NDArray[np.int64]] = []
        self._buffered = 0

    def add(self, examples: npt.NDArray[np.int64], predicted: npt.NDArray[np.uint16]) -> None:
        """Add those of one trial.

        Args:
            examples: int64 [w], indices of the misclassified examples.
            predicted: uint16 [w], their predicted classes.
        """
        self._buffer.append(examples << _CLASS_BITS | predicted.astype(np.int64))
        self._buffered += len(examples)
        if self._buffered > max(_BUFFERED, len(self._keys) // 2):
            self._merge()

    def merged(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """Return all counts as arrays: int64 keys, example x 2^16 + predicted class, ascending, and int32 counts."""
        self._merge()
        return self._keys, self._counts

    def most_frequent(self, n: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Find the most frequent predicted class of each of n examples; of equally frequent ones, the smallest.

        Returns:
            int64 [n] classes and int64 [n] their counts; -1 and 0 for an example that was never misclassified.
        """
        self._merge()
        classes, counts = np.full(n, -1, np.int64), np.zeros(n, np.int64)
        if len(self._keys):
            examples = self._keys >> _CLASS_BITS  # ascending
            first = np.flatnonzero(np.append(True, examples[1:] != examples[:-1]))
            largest = np.maximum.reduceat(self._counts, first)
            top = np.flatnonzero(self._counts == np.repeat(largest, np.diff(np.append(first, len(examples)))))
            present, place = np.unique(examples[top], return_index=True)
            classes[present], counts[present] = self._keys[top[place]] & ((1 << _CLASS_BITS) - 1), largest
        return classes, counts

    def _merge(self) -> None:
        if not self._buffered:
            return
        new, counts = np.unique(np.concatenate(self._buffer), return_counts=True)
        self._buffer, self._buffered = [], 0
        keys = np.concatenate([self._keys, new])
        order = np.argsort(keys, kind="stable")  # merges two sorted runs in linear time
        keys = keys[order]
        first = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
        self._keys = keys[first]
        self._counts = np.add.reduceat(np.concatenate([self._counts, counts.astype(np.int32)])[order], first, dtype=np.int32)
