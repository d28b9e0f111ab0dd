"""Prepared dataset of texts, opened."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, overload

import numpy as np
import numpy.typing as npt

from memtail.datasets.dataset import Dataset, load_array


class Texts(Sequence[str]):
    """Texts in one array of their UTF-8 bytes, read when they are asked for.

    Args:
        data: uint8, the bytes of all texts, one after the other.
        ends: int64 [N], the end of each text.
    """

    def __init__(self, data: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> None:
        self._data, self._ends = data, ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice | Sequence[int] | npt.NDArray[np.int64]) -> list[str]: ...
    def __getitem__(self, index: int | slice | Sequence[int] | npt.NDArray[np.int64]) -> str | list[str]:
        """Return a text; or a list of texts by a slice, by indices, or by an array of indices such as a subset."""
        if isinstance(index, int | np.integer):
            place = range(len(self))[int(index)]
            start = int(self._ends[place - 1]) if place else 0
            return self._data[start : int(self._ends[place])].tobytes().decode()
        chosen = range(len(self))[index] if isinstance(index, slice) else np.asarray(index, dtype=np.int64).tolist()
        return [self[place] for place in chosen]

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


def encoded(texts: Iterable[str]) -> dict[str, npt.NDArray[Any]]:
    """Return texts as the arrays of `Texts`, by the names that they have in a prepared dataset."""
    each = [text.encode() for text in texts]
    return {"bytes": np.frombuffer(b"".join(each), np.uint8), "ends": np.cumsum([len(text) for text in each], dtype=np.int64)}


@dataclass(frozen=True, eq=False)
class TextDataset(Dataset):
    """n training and q test texts, in original order.

    Attributes:
        train_bytes: uint8, memory-mapped: the UTF-8 bytes of all training texts.
        train_ends: int64 [n], the end of each in `train_bytes`.
        test_bytes: as `train_bytes`.
        test_ends: int64 [q].
    """

    kind: ClassVar[str] = "text"

    train_bytes: npt.NDArray[np.uint8]
    train_ends: npt.NDArray[np.int64]
    test_bytes: npt.NDArray[np.uint8]
    test_ends: npt.NDArray[np.int64]

    @classmethod
    def _opened(cls, folder: Path, meta: dict[str, Any]) -> dict[str, Any]:
        names = ("train_bytes", "train_ends", "test_bytes", "test_ends")
        return super()._opened(folder, meta) | {name: load_array(folder, name) for name in names}

    @property
    def train_texts(self) -> Texts:
        """The training texts."""
        return Texts(self.train_bytes, self.train_ends)

    @property
    def test_texts(self) -> Texts:
        """The test texts."""
        return Texts(self.test_bytes, self.test_ends)

    def preview(self, split: str, index: int) -> str:
        """Return a text."""
        return (self.train_texts if split == "train" else self.test_texts)[index]
