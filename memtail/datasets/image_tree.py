"""Trees of image files, class by class: `train/CLASS/*.png` and `test/` or `val/` beside it, as in ImageNet.

A tree with no folder beside `train/` has no test set.

Images are the files with an extension that torchvision's ImageFolder takes. Others are left out and counted; hidden files and folders, and
the `__MACOSX` folders of archives, are skipped. The order is: classes by name, then files by path. It is the order of ImageFolder, but
where a class folder holds folders beside images: ImageFolder lists folder after folder.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np

from memtail.datasets.dataset import Labels
from memtail.datasets.sources import describe_missing, shortened
from memtail.errors import DatasetError

#: Extensions of images: those of torchvision's ImageFolder.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class ImageFiles:
    """Files of one split.

    Attributes:
        folder: of the split.
        files: paths below the folder.
        labels: int64 [N], index of each file's class.
        ids: names of the images; None where they are named by their paths.
    """

    folder: Path
    files: list[str]
    labels: Labels
    ids: list[str] | None = None

    @property
    def names(self) -> list[str]:
        """Names of the images."""
        return self.files if self.ids is None else self.ids

    def stamps(self, start: int, stop: int) -> str:
        """Return a digest of the names, sizes and modification times of files `start` to `stop`."""
        digest = hashlib.sha256()
        for file in self.files[start:stop]:
            status = (self.folder / file).stat()
            digest.update(os.fsencode(file) + f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def limited(self, most: int | None) -> "ImageFiles":
        """Return evenly spaced files, `most` at most."""
        if most is None or most >= len(self.files):
            return self
        return self.chosen(np.arange(most) * len(self.files) // most)

    def chosen(self, indices: Iterable[int]) -> "ImageFiles":
        """Return the files with these indices."""
        indices = list(indices)
        ids = None if self.ids is None else [self.ids[index] for index in indices]
        return ImageFiles(self.folder, [self.files[index] for index in indices], self.labels[indices], ids)


@dataclass(frozen=True)
class ImageTree:
    """Both splits of a tree.

    Attributes:
        root: holds the splits.
        classes: names of the classes.
        train: the training images.
        test: the test images.
        left_out: number of files that are no images, by extension.
    """

    root: Path
    classes: list[str]
    train: ImageFiles
    test: ImageFiles
    left_out: Counter[str] = field(default_factory=Counter)

    def identity(self) -> list[str]:
        """Return digests that change with the tree."""
        return [str(self.root), *(split.stamps(0, len(split.files)) for split in (self.train, self.test))]

    def declared(self) -> str:
        """Return a digest of names, labels and classes, which do not follow from the paths where a file declares them."""
        digest = hashlib.sha256(json.dumps([self.classes, self.train.ids, self.test.ids]).encode())
        for split in (self.train, self.test):
            digest.update(split.labels.astype("<i8").tobytes())
        return digest.hexdigest()


def find_images(root: Path, max_train: int | None, max_test: int | None) -> ImageTree:
    """List a tree.

    Args:
        root: holds the splits.
        max_train: number of training images, evenly spaced; all if None.
        max_test: number of test images.

    Raises:
        DatasetError: a folder is missing, a class has no images, a link leads nowhere, or the test split has a class that the training
            split lacks.
        OSError: a folder cannot be read.
    """
    if not root.is_dir():
        raise DatasetError(
            f"dataset 'folder': {describe_missing(root, 'folder')}: give dataset.root the folder that holds train/ and test/"
        )
    if (root / "train").is_dir() and {entry.name for entry in _entries(root) if not entry.is_file()} == {"train"}:
        return _without_test(root, max_train)
    candidates = (root / "test", root / "val")
    test_folder = next((folder for folder in candidates if folder.is_dir()), next(filter(Path.is_symlink, candidates), candidates[0]))
    for folder in (root / "train", test_folder):
        if not folder.is_dir():
            raise DatasetError(
                f"dataset 'folder': {describe_missing(folder, 'folder')}: {root} must hold train/ and test/ (or val/), each with one "
                f"folder per class, or train/ as its only folder"
            )
    train, test = _Listing.of(root / "train"), _Listing.of(test_folder)
    if strange := sorted(test.images.keys() - train.images.keys()):
        raise DatasetError(
            f"dataset 'folder': {test_folder / strange[0]} is a class that train/ does not have: remove it or add training images"
        )
    for listing in (train, test):
        listing.check()
    classes = sorted(train.images)
    left_out = train.left_out + test.left_out
    return ImageTree(root, classes, train.files(classes).limited(max_train), test.files(classes).limited(max_test), left_out)


def _without_test(root: Path, max_train: int | None) -> ImageTree:
    train = _Listing.of(root / "train")
    train.check()
    classes = sorted(train.images)
    test = ImageFiles(root / "test", [], np.empty(0, np.int64))
    return ImageTree(root, classes, train.files(classes).limited(max_train), test, train.left_out)


@dataclass(frozen=True)
class _Listing:
    """Content of a split.

    Attributes:
        folder: of the split.
        images: paths below the folder, of each class.
        left_out: number of files that are no images, by extension.
        broken: links that lead nowhere, and devices, pipes and sockets.
    """

    folder: Path
    images: dict[str, list[str]]
    left_out: Counter[str]
    broken: list[str]

    @classmethod
    def of(cls, folder: Path) -> "_Listing":
        """List a split."""
        listing = cls(folder, {}, Counter(), [])
        for entry in _entries(folder):
            if entry.is_dir():
                listing.images[entry.name] = sorted(listing._images_below(entry.name, {_inode(folder)}))
            elif listing._is_image(entry):  # beside the classes
                listing.left_out[_kind(entry.name)] += 1
        return listing

    def _images_below(self, path: str, above: set[tuple[int, int]]) -> Iterator[str]:
        """Yield the paths of the images below a folder; `above` are the folders that hold it."""
        inode = _inode(self.folder / path)
        if inode in above:
            raise DatasetError(f"dataset 'folder': {self.folder / path} is a link to a folder that holds it: remove the link")
        for entry in _entries(self.folder / path):
            if entry.is_dir():
                yield from self._images_below(f"{path}/{entry.name}", above | {inode})
            elif self._is_image(entry):
                yield f"{path}/{entry.name}"

    def _is_image(self, entry: os.DirEntry[str]) -> bool:
        """Return whether a file is an image; note it if it is not."""
        if not entry.is_file():
            self.broken.append(entry.path)
        elif entry.name.lower().endswith(EXTENSIONS):
            return True
        else:
            self.left_out[_kind(entry.name)] += 1
        return False

    def check(self) -> None:
        """Refuse broken links, and classes without images, as ImageFolder does."""
        if self.broken:
            faults = [describe_missing(Path(path), "regular file") for path in sorted(self.broken)]
            raise DatasetError(f"dataset 'folder': {shortened(faults)}: restore or remove {'it' if len(faults) == 1 else 'them'}")
        if not any(self.images.values()):
            raise DatasetError(
                f"dataset 'folder': {self.folder} holds no images ({', '.join(EXTENSIONS)}): put them into one folder per class"
            )
        if empty := [str(self.folder / name) for name, images in sorted(self.images.items()) if not images]:
            raise DatasetError(
                f"dataset 'folder': no images ({', '.join(EXTENSIONS)}) in {shortened(empty)}: add images, or remove the class's folder"
            )

    def files(self, classes: list[str]) -> ImageFiles:
        """Return the images of all classes, in order."""
        images = [self.images.get(name, []) for name in classes]
        labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(each) for each in images])
        return ImageFiles(self.folder, list(chain.from_iterable(images)), labels)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".") and entry.name != "__MACOSX"]


def _inode(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _kind(name: str) -> str:
    return Path(name).suffix.lower() or "no extension"
