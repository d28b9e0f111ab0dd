"""Prepared dataset of images, opened: memory-mapped in original order, with normalisation constants."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from memtail.datasets.dataset import Dataset, Images, load_array
from memtail.errors import DatasetError


@dataclass(frozen=True, eq=False)
class ImageDataset(Dataset):
    """n training and q test images of one size, in original order.

    Attributes:
        mean: per channel, of the training images in units of pixel values (0 to 255).
        std: as `mean`.
        train_images: uint8 [n, H, W, C], memory-mapped.
        test_images: uint8 [q, H, W, C], memory-mapped.
    """

    kind: ClassVar[str] = "images"

    mean: tuple[float, ...]
    std: tuple[float, ...]
    train_images: Images
    test_images: Images

    @classmethod
    def _opened(cls, folder: Path, meta: dict[str, Any]) -> dict[str, Any]:
        return super()._opened(folder, meta) | {
            "mean": tuple(meta["mean"]),
            "std": tuple(meta["std"]),
            "train_images": load_array(folder, "train_images"),
            "test_images": load_array(folder, "test_images"),
        }

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape (C, H, W) of an image, as models take it."""
        return self.image_shape

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of an image, as models take it."""
        height, width, channels = self.train_images.shape[1:]
        return channels, height, width

    def examples(self, split: str) -> Images:
        """Return the images of `train` or `test`."""
        return self.train_images if split == "train" else self.test_images

    def preview(self, split: str, index: int) -> Images:
        """Return the pixels of an image, uint8 [H, W, C]."""
        return np.asarray(self.examples(split)[index])


def as_images(dataset: Dataset) -> ImageDataset:
    """Return a dataset whose examples must be images.

    Raises:
        DatasetError: they are of another kind.
    """
    if isinstance(dataset, ImageDataset):
        return dataset
    raise DatasetError(f"this needs images, and the dataset holds {dataset.kind}: use an experiment on images")
