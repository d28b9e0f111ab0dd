"""Datasets that are loaded as a whole: scikit-learn's digits, and the user's arrays."""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memtail.datasets.dataset import Images, Labels
from memtail.errors import DatasetError


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


def digits() -> InMemoryDataset:
    """Return the 1,797 handwritten 8 x 8 digits of scikit-learn; every fifth is a test image."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int64)
    test = np.arange(len(labels)) % 5 == 4
    return InMemoryDataset(images[~test], labels[~test], images[test], labels[test], tuple(str(digit) for digit in range(10)))


def arrays_file(root: Path) -> Path:
    """Return the .npz file of an `arrays` dataset.

    Args:
        root: its path.

    Raises:
        DatasetError: there is no such file.
    """
    if not root.is_file():
        raise DatasetError(f"dataset 'arrays': there is no file {root}: give dataset.root the path of an .npz file")
    return root


def load_arrays(path: Path) -> InMemoryDataset:
    """Read `train_images`, `train_labels`, `test_images`, `test_labels` from an .npz file.

    Args:
        path: of the file. Images are uint8 [N, H, W] or [N, H, W, C], labels integers [N].

    Raises:
        DatasetError: the file is corrupt, or an array is missing, has another type or shape, or has labels out of range.
    """
    needed = ("train_images", "train_labels", "test_images", "test_labels")
    try:
        with path.open("rb") as file:  # numpy does not close a file that it cannot read
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DatasetError(f"{path}: is not an .npz file: write it with numpy.savez")
            if missing := [name for name in needed if name not in archive]:
                raise DatasetError(f"{path}: holds no {', '.join(missing)}; there: {', '.join(archive.files) or 'nothing'}")
            arrays = {name: archive[name] for name in needed}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DatasetError(f"{path}: is truncated or corrupt, or no .npz file ({error}): write it again with numpy.savez") from None
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.size == 0:
            raise DatasetError(f"{path}: {split}_images is {images.dtype} {list(images.shape)}, needed is uint8 [N, H, W] or [N, H, W, C]")
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
            raise DatasetError(f"{path}: {split}_labels is {labels.dtype} {list(labels.shape)}, needed are {len(images)} integers")
        arrays[f"{split}_images"] = images if images.ndim == 4 else images[..., None]
    if arrays["train_images"].shape[1:] != arrays["test_images"].shape[1:]:
        raise DatasetError(
            f"{path}: training images are {list(arrays['train_images'].shape[1:])}, test images {list(arrays['test_images'].shape[1:])}: "
            f"all must be of one size"
        )
    classes = int(arrays["train_labels"].max(initial=-1)) + 1
    if classes > len(arrays["train_labels"]):
        index = int(arrays["train_labels"].argmax())
        raise DatasetError(f"{path}: train_labels out of range: {classes - 1} at index {index} makes more classes than there are examples")
    return InMemoryDataset(
        arrays["train_images"],
        arrays["train_labels"].astype(np.int64),
        arrays["test_images"],
        arrays["test_labels"].astype(np.int64),
        tuple(str(label) for label in range(classes)),
    )
