"""Images on the device: gathers, augments and normalises batches there, for all trials of a stack in one call."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from memtail.datasets import ImageDataset
from memtail.trainers.images.augmentations import Augmentation, augment


class DeviceImages:
    """A dataset's images and labels, resident on the device as uint8 if they fit, else memory-mapped in host memory.

    Attributes:
        train: uint8 [n, H, W, C].
        test: uint8 [q, H, W, C].
        train_labels: int64 [n], on the device.
        test_labels: int64 [q], on the device.
        shift: float32 [C]; a pixel is normalised as (pixel + shift) * scale.
        scale: float32 [C].
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
        self._epoch: tuple[Augmentation, list[dict[str, Tensor]]] | None = None

    def gather(self, index: Tensor, augmentation: Augmentation | None, positions: slice) -> Tensor:
        """Return training images, augmented.

        Args:
            index: int64 [S, B] on the device.
            augmentation: of the whole epoch, or None.
            positions: the batch's positions in the epoch's order.

        Returns:
            uint8 [S, B, H, W, C].
        """
        chosen = self.train.index_select(0, index.flatten().to(self.train.device))
        images = chosen.view(*index.shape, *self.train.shape[1:]).to(self.device)
        if augmentation is None:
            return images
        draws = [{name: array[:, positions] for name, array in step.items()} for step in self._on_device(augmentation)]
        return augment(images, augmentation.names, draws, -self.shift)

    def split(self, name: str, start: int, stop: int) -> Tensor:
        """Return images `start` to `stop` of the split "train" or "test", normalised: float32 [B, C, H, W]."""
        images = (self.train if name == "train" else self.test)[start:stop]
        return self.normalised(images.to(self.device))

    def _on_device(self, augmentation: Augmentation) -> list[dict[str, Tensor]]:
        """Copy an epoch's draws at its first batch: every copy from the host waits for all work queued before it."""
        if self._epoch is None or self._epoch[0] is not augmentation:
            copies = [{name: torch.from_numpy(array).to(self.device) for name, array in step.items()} for step in augmentation.draws]
            self._epoch = augmentation, copies
        return self._epoch[1]

    def normalised(self, images: Tensor) -> Tensor:
        """Normalise uint8 [..., H, W, C] to float32 [..., C, H, W], channels last in memory."""
        return images.to(torch.float32).add_(self.shift).mul_(self.scale).movedim(-1, -3)


@lru_cache(maxsize=2)
def device_images(dataset: ImageDataset, device: torch.device) -> DeviceImages:
    """Return a dataset's images on a device, kept for the next shard of the same dataset object."""
    return DeviceImages(dataset, device)


def _fits(size: int, device: torch.device) -> bool:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return size < free // 2
    return True
