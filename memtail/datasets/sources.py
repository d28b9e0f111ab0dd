"""Datasets that are loaded as a whole, among them scikit-learn's digits; words of messages about a dataset's files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from memtail.datasets.dataset import Images, Labels

#: Most items that a message names.
MOST_SHOWN = 5


@dataclass(frozen=True)
class InMemoryDataset:
    """Images uint8 [N, H, W, C] and labels int64 [N] of both splits in original order, and the names of the classes."""

    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels
    classes: tuple[str, ...]

    def limited(self, max_train: int | None, max_test: int | None) -> "InMemoryDataset":
        """Return the first `max_train` and `max_test` examples; all where None."""
        return InMemoryDataset(
            self.train_images[:max_train],
            self.train_labels[:max_train],
            self.test_images[:max_test],
            self.test_labels[:max_test],
            self.classes,
        )


@dataclass(frozen=True)
class InMemoryFeatures:
    """Vectors float32 [N, D] and labels int64 [N] of both splits in original order, and the names of the classes and of the D features."""

    train_features: npt.NDArray[np.float32]
    train_labels: Labels
    test_features: npt.NDArray[np.float32]
    test_labels: Labels
    classes: tuple[str, ...]
    names: tuple[str, ...]

    def limited(self, max_train: int | None, max_test: int | None) -> "InMemoryFeatures":
        """Return the first `max_train` and `max_test` examples; all where None."""
        return InMemoryFeatures(
            self.train_features[:max_train],
            self.train_labels[:max_train],
            self.test_features[:max_test],
            self.test_labels[:max_test],
            self.classes,
            self.names,
        )


def digits() -> InMemoryDataset:
    """Return the 1,797 handwritten 8 x 8 digits of scikit-learn; every fifth is a test image."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int64)
    test = np.arange(len(labels)) % 5 == 4
    return InMemoryDataset(images[~test], labels[~test], images[test], labels[test], tuple(str(digit) for digit in range(10)))


def describe_missing(path: Path, kind: str) -> str:
    """Return the words of an error on a path where there is no `kind`; a link that leads nowhere is named with its target."""
    if path.is_symlink() and not path.exists():
        return f"{path} is a link to {path.readlink()}, which does not exist"
    return f"{path} is no {kind}" if path.exists() else f"there is no {kind} {path}"


def shortened(items: Sequence[str]) -> str:
    """Return the first items in one line, and the number of the others."""
    return "; ".join(items[:MOST_SHOWN]) + (f"; and {len(items) - MOST_SHOWN} more" if len(items) > MOST_SHOWN else "")
