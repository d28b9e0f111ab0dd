"""Examples on the device: gathers, augments and normalises batches there, for all trials of a stack in one call."""

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from memtail.datasets import FeatureDataset, Trainable
from memtail.models.trained import normalised
from memtail.trainers.images.augmentations import Augmentation, augment
from memtail.trainers.images.prefetch import prefetched

# Values per step of the computation of moments, which is in float64.
_CHUNK = 1 << 22
# Largest share of an accelerator's free memory that a dataset takes.
_RESIDENT_SHARE = 0.8


class DeviceImages:
    """A dataset's examples and labels, resident on the device as they are stored if they fit, else memory-mapped in host memory.

    Attributes:
        device: the device.
        resident: whether the examples are in the device's memory.
        train: images uint8 [n, H, W, C], or features float32 [n, D].
        test: uint8 [q, H, W, C] or float32 [q, D].
        train_labels: int64 [n], on the device.
        test_labels: int64 [q], on the device.
        shift: float32 [C] or [D]; a value is normalised as (value + shift) * scale.
        scale: float32 [C] or [D].
        network: kept on the device with the examples, for the next trials: what it was made for, and the network.
    """

    def __init__(self, dataset: Trainable, device: torch.device) -> None:
        self.device = device
        self._in_host = train, test = torch.from_numpy(dataset.examples("train")), torch.from_numpy(dataset.examples("test"))
        self.resident = _fits(train.nbytes + test.nbytes, device)
        self.train, self.test = (split.to(device) if self.resident else split for split in (train, test))
        self.train_labels = torch.from_numpy(np.array(dataset.train_labels)).to(device)
        self.test_labels = torch.from_numpy(np.array(dataset.test_labels)).to(device)
        mean, std = _moments(dataset.train_features) if isinstance(dataset, FeatureDataset) else (dataset.mean, dataset.std)
        self.shift = -torch.tensor(mean, dtype=torch.float32, device=device)
        self.scale = 1 / torch.tensor(std, dtype=torch.float32, device=device)
        self.network: tuple[Any, nn.Module] | None = None
        self._epoch: tuple[Augmentation, list[dict[str, Tensor]]] | None = None

    def batches(
        self, order: Tensor, parts: Sequence[slice], augmentation: Augmentation | None
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield training examples, augmented, and their labels.

        Args:
            order: int64 [S, m], each trial's examples in an epoch, in host memory.
            parts: positions of each batch in the epoch's order.
            augmentation: of the whole epoch, or None.

        Yields:
            uint8 [S, B, H, W, C], or float32 [S, B, D]; and int64 [S, B].
        """
        index = order.to(self.device)
        for part, chosen in zip(parts, self._chosen(order, index, parts), strict=True):
            batch = index[:, part]
            yield self._augmented(chosen.view(*batch.shape, *self.train.shape[1:]), augmentation, part), self.train_labels[batch]

    def _chosen(self, order: Tensor, index: Tensor, parts: Sequence[slice]) -> Iterator[Tensor]:
        """Yield the examples of each part of an order, on the device."""
        if self.resident:
            return (self.train.index_select(0, index[:, part].flatten()) for part in parts)
        return prefetched(self.train, [order[:, part].flatten() for part in parts], self.device)

    def _augmented(self, images: Tensor, augmentation: Augmentation | None, positions: slice) -> Tensor:
        if augmentation is None:
            return images
        draws = [{name: array[:, positions] for name, array in step.items()} for step in self._on_device(augmentation)]
        return augment(images, augmentation.names, draws, -self.shift)

    def evict(self) -> bool:
        """Leave an accelerator's memory to the training, and read examples from host memory; return whether they were in the former."""
        held = self.train is not self._in_host[0]
        self.train, self.test = self._in_host
        self.resident = self.resident and not held
        return held

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


_kept: list[tuple[Trainable, DeviceImages]] = []  # of the last dataset


def device_images(dataset: Trainable, device: torch.device) -> DeviceImages:
    """Return a dataset's examples on a device, kept for the next shard of the same dataset object; another one makes room for it."""
    if not any(kept is dataset and images.device == device for kept, images in _kept):
        release_images()
        _kept.append((dataset, DeviceImages(dataset, device)))
    return _kept[0][1]


def release_images() -> None:
    """Release the device's memory that holds a dataset, and what torch keeps of it."""
    _kept.clear()
    torch.cuda.empty_cache()  # does nothing where this process has not used CUDA


def _moments(features: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return mean and standard deviation float64 [D] of features [n, D]; infinite deviations make constant features 0."""
    rows = max(1, _CHUNK // features.shape[1])
    chunks = [features[start : start + rows] for start in range(0, len(features), rows)]
    mean = np.sum([chunk.sum(0, dtype=np.float64) for chunk in chunks], axis=0) / len(features)
    variance = np.sum([((chunk - mean) ** 2).sum(0) for chunk in chunks], axis=0) / len(features)
    std = np.sqrt(variance)
    return mean, np.where((features.min(0) == features.max(0)) | (std < np.finfo(np.float32).tiny), np.inf, std)


def _fits(size: int, device: torch.device) -> bool:
    """Return whether examples fit into the device's memory; where they leave too little for training, they are evicted."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return size < _RESIDENT_SHARE * free
    return True
