"""Writes prepared datasets: arrays on the disk and a fingerprint of their content, moved into place in one step."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from memtail.datasets.cache_folder import is_complete
from memtail.datasets.cache_lock import exclusive
from memtail.datasets.dataset import Images, Labels, Names
from memtail.datasets.sources import InMemoryDataset, InMemoryFeatures
from memtail.errors import DatasetError

#: Images per chunk: the unit of hashing, and of decoding and resuming a folder.
CHUNK = 1024

#: Is called with (images done, all images).
OnProgress = Callable[[int, int], None]
#: Writes a prepared dataset below a folder and returns its folder; the second argument is a file for a list of images that cannot be used.
Prepare = Callable[[Path, Path, OnProgress | None], Path]


@dataclass(frozen=True)
class ChunkSummary:
    """Summary of a chunk of images.

    Attributes:
        digest: SHA-256 (hex) of the pixels.
        pixels: number of pixels per channel.
        sums: per channel, sum of the pixel values.
        squares: per channel, sum of their squares.
    """

    digest: str
    pixels: int
    sums: list[int]
    squares: list[int]

    @classmethod
    def of(cls, images: Images) -> "ChunkSummary":
        """Summarise images uint8 [k, H, W, C]."""
        flat = images.reshape(-1, images.shape[-1])
        counts = [np.bincount(flat[:, channel], minlength=256).tolist() for channel in range(flat.shape[1])]
        return cls(
            digest=hashlib.sha256(np.ascontiguousarray(images).data).hexdigest(),
            pixels=len(flat),
            sums=[sum(value * count for value, count in enumerate(row)) for row in counts],
            squares=[sum(value * value * count for value, count in enumerate(row)) for row in counts],
        )


@dataclass(frozen=True)
class Split:
    """One split without its pixels.

    Attributes:
        labels: int64 [N].
        files: bytes [N], paths of the images; None where images have no files.
        image_shape: (H, W, C).
        chunks: summaries of the chunks of images, in order.
    """

    labels: Labels
    files: Names | None
    image_shape: tuple[int, ...]
    chunks: list[ChunkSummary]


def write_dataset(dataset: InMemoryDataset | InMemoryFeatures, target: Path) -> Path:
    """Write a dataset from memory.

    Args:
        dataset: the dataset.
        target: the folder of all prepared datasets.

    Returns:
        The dataset's folder below `target`.

    Raises:
        DatasetError: the training split is too small, or a label is out of range.
    """
    if isinstance(dataset, InMemoryFeatures):
        return _write_features(dataset, target)
    target.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=target))
    try:
        splits = {}
        for name, images, labels in (
            ("train", dataset.train_images, dataset.train_labels),
            ("test", dataset.test_images, dataset.test_labels),
        ):
            np.save(folder / f"{name}_images.npy", images)
            chunks = [ChunkSummary.of(images[start : start + CHUNK]) for start in range(0, len(images), CHUNK)]
            splits[name] = Split(labels, None, images.shape[1:], chunks)
        return finish(folder, target, splits["train"], splits["test"], dataset.classes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_features(dataset: InMemoryFeatures, target: Path) -> Path:
    check_labels(dataset.train_labels, dataset.test_labels, len(dataset.classes))
    meta = {"schema": 1, "kind": "features", "classes": list(dataset.classes), "has_files": False, "features": list(dataset.names)}
    arrays: dict[str, npt.NDArray[Any]] = {
        "train_labels": dataset.train_labels,
        "train_features": dataset.train_features,
        "test_labels": dataset.test_labels,
        "test_features": dataset.test_features,
    }
    return write_arrays(meta, arrays, target)


def write_arrays(meta: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]], target: Path) -> Path:
    """Write a dataset of texts or features.

    Args:
        meta: what `meta.json` holds beside the fingerprint.
        arrays: by the names of their files, those of the training split first.
        target: the folder of all prepared datasets.

    Returns:
        The dataset's folder below `target`.
    """
    target.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=target))
    try:
        digest = hashlib.sha256(json.dumps(meta).encode())
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)
            digest.update(json.dumps([*name.split("_", 1), array.dtype.str, list(array.shape)]).encode())
            digest.update(np.ascontiguousarray(array).data)
        fingerprint = digest.hexdigest()
        (folder / "meta.json").write_text(json.dumps({**meta, "fingerprint": fingerprint}, indent=1))
        return move_into_place(folder, target / fingerprint)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def finish(folder: Path, target: Path, train: Split, test: Split, classes: Iterable[str]) -> Path:
    """Add labels, names and metadata to a folder with the images, and move it to its name.

    Args:
        folder: holds `train_images.npy` and `test_images.npy`.
        target: the folder of all prepared datasets.
        train: the training split.
        test: the test split.
        classes: names of the classes.

    Returns:
        The dataset's folder below `target`.

    Raises:
        DatasetError: the training split is too small, or a label is out of range.
    """
    classes = list(classes)
    check_labels(train.labels, test.labels, len(classes))
    for name, split in (("train", train), ("test", test)):
        np.save(folder / f"{name}_labels.npy", split.labels.astype(np.int64))
        if split.files is not None:
            np.save(folder / f"{name}_files.npy", split.files)
    mean, std = _moments(train.chunks)
    fingerprint = _fingerprint(train, test, classes)
    meta = {
        "schema": 1,
        "fingerprint": fingerprint,
        "classes": classes,
        "mean": mean,
        "std": std,
        "has_files": train.files is not None,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    return move_into_place(folder, target / fingerprint)


def move_into_place(folder: Path, final: Path) -> Path:
    """Give a prepared folder its name, unless there is such a dataset already.

    Args:
        folder: the complete folder; afterwards it is gone.
        final: its path, named by the fingerprint.

    Returns:
        `final`.
    """
    folder.chmod(0o755)
    if not is_complete(final):  # two sources may have the same content, and one of them may be in use
        with exclusive(final):
            if not is_complete(final):
                shutil.rmtree(final, ignore_errors=True)
                folder.rename(final)
    shutil.rmtree(folder, ignore_errors=True)
    return final


def check_labels(train: Labels, test: Labels, classes: int) -> None:
    """Refuse labels outside 0 .. classes - 1, a training split that is too small, and datasets of a single class.

    Args:
        train: int64 [n].
        test: int64 [q]; empty without a test set.
        classes: number of classes; 0 without labels, which are then all 0.

    Raises:
        DatasetError: names the split and the first such label.
    """
    if classes == 1:
        raise DatasetError("train_labels: 1 class, at least 2 are needed: leave the labels out if there are none")
    if len(train) < 2:
        raise DatasetError(f"train_labels: {len(train)} examples, at least 2 are needed")
    if classes == 0:
        return
    for name, labels in (("train", train), ("test", test)):
        wrong = np.flatnonzero((labels < 0) | (labels >= classes))
        if len(wrong):
            raise DatasetError(
                f"{name}_labels: {len(wrong)} labels out of range, the first is {labels[wrong[0]]} at index {wrong[0]}: "
                f"labels must be 0 to {classes - 1}"
            )


def _fingerprint(train: Split, test: Split, classes: list[str]) -> str:
    digest = hashlib.sha256(json.dumps(classes).encode())
    for split in (train, test):
        digest.update(json.dumps([list(split.image_shape), len(split.labels)]).encode())
        digest.update(split.labels.astype("<i8").tobytes())
        if split.files is not None:
            digest.update(b"\n".join(split.files.tolist()))
        for chunk in split.chunks:
            digest.update(bytes.fromhex(chunk.digest))
    return digest.hexdigest()


def _moments(chunks: list[ChunkSummary]) -> tuple[list[float], list[float]]:
    pixels = sum(chunk.pixels for chunk in chunks)
    sums = [sum(values) for values in zip(*(chunk.sums for chunk in chunks), strict=True)]
    squares = [sum(values) for values in zip(*(chunk.squares for chunk in chunks), strict=True)]
    variance: npt.NDArray[np.float64] = np.array(
        [(pixels * square - total * total) / pixels**2 for total, square in zip(sums, squares, strict=True)]
    )
    # a constant channel carries no information; division by 1 keeps it at 0
    return [total / pixels for total in sums], np.where(variance > 0, np.sqrt(variance), 1.0).tolist()
