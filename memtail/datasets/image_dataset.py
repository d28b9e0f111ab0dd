"""Prepared dataset, opened: memory-mapped images in original order, labels, names and normalisation constants."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from memtail.errors import DatasetError

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Names = npt.NDArray[np.bytes_]


@dataclass(frozen=True, eq=False)
class DatasetLabels:
    """Labels and names of n training and q test images, in original order, without the images.

    Attributes:
        folder: of the prepared files.
        fingerprint: SHA-256 (hex) of the content.
        classes: names of the classes.
        train_labels: int64 [n], in 0 .. len(classes) - 1.
        test_labels: int64 [q].
        train_files: bytes [n], paths of the images below their split's folder; None where images have no files.
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
        return cls(**cls._opened(folder, json.loads(_checked(folder / "meta.json", Path.read_text))))

    @classmethod
    def _opened(cls, folder: Path, meta: dict[str, Any]) -> dict[str, Any]:
        return {
            "folder": folder,
            "fingerprint": meta["fingerprint"],
            "classes": tuple(meta["classes"]),
            "train_labels": _array(folder, "train_labels"),
            "test_labels": _array(folder, "test_labels"),
            "train_files": _array(folder, "train_files") if meta["has_files"] else None,
            "test_files": _array(folder, "test_files") if meta["has_files"] else None,
        }

    @property
    def n_train(self) -> int:
        """Number of training examples, n."""
        return len(self.train_labels)

    @property
    def n_test(self) -> int:
        """Number of test examples, q."""
        return len(self.test_labels)


@dataclass(frozen=True, eq=False)
class ImageDataset(DatasetLabels):
    """n training and q test images of one size, in original order.

    Attributes:
        mean: per channel, of the training images in units of pixel values (0 to 255).
        std: as `mean`.
        train_images: uint8 [n, H, W, C], memory-mapped.
        test_images: uint8 [q, H, W, C], memory-mapped.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    train_images: Images
    test_images: Images

    @classmethod
    def _opened(cls, folder: Path, meta: dict[str, Any]) -> dict[str, Any]:
        return super()._opened(folder, meta) | {
            "mean": tuple(meta["mean"]),
            "std": tuple(meta["std"]),
            "train_images": _array(folder, "train_images"),
            "test_images": _array(folder, "test_images"),
        }

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of an image, as models take it."""
        height, width, channels = self.train_images.shape[1:]
        return channels, height, width


def _array(folder: Path, name: str) -> Any:
    # copy-on-write: frameworks that insist on writable memory accept it, and nothing is copied unless written
    return _checked(folder / f"{name}.npy", lambda path: np.load(path, mmap_mode="c"))


def _checked(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except (OSError, ValueError, EOFError) as error:
        raise DatasetError(f"{path}: prepared dataset is damaged ({error}): remove the folder {path.parent}, then run again") from None
