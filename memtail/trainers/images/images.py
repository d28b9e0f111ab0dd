"""Examples on the device: gathers, augments and normalises batches there, for all trials of a stack in one call."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memtail.datasets import FeatureDataset, Trainable
from memtail.trainers.images.batches import Augmentation

# Values per step of the computation of moments, which is in float64.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class _DeviceAugmentation:
    """An `Augmentation` on the device."""

    flip: Tensor
    down: Tensor | None
    right: Tensor | None


class DeviceImages:
    """A dataset's examples and labels, resident on the device as they are stored if they fit, else memory-mapped in host memory.

    Attributes:
        train: images uint8 [n, H, W, C], or features float32 [n, D].
        test: uint8 [q, H, W, C] or float32 [q, D].
        train_labels: int64 [n], on the device.
        test_labels: int64 [q], on the device.
        shift: float32 [C] or [D]; a value is normalised as (value + shift) * scale.
        scale: float32 [C] or [D].
    """

    def __init__(self, dataset: Trainable, device: torch.device) -> None:
        self.device = device
        train, test = torch.from_numpy(dataset.examples("train")), torch.from_numpy(dataset.examples("test"))
        resident = device.type != "cpu" and _fits(train.nbytes + test.nbytes, device)
        self.train = train.to(device) if resident else train
        self.test = test.to(device) if resident else test
        self.train_labels = torch.from_numpy(np.array(dataset.train_labels)).to(device)
        self.test_labels = torch.from_numpy(np.array(dataset.test_labels)).to(device)
        mean, std = _moments(dataset.train_features) if isinstance(dataset, FeatureDataset) else (dataset.mean, dataset.std)
        self.shift = -torch.tensor(mean, dtype=torch.float32, device=device)
        self.scale = 1 / torch.tensor(std, dtype=torch.float32, device=device)
        self._epoch: tuple[Augmentation, _DeviceAugmentation] | None = None

    def gather(self, index: Tensor, augmentation: Augmentation | None, positions: slice) -> Tensor:
        """Return training examples, augmented.

        Args:
            index: int64 [S, B] on the device.
            augmentation: of the whole epoch, or None.
            positions: the batch's positions in the epoch's order.

        Returns:
            uint8 [S, B, H, W, C], or float32 [S, B, D].
        """
        chosen = self.train.index_select(0, index.flatten().to(self.train.device))
        images = chosen.view(*index.shape, *self.train.shape[1:]).to(self.device)
        return images if augmentation is None else _augment(images, self._on_device(augmentation), positions)

    def split(self, name: str, start: int, stop: int) -> Tensor:
        """Return examples `start` to `stop` of the split "train" or "test", normalised: float32 [B, C, H, W] or [B, D]."""
        images = (self.train if name == "train" else self.test)[start:stop]
        return self.normalised(images.to(self.device))

    def _on_device(self, augmentation: Augmentation) -> _DeviceAugmentation:
        """Copy an epoch's augmentation at its first batch: every copy from the host waits for all work queued before it."""
        if self._epoch is None or self._epoch[0] is not augmentation:
            down, right = (
                None if shifts is None else torch.from_numpy(shifts).to(self.device) for shifts in (augmentation.down, augmentation.right)
            )
            self._epoch = augmentation, _DeviceAugmentation(torch.from_numpy(augmentation.flip).to(self.device), down, right)
        return self._epoch[1]

    def normalised(self, images: Tensor) -> Tensor:
        """Normalise uint8 [..., H, W, C] to float32 [..., C, H, W], channels last in memory; features keep their shape."""
        values = images.to(torch.float32, copy=True).add_(self.shift).mul_(self.scale)
        return values if self.train.dim() == 2 else values.movedim(-1, -3)


@lru_cache(maxsize=2)
def device_images(dataset: Trainable, device: torch.device) -> DeviceImages:
    """Return a dataset's examples on a device, kept for the next shard of the same dataset object."""
    return DeviceImages(dataset, device)


def _moments(features: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return mean and standard deviation float64 [D] of features [n, D]; infinite deviations make constant features 0."""
    rows = max(1, _CHUNK // features.shape[1])
    chunks = [features[start : start + rows] for start in range(0, len(features), rows)]
    mean = np.sum([chunk.sum(0, dtype=np.float64) for chunk in chunks], axis=0) / len(features)
    variance = np.sum([((chunk - mean) ** 2).sum(0) for chunk in chunks], axis=0) / len(features)
    std = np.sqrt(variance)
    return mean, np.where((features.min(0) == features.max(0)) | (std < np.finfo(np.float32).tiny), np.inf, std)


def _augment(images: Tensor, augmentation: _DeviceAugmentation, positions: slice) -> Tensor:
    """Mirror and shift uint8 [S, B, H, W, C], each image by its own draws; shifts fill with 0."""
    height, width = images.shape[2:4]
    columns = torch.arange(width, device=images.device)
    column = torch.where(augmentation.flip[:, positions, None], width - 1 - columns, columns)
    if augmentation.down is None or augmentation.right is None:
        return images.take_along_dim(column[:, :, None, :, None], dim=3)
    row = torch.arange(height, device=images.device) - augmentation.down[:, positions, None]
    column = column - augmentation.right[:, positions, None]
    inside = ((row >= 0) & (row < height))[..., :, None] & ((column >= 0) & (column < width))[..., None, :]
    moved = images.take_along_dim(row.clamp(0, height - 1)[:, :, :, None, None], dim=2)
    moved = moved.take_along_dim(column.clamp(0, width - 1)[:, :, None, :, None], dim=3)
    return moved * inside[..., None]


def _fits(size: int, device: torch.device) -> bool:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return size < free // 2
    return True
