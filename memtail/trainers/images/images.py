"""Examples on the device: gathers, augments and normalises batches there, for all trials of a stack in one call."""

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memtail.datasets import FeatureDataset, Trainable
from memtail.models.trained import normalised
from memtail.trainers.images.augmentations import Augmentation, augment

# Values per step of the computation of moments, which is in float64.
_CHUNK = 1 << 22


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
        self._epoch: tuple[Augmentation, list[dict[str, Tensor]]] | None = None

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
        if augmentation is None:
            return images
        draws = [{name: array[:, positions] for name, array in step.items()} for step in self._on_device(augmentation)]
        return augment(images, augmentation.names, draws, -self.shift)

    def split(self, name: str, start: int, stop: int) -> Tensor:
        """Return examples `start` to `stop` of the split "train" or "test", normalised: float32 [B, C, H, W] or [B, D]."""
        images = (self.train if name == "train" else self.test)[start:stop]
        return self.normalised(images.to(self.device))

    def _on_device(self, augmentation: Augmentation) -> list[dict[str, Tensor]]:
        """Copy an epoch's draws at its first batch: every copy from the host waits for all work queued before it."""
        if self._epoch is None or self._epoch[0] is not augmentation:
            copies = [{name: torch.from_numpy(array).to(self.device) for name, array in step.items()} for step in augmentation.draws]
            self._epoch = augmentation, copies
        return self._epoch[1]

    def normalised(self, images: Tensor) -> Tensor:
        """Normalise uint8 [..., H, W, C] to float32 [..., C, H, W], channels last in memory; features keep their shape."""
        return normalised(images, self.shift, self.scale, are_images=self.train.dim() == 4)


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


def _fits(size: int, device: torch.device) -> bool:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return size < free // 2
    return True
