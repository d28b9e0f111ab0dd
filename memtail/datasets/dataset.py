"""Prepared datasets, opened: what datasets of all kinds have."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from memtail.errors import DatasetError
from memtail.numpy_files import read_calmly

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Names = npt.NDArray[np.bytes_]
#: Names and values of the features of an example.
Row = tuple[tuple[str, float], ...]


@dataclass(frozen=True, eq=False)
class DatasetLabels:
    """Labels and names of n training and q test examples, in original order, without the examples.

    Attributes:
        folder: of the prepared files.
        fingerprint: SHA-256 (hex) of the content.
        classes: names of the classes; empty if the examples have no labels.
        train_labels: int64 [n], in 0 .. len(classes) - 1; all 0 if there are no labels.
        test_labels: int64 [q].
        train_files: bytes [n], names of the examples, such as paths below their split's folder; None where they have none.
        test_files: bytes [q].
    """

    folder: Path
    fingerprint: str
    classes: tuple[str, ...]
    train_labels: Labels
    test_labels: Labels
    train_files: Names | None
    test_files: Names | None

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open a prepared folder.

        Args:
            folder: the folder.

        Raises:
            DatasetError: a file is missing or corrupt; the message names it.
        """
        return cls(**cls._opened(folder, json.loads(checked(folder / "meta.json", Path.read_text))))

    @classmethod
    def _opened(cls, folder: Path, meta: dict[str, Any]) -> dict[str, Any]:
        return {
            "folder": folder,
            "fingerprint": meta["fingerprint"],
            "classes": tuple(meta["classes"]),
            "train_labels": load_array(folder, "train_labels"),
            "test_labels": load_array(folder, "test_labels"),
            "train_files": load_array(folder, "train_files") if meta["has_files"] else None,
            "test_files": load_array(folder, "test_files") if meta["has_files"] else None,
        }

    @property
    def labelled(self) -> bool:
        """Whether the examples have labels."""
        return bool(self.classes)

    @property
    def n_train(self) -> int:
        """Number of training examples, n."""
        return len(self.train_labels)

    @property
    def n_test(self) -> int:
        """Number of test examples, q; 0 without a test set."""
        return len(self.test_labels)


class Dataset(DatasetLabels):
    """n training and q test examples of one kind.

    Attributes:
        kind: of the examples: `images`, `text` or `features`.
    """

    kind: ClassVar[str]

    def preview(self, split: str, index: int) -> Images | str | Row:
        """Return what a page shows of an example: the pixels uint8 [H, W, C] of an image, a text, or a row of features.

        Args:
            split: `train` or `test`.
            index: of the example.
        """
        raise NotImplementedError


def load_array(folder: Path, name: str) -> Any:
    """Map an array of a prepared dataset into memory. Raises: DatasetError."""
    # copy-on-write: frameworks that insist on writable memory accept it, and nothing is copied unless written
    return checked(folder / f"{name}.npy", lambda path: read_calmly(lambda: np.load(path, mmap_mode="c")))


def checked(path: Path, read: Callable[[Path], Any]) -> Any:
    """Read a file of a prepared dataset. Raises: DatasetError."""
    try:
        return read(path)
    except (OSError, ValueError, EOFError) as error:
        raise DatasetError(f"{path}: prepared dataset is damaged ({error}): remove the folder {path.parent}, then run again") from None
