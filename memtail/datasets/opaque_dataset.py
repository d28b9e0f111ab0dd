"""Dataset of examples whose content is unknown: those of trials that were trained elsewhere."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from memtail.datasets.dataset import Dataset, Labels
from memtail.datasets.prepared import write_arrays


class OpaqueDataset(Dataset):
    """n training and q test examples of which only the index is known, and the label if there is one."""

    kind: ClassVar[str] = "opaque"

    def preview(self, split: str, index: int) -> str:
        """Return a text that names the example."""
        return f"{'training' if split == 'train' else 'test'} example {index}"


def write_opaque(n_train: int, n_test: int, labels: tuple[Labels, Labels] | None, target: Path) -> OpaqueDataset:
    """Write and open such a dataset.

    Args:
        n_train: n.
        n_test: q.
        labels: int64 [n] and [q], from 0; None if there are none.
        target: the folder of all prepared datasets.
    """
    train, test = labels or (np.zeros(n_train, np.int64), np.zeros(n_test, np.int64))
    classes = [] if labels is None else [str(label) for label in range(int(max(train.max(initial=0), test.max(initial=0))) + 1)]
    meta: dict[str, Any] = {"schema": 1, "kind": OpaqueDataset.kind, "classes": classes, "has_files": False}
    arrays: dict[str, npt.NDArray[Any]] = {"train_labels": train, "test_labels": test}
    return OpaqueDataset.open(write_arrays(meta, arrays, target))
