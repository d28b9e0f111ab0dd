"""Datasets of torchvision: MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100, read from the files that torchvision downloads.

torchvision itself is imported only to download, so that `memtail submit` needs no torch.
"""

import gzip
import hashlib
import pickle
import struct
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from memtail.datasets.dataset import Images, Labels
from memtail.datasets.sources import InMemoryDataset
from memtail.errors import DatasetError
from memtail.settings import Settings


def torchvision_files(name: str, root: Path | None) -> list[Path]:
    """Return the files of a dataset, downloaded if no place has all of them.

    Args:
        name: a key of `TORCHVISION`.
        root: the first folder searched, and the one downloaded to; by default the cache.

    Raises:
        DatasetError: no place has the files and they cannot be downloaded; the message names the places.
    """
    family, settings = TORCHVISION[name], Settings()
    places = settings.places(root)
    for place in places:
        if files := family.find(place / family.folder):
            return files
    download_to = root or settings.cache
    try:
        family.download(download_to)
    except (OSError, RuntimeError) as error:
        searched = ", ".join(str(place / family.folder) for place in places)
        raise DatasetError(
            f"dataset '{name}' is not in {searched}, and cannot be downloaded ({str(error).splitlines()[0]}): on a machine with a network "
            f'run python -c "import torchvision; '
            f"torchvision.datasets.{family.class_name}('DIR', download=True)\" and set dataset.root or MEMTAIL_DATA to DIR"
        ) from None
    return family.find(download_to / family.folder)


def load_torchvision(name: str, files: list[Path]) -> InMemoryDataset:
    """Read a dataset.

    Args:
        name: a key of `TORCHVISION`.
        files: as `torchvision_files` returns them.

    Raises:
        DatasetError: a file is corrupt; the message names it.
    """
    return TORCHVISION[name].load(files)


@dataclass(frozen=True)
class _Family(ABC):
    """A dataset of torchvision.

    Attributes:
        name: in `memtail.spec`.
        class_name: in `torchvision.datasets`.
        folder: of its files, below a place that is searched.
    """

    name: str
    class_name: str
    folder: str

    @abstractmethod
    def find(self, folder: Path) -> list[Path]:
        """Return all files in a folder, none if one is missing."""

    @abstractmethod
    def load(self, files: list[Path]) -> InMemoryDataset:
        """Read the files."""

    def download(self, root: Path) -> None:
        try:
            import torchvision
        except ImportError:
            raise DatasetError(
                f"dataset '{self.name}' is downloaded by torchvision, which is not installed: pip install 'memtail[train]'"
            ) from None
        getattr(torchvision.datasets, self.class_name)(str(root), download=True)


_MNIST_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@dataclass(frozen=True)
class _Mnist(_Family):
    """Four IDX files, each plain or compressed.

    Attributes:
        classes: their names, which no file has.
    """

    classes: tuple[str, ...]

    def find(self, folder: Path) -> list[Path]:
        files = [next(filter(Path.is_file, (folder / stem, folder / f"{stem}.gz")), None) for stem in _MNIST_FILES]
        existing = [file for file in files if file is not None]
        return existing if len(existing) == len(files) else []

    def load(self, files: list[Path]) -> InMemoryDataset:
        train_images, train_labels, test_images, test_labels = (_read_idx(file) for file in files)
        for images, labels, file in ((train_images, train_labels, files[1]), (test_images, test_labels, files[3])):
            if len(images) != len(labels):
                raise DatasetError(f"{file}: has {len(labels)} labels for {len(images)} images: replace it with a good copy")
        return InMemoryDataset(
            train_images[..., None], train_labels.astype(np.int64), test_images[..., None], test_labels.astype(np.int64), self.classes
        )


def _read_idx(file: Path) -> npt.NDArray[np.uint8]:
    """Read an array of bytes in the IDX format: two zeros, type 8, the number of dimensions, the sizes, the values, all big-endian."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as opened:
            zero, kind, dimensions = struct.unpack(">HBB", opened.read(4))
            if (zero, kind, dimensions) != (0, 8, 3 if "images" in file.name else 1):
                raise ValueError("another type or shape")
            shape = struct.unpack(f">{dimensions}I", opened.read(4 * dimensions))
            return np.frombuffer(opened.read(), np.uint8).reshape(shape)
    except (ValueError, struct.error, EOFError, zlib.error, gzip.BadGzipFile):
        raise DatasetError(f"{file}: is truncated or corrupt: replace it with a good copy, or remove it to download it again") from None


@dataclass(frozen=True)
class _Cifar(_Family):
    """Pickled batches.

    Attributes:
        digests: MD5 of each file by its name, as torchvision has them: training, then test, then the names of the classes.
        label_kind: "" or "fine_", before the keys of labels and of their names.
    """

    digests: dict[str, str]
    label_kind: str

    def find(self, folder: Path) -> list[Path]:
        files = [folder / name for name in self.digests]
        return files if all(file.is_file() for file in files) else []

    def load(self, files: list[Path]) -> InMemoryDataset:
        *train, test, meta = (self._unpickle(file) for file in files)
        train_images, train_labels = self._examples(train)
        test_images, test_labels = self._examples([test])
        return InMemoryDataset(train_images, train_labels, test_images, test_labels, tuple(meta[f"{self.label_kind}label_names"]))

    def _unpickle(self, file: Path) -> dict[str, Any]:
        data, known = file.read_bytes(), self.digests[file.name]
        if hashlib.md5(data, usedforsecurity=False).hexdigest() != known:
            raise DatasetError(f"{file}: is truncated or corrupt (its MD5 is not {known}): replace it with a good copy")
        content: dict[str, Any] = pickle.loads(data, encoding="latin1")  # noqa: S301 (known bytes)
        return content

    def _examples(self, batches: list[dict[str, Any]]) -> tuple[Images, Labels]:
        images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return images, np.concatenate([np.array(batch[f"{self.label_kind}labels"], np.int64) for batch in batches])


_DIGITS = ("0 - zero", "1 - one", "2 - two", "3 - three", "4 - four", "5 - five", "6 - six", "7 - seven", "8 - eight", "9 - nine")
_CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_CIFAR10 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
}
_CIFAR100 = {
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}

#: Datasets by their name in `memtail.spec`. A further one is an entry here.
TORCHVISION: dict[str, _Family] = {
    family.name: family
    for family in (
        _Mnist("mnist", "MNIST", "MNIST/raw", _DIGITS),
        _Mnist("fashion-mnist", "FashionMNIST", "FashionMNIST/raw", _CLOTHES),
        _Cifar("cifar10", "CIFAR10", "cifar-10-batches-py", _CIFAR10, ""),
        _Cifar("cifar100", "CIFAR100", "cifar-100-python", _CIFAR100, "fine_"),
    )
}
