"""Examples on the device: gathers, augments and normalises batches there, for all trials of a stack in one call."""

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from memtail.datasets import FeatureDataset, Trainable
from memtail.models.trained import normalised
from memtail.trainers.images.augmentations import augment
from memtail.trainers.images.batches import Epoch
from memtail.trainers.images.prefetch import ToDevice, prefetched

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
        networks: kept on the device with the examples, for the next trials: what each was made for, and the network.
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
        self.networks: list[tuple[Any, nn.Module]] = []

    def batches(self, epoch: Epoch, parts: Sequence[slice]) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield training examples, augmented, and their labels.

        Args:
            epoch: what is drawn for the epoch, on the device.
            parts: positions of each batch in the epoch's order.

        Yields:
            uint8 [S, B, H, W, C], or float32 [S, B, D]; and int64 [S, B].
        """
        for part, chosen in zip(parts, self._chosen(epoch, parts), strict=True):
            batch = epoch.index[:, part]
            yield self._augmented(chosen.view(*batch.shape, *self.train.shape[1:]), epoch, part), self.train_labels[batch]

    def _chosen(self, epoch: Epoch, parts: Sequence[slice]) -> Iterator[Tensor]:
        """Yield the examples of each part of an epoch, on the device."""
        if self.resident:
            return (self.train.index_select(0, epoch.index[:, part].flatten()) for part in parts)
        return prefetched(self._rows, [epoch.order[:, part].flatten() for part in parts], self.device)

    def _rows(self, index: Tensor, to_device: ToDevice) -> Tensor:
        rows = torch.empty((len(index), *self.train.shape[1:]), dtype=self.train.dtype, pin_memory=self.device.type == "cuda")
        return to_device(torch.index_select(self.train, 0, index, out=rows))

    def _augmented(self, images: Tensor, epoch: Epoch, positions: slice) -> Tensor:
        if not epoch.augmentations:
            return images
        draws = [{name: drawn[:, positions] for name, drawn in step.items()} for step in epoch.draws]
        return augment(images, epoch.augmentations, draws, -self.shift)

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
