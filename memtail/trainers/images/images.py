"""Images on the device: batches are gathered, augmented and normalised there, for all trials of a stack in one call."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from memtail.datasets import ImageDataset
from memtail.trainers.images.batches import Augmentation


@dataclass(frozen=True)
class _Moves:
    """An `Augmentation` on the device."""

    flip: Tensor
    down: Tensor | None
    right: Tensor | None


class DeviceImages:
    """A dataset's images and labels, resident on the device as uint8 if they fit, else in host memory (memory-mapped).

    Attributes:
        train_labels, test_labels: int64 [n] and [q] on the device.
        shift, scale: float32 [C]; a pixel is normalised as (pixel + shift) * scale.
    """

    def __init__(self, dataset: ImageDataset, device: torch.device) -> None:
        self.device = device
        train, test = torch.from_numpy(dataset.train_images), torch.from_numpy(dataset.test_images)
        resident = device.type != "cpu" and _fits(train.numel() + test.numel(), device)
        self.train = train.to(device) if resident else train
        self.test = test.to(device) if resident else test
        self.train_labels = torch.from_numpy(np.array(dataset.train_labels)).to(device)
        self.test_labels = torch.from_numpy(np.array(dataset.test_labels)).to(device)
        self.shift = -torch.tensor(dataset.mean, dtype=torch.float32, device=device)
        self.scale = 1 / torch.tensor(dataset.std, dtype=torch.float32, device=device)
        self._moved: tuple[Augmentation, _Moves] | None = None

    def gather(self, index: Tensor, augmentation: Augmentation | None, positions: slice) -> Tensor:
        """Training images, augmented.

        Args:
            index: int64 [S, B] on the device.
            augmentation: of the whole epoch, or None.
            positions: the batch's place in the epoch's order.

        Returns:
            uint8 [S, B, H, W, C].
        """
        chosen = self.train.index_select(0, index.flatten().to(self.train.device))
        images = chosen.view(*index.shape, *self.train.shape[1:]).to(self.device)
        return images if augmentation is None else _augment(images, self._moves(augmentation), positions)

    def split(self, name: str, start: int, stop: int) -> Tensor:
        """Images `start` to `stop` of a split, normalised: float32 [B, C, H, W]."""
        images = (self.train if name == "train" else self.test)[start:stop]
        return self.normalised(images.to(self.device))

    def _moves(self, augmentation: Augmentation) -> _Moves:
        """An epoch's augmentation on the device, taken there at its first batch: each copy from the host waits for all work before it."""
        if self._moved is None or self._moved[0] is not augmentation:
            arrays = (augmentation.flip, augmentation.down, augmentation.right)
            flip, down, right = (None if array is None else torch.from_numpy(array).to(self.device) for array in arrays)
            assert flip is not None
            self._moved = augmentation, _Moves(flip, down, right)
        return self._moved[1]

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 [..., H, W, C] -> float32 [..., C, H, W], channels last in memory."""
        return images.to(torch.float32).add_(self.shift).mul_(self.scale).movedim(-1, -3)


@lru_cache(maxsize=2)
def device_images(dataset: ImageDataset, device: torch.device) -> DeviceImages:
    """The images of a dataset on a device, kept for the next shard that is trained on the same (identical) dataset."""
    return DeviceImages(dataset, device)


def _augment(images: Tensor, moves: _Moves, positions: slice) -> Tensor:
    """Shift (filling with 0) and mirror uint8 [S, B, H, W, C], each image by its own draws."""
    height, width = images.shape[2:4]
    columns = torch.arange(width, device=images.device)
    column = torch.where(moves.flip[:, positions, None], width - 1 - columns, columns)
    if moves.down is None or moves.right is None:
        return images.take_along_dim(column[:, :, None, :, None], dim=3)
    row = torch.arange(height, device=images.device) - moves.down[:, positions, None]
    column = column - moves.right[:, positions, None]
    inside = ((row >= 0) & (row < height))[..., :, None] & ((column >= 0) & (column < width))[..., None, :]
    moved = images.take_along_dim(row.clamp(0, height - 1)[:, :, :, None, None], dim=2)
    moved = moved.take_along_dim(column.clamp(0, width - 1)[:, :, None, :, None], dim=3)
    return moved * inside[..., None]


def _fits(size: int, device: torch.device) -> bool:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return size < free // 2
    return True
