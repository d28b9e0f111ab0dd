"""Datasets that fit in memory: scikit-learn's digits, torchvision's MNIST and CIFAR families, and the user's own arrays."""

import gzip
import shutil
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memtail.datasets.image_dataset import Images, Labels
from memtail.errors import DatasetError
from memtail.settings import Settings


@dataclass(frozen=True)
class InMemoryDataset:
    """Images uint8 [N, H, W, C] and labels int64 [N] of both splits, in original order."""

    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels
    classes: tuple[str, ...]

    def limited(self, max_train: int | None, max_test: int | None) -> "InMemoryDataset":
        """The first `max_train` and `max_test` examples; all where None."""
        return InMemoryDataset(
            self.train_images[:max_train],
            self.train_labels[:max_train],
            self.test_images[:max_test],
            self.test_labels[:max_test],
            self.classes,
        )


def digits() -> InMemoryDataset:
    """The 1,797 handwritten 8 x 8 digits that come with scikit-learn; every fifth is a test image."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int64)
    test = np.arange(len(labels)) % 5 == 4
    return InMemoryDataset(images[~test], labels[~test], images[test], labels[test], tuple(str(digit) for digit in range(10)))


def arrays_file(root: Path) -> Path:
    """The .npz file of an `arrays` dataset. Raises: DatasetError: it is not there."""
    if not root.is_file():
        raise DatasetError(f"dataset 'arrays': there is no file {root}: give dataset.root the path of an .npz file")
    return root


def load_arrays(path: Path) -> InMemoryDataset:
    """Read `train_images`, `train_labels`, `test_images`, `test_labels` from an .npz file.

    Raises:
        DatasetError: the file is corrupt, or an array is missing, of the wrong type or shape, or has labels out of range.
    """
    needed = ("train_images", "train_labels", "test_images", "test_labels")
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise DatasetError(f"{path}: is no .npz file: write it with numpy.savez")
        with loaded as archive:
            if missing := [name for name in needed if name not in archive]:
                raise DatasetError(f"{path}: holds no {', '.join(missing)}; there: {', '.join(archive.files) or 'nothing'}")
            arrays = {name: archive[name] for name in needed}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DatasetError(f"{path}: is truncated or corrupt, or no .npz file ({error}): write it anew with numpy.savez") from None
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


_MNIST_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_TORCHVISION_CLASS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}


def torchvision_files(name: str, root: Path | None) -> list[Path]:
    """The files of a torchvision dataset as they lie on the disk, downloaded if they are nowhere.

    Raises:
        DatasetError: it is nowhere and cannot be downloaded; says where it looked.
    """
    settings = Settings()
    for place in settings.places(root):
        if files := _files_below(name, place):
            return files
    download_to = root or settings.cache
    try:
        _torchvision_class(name)(str(download_to), download=True)
    except (OSError, RuntimeError) as error:
        looked = ", ".join(str(place / _subfolder(name)) for place in settings.places(root))
        raise DatasetError(
            f"dataset '{name}' is not in {looked}, and cannot be downloaded ({str(error).splitlines()[0]}): on one with a network run "
            f'python -c "import torchvision; '
            f"torchvision.datasets.{_TORCHVISION_CLASS[name]}('DIR', download=True)\" and set dataset.root or MEMTAIL_DATA to DIR"
        ) from None
    return _files_below(name, download_to)


def load_torchvision(name: str, files: list[Path]) -> InMemoryDataset:
    """Read a torchvision dataset from `torchvision_files`. Raises: DatasetError: a file is corrupt (says which)."""
    kind = _torchvision_class(name)
    if name in ("mnist", "fashion-mnist"):
        return _load_mnist(kind, files)
    _check_digests(files, dict(kind.train_list + kind.test_list + [(kind.meta["filename"], kind.meta["md5"])]))
    root = str(files[0].parent.parent)
    train, test = kind(root, train=True), kind(root, train=False)
    return InMemoryDataset(train.data, np.array(train.targets, np.int64), test.data, np.array(test.targets, np.int64), tuple(train.classes))


def _load_mnist(kind: Any, files: list[Path]) -> InMemoryDataset:
    from torchvision.datasets.mnist import read_image_file, read_label_file

    arrays = []
    for file in files:
        try:
            plain = _unpacked(file) if file.suffix == ".gz" else file
            arrays.append((read_image_file if "images" in file.name else read_label_file)(str(plain)).numpy())
        except (AssertionError, ValueError, TypeError, RuntimeError, KeyError, IndexError, EOFError, zlib.error, gzip.BadGzipFile):
            raise DatasetError(f"{file}: is truncated or corrupt: replace it with a good copy, or remove it to download it anew") from None
    train_images, train_labels, test_images, test_labels = arrays
    for images, labels, file in ((train_images, train_labels, files[1]), (test_images, test_labels, files[3])):
        if len(images) != len(labels):
            raise DatasetError(f"{file}: has {len(labels)} labels for {len(images)} images: replace it with a good copy")
    return InMemoryDataset(train_images[..., None], train_labels, test_images[..., None], test_labels, tuple(kind.classes))


def _unpacked(file: Path) -> Path:
    """A file unpacked beside the cache's other downloads; the original's folder may be read-only."""
    plain = Settings().cache / "unpacked" / file.parent.parent.name / file.stem
    plain.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(file, "rb") as source, plain.open("wb") as target:
        shutil.copyfileobj(source, target)
    return plain


def _check_digests(files: list[Path], digests: dict[str, str]) -> None:
    from torchvision.datasets.utils import check_integrity

    for file in files:
        if not check_integrity(str(file), digests[file.name]):
            raise DatasetError(f"{file}: is truncated or corrupt (its MD5 is not {digests[file.name]}): replace it with a good copy")


def _files_below(name: str, place: Path) -> list[Path]:
    """All files of a dataset below a folder; empty where one is missing."""
    folder = place / _subfolder(name)
    if name in ("mnist", "fashion-mnist"):
        found = [next((file for file in (folder / stem, folder / f"{stem}.gz") if file.is_file()), None) for stem in _MNIST_FILES]
    else:
        if not folder.is_dir():
            return []
        kind = _torchvision_class(name)
        names = [entry[0] for entry in kind.train_list + kind.test_list] + [kind.meta["filename"]]
        found = [folder / file for file in names if (folder / file).is_file()]
        if len(found) < len(names):
            return []
    return [file for file in found if file is not None] if None not in found else []


def _subfolder(name: str) -> str:
    folders = {"mnist": "MNIST/raw", "fashion-mnist": "FashionMNIST/raw", "cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
    return folders[name]


def _torchvision_class(name: str) -> Any:
    try:
        import torchvision
    except ImportError:
        raise DatasetError(f"dataset '{name}' is read by torchvision, which is not installed: pip install 'memtail[train]'") from None
    return getattr(torchvision.datasets, _TORCHVISION_CLASS[name])
