"""Prepared dataset of feature vectors, opened."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from memtail.datasets.dataset import Dataset, Row, load_array


@dataclass(frozen=True, eq=False)
class FeatureDataset(Dataset):
    """n training and q test vectors of D features, in original order.

    Attributes:
        features: names of the features.
        train_features: float32 [n, D], memory-mapped.
        test_features: float32 [q, D].
    """

    kind: ClassVar[str] = "features"

    features: tuple[str, ...]
    train_features: npt.NDArray[np.float32]
    test_features: npt.NDArray[np.float32]

    @classmethod
    def _opened(cls, folder: Path, meta: dict[str, Any]) -> dict[str, Any]:
        return super()._opened(folder, meta) | {
            "features": tuple(meta["features"]),
            "train_features": load_array(folder, "train_features"),
            "test_features": load_array(folder, "test_features"),
        }

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape (D,) of an example, as models take it."""
        return self.train_features.shape[1:]

    def examples(self, split: str) -> npt.NDArray[np.float32]:
        """Return the vectors of `train` or `test`, as they are in the source."""
        return self.train_features if split == "train" else self.test_features

    def preview(self, split: str, index: int) -> Row:
        """Return the names and values of the features of an example."""
        return tuple(zip(self.features, self.examples(split)[index].tolist(), strict=True))
