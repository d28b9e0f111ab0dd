"""Datasets of torchvision: MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100, read from the files that torchvision downloads."""

import gzip
import shutil
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

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
        family.dataset_class()(str(download_to), download=True)
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

    def dataset_class(self) -> Any:
        try:
            import torchvision
        except ImportError:
            raise DatasetError(
                f"dataset '{self.name}' is read by torchvision, which is not installed: pip install 'memtail[train]'"
            ) from None
        return getattr(torchvision.datasets, self.class_name)


_MNIST_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


class _Mnist(_Family):
    """Four IDX files, each plain or compressed."""

    def find(self, folder: Path) -> list[Path]:
        files = [next(filter(Path.is_file, (folder / stem, folder / f"{stem}.gz")), None) for stem in _MNIST_FILES]
        existing = [file for file in files if file is not None]
        return existing if len(existing) == len(files) else []

    def load(self, files: list[Path]) -> InMemoryDataset:
        classes = tuple(self.dataset_class().classes)
        from torchvision.datasets.mnist import read_image_file, read_label_file

        arrays = []
        for file in files:
            try:
                plain = _unpacked(file) if file.suffix == ".gz" else file
                arrays.append((read_image_file if "images" in file.name else read_label_file)(str(plain)).numpy())
            except (AssertionError, ValueError, TypeError, RuntimeError, KeyError, IndexError, EOFError, zlib.error, gzip.BadGzipFile):
                raise DatasetError(
                    f"{file}: is truncated or corrupt: replace it with a good copy, or remove it to download it again"
                ) from None
        train_images, train_labels, test_images, test_labels = arrays
        for images, labels, file in ((train_images, train_labels, files[1]), (test_images, test_labels, files[3])):
            if len(images) != len(labels):
                raise DatasetError(f"{file}: has {len(labels)} labels for {len(images)} images: replace it with a good copy")
        return InMemoryDataset(train_images[..., None], train_labels, test_images[..., None], test_labels, classes)


def _unpacked(file: Path) -> Path:
    """Unpack a file into the cache, since its folder may be read-only."""
    plain = Settings().cache / "unpacked" / file.parent.parent.name / file.stem
    plain.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(file, "rb") as source, plain.open("wb") as target:
        shutil.copyfileobj(source, target)
    return plain


class _Cifar(_Family):
    """Pickled batches, whose MD5 torchvision knows."""

    def find(self, folder: Path) -> list[Path]:
        if not folder.is_dir():
            return []
        files = [folder / name for name in self._digests()]
        return files if all(file.is_file() for file in files) else []

    def load(self, files: list[Path]) -> InMemoryDataset:
        from torchvision.datasets.utils import check_integrity

        digests = self._digests()
        for file in files:
            if not check_integrity(str(file), digests[file.name]):
                raise DatasetError(f"{file}: is truncated or corrupt (its MD5 is not {digests[file.name]}): replace it with a good copy")
        root = str(files[0].parent.parent)
        train, test = self.dataset_class()(root, train=True), self.dataset_class()(root, train=False)
        return InMemoryDataset(
            train.data, np.array(train.targets, np.int64), test.data, np.array(test.targets, np.int64), tuple(train.classes)
        )

    def _digests(self) -> dict[str, str]:
        """Return the MD5 of each file, by its name."""
        known = self.dataset_class()
        return dict(known.train_list + known.test_list + [(known.meta["filename"], known.meta["md5"])])


#: Datasets by their name in `memtail.spec`. A further one is an entry here.
TORCHVISION: dict[str, _Family] = {
    family.name: family
    for family in (
        _Mnist("mnist", "MNIST", "MNIST/raw"),
        _Mnist("fashion-mnist", "FashionMNIST", "FashionMNIST/raw"),
        _Cifar("cifar10", "CIFAR10", "cifar-10-batches-py"),
        _Cifar("cifar100", "CIFAR100", "cifar-100-python"),
    )
}
