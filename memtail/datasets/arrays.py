"""The user's arrays: an .npz file of images or features and their labels, under memtail's names or those of Keras.

A file may hold the training split alone, and may hold no labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog

from memtail.datasets.dataset import Images, Labels
from memtail.datasets.sources import InMemoryDataset, InMemoryFeatures, describe_missing
from memtail.errors import DatasetError

log = structlog.get_logger()

Array = npt.NDArray[Any]

#: Version of the interpretation of arrays; raised when the same file gives another dataset.
ARRAYS_VERSION = 2

# Training examples and labels, test examples and labels: memtail's names, and those of Keras.
_NAMES = (
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("train_features", "train_labels", "test_features", "test_labels"),
    ("x_train", "y_train", "x_test", "y_test"),
)
_FEATURE_NAMES = "feature_names"
_LABELS = {name for names in _NAMES for name in names[1::2]}


def arrays_file(root: Path) -> Path:
    """Return the .npz file of an `arrays` dataset.

    Args:
        root: its path.

    Raises:
        DatasetError: there is no such file.
    """
    if not root.is_file():
        raise DatasetError(f"dataset 'arrays': {describe_missing(root, 'file')}: give dataset.root the path of an .npz file")
    return root


def load_arrays(path: Path) -> InMemoryDataset | InMemoryFeatures:
    """Read the arrays of `_NAMES`, and `feature_names` if it is there, from an .npz file.

    Args:
        path: of the file. Images are uint8 [N, H, W], [N, H, W, C], or [N, C, H, W] where that is unambiguous; features are numbers
            [N, D], also under Keras' names. Labels are whole numbers [N] or [N, 1], or strings, the names of the classes.

    Raises:
        DatasetError: the file is corrupt, or an array is misnamed, has another type or shape, or has labels out of range.
        OSError: the file cannot be read.
    """
    held, names = _read(path)
    vectors = held[0].name == "train_features" or (held[0].name == "x_train" and held[0].examples.ndim == 2)
    read = _features if vectors else checked_images
    examples: list[Array] = [read(f"{path}: {each.name}", each.examples) for each in held]
    if len(held) == 1:
        examples.append(examples[0][:0])
    if examples[0].shape[1:] != examples[1].shape[1:]:
        kind = "examples" if vectors else "images"
        raise DatasetError(
            f"{path}: training {kind} are {list(examples[0].shape[1:])}, test {kind} {list(examples[1].shape[1:])}: all must be of one size"
        )
    train, test, classes = _all_labels(path, held, examples)
    if not vectors:
        return InMemoryDataset(examples[0], train, examples[1], test, classes)
    return InMemoryFeatures(examples[0], train, examples[1], test, classes, _feature_names(path, names, examples[0]))


@dataclass(frozen=True)
class _Held:
    """The arrays of a split, as they are in the file, with their names; `labels` is None where there are none."""

    name: str
    examples: Array
    labels_name: str
    labels: Array | None


def _read(path: Path) -> tuple[list[_Held], Array | None]:
    """Return the arrays of the training split, and of the test split if there is one; and the names of features."""
    with path.open("rb") as file:  # numpy does not close a file that it cannot read
        try:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DatasetError(f"{path}: is not an .npz file: write it with numpy.savez")
            held = [
                _Held(name, _array(path, archive, name), labels or "", None if labels is None else _array(path, archive, labels))
                for name, labels in _names(path, archive.files)
            ]
            return held, _array(path, archive, _FEATURE_NAMES) if _FEATURE_NAMES in archive.files else None
        except DatasetError:
            raise
        except MemoryError:
            raise DatasetError(f"{path}: needs more memory than there is: use dataset 'folder', which is read in parts") from None
        except Exception as error:  # zipfile, its decompressors and numpy raise every kind of exception on a damaged file
            raise DatasetError(f"{path}: is truncated or corrupt, or no .npz file ({error}): write it again with numpy.savez") from None


def _names(path: Path, held: list[str]) -> Sequence[tuple[str, str | None]]:
    """Return the names of the examples and the labels of each split.

    Test set and labels may be missing, but then nothing else may be in the file, since it may be one of them under another name.
    """
    for train, train_labels, test, test_labels in _NAMES:
        if {train, train_labels, test, test_labels} <= set(held):
            return [(train, train_labels), (test, test_labels)]
        parts: list[list[tuple[str, str | None]]] = [[(train, train_labels)], [(train, None), (test, None)], [(train, None)]]
        for splits in parts:
            if {name for split in splits for name in split if name} == set(held) - {_FEATURE_NAMES}:
                return splits
    near = max(_NAMES, key=lambda names: len(set(names) & set(held)))
    missing = ", ".join(name for name in near if name not in held)
    raise DatasetError(
        f"{path}: holds no {missing}; there: {', '.join(held) or 'nothing'}: name the arrays "
        f"{' or '.join(', '.join(names) for names in _NAMES)}, and leave out all others if it has no test set or no labels"
    )


def _array(path: Path, archive: np.lib.npyio.NpzFile, name: str) -> Array:
    try:
        array: Array = archive[name]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        fix = f"{name}.astype(str) or {name}.astype(int)" if name in _LABELS else f"np.stack({name})"
        raise DatasetError(f"{path}: {name} is an array of Python objects: save {fix}") from None
    return array


def checked_images(what: str, images: Array) -> Images:
    """Return images uint8 [N, H, W, C].

    Args:
        what: source and name of the images, for messages.
        images: uint8 [N, H, W], [N, H, W, C], or [N, C, H, W] where that is unambiguous.

    Raises:
        DatasetError: the images are of another type or shape; the message names the conversion.
    """
    name = what.rsplit(maxsplit=1)[-1]
    if images.ndim not in (3, 4) or images.size == 0:
        raise DatasetError(f"{what} is {images.dtype} {list(images.shape)}, needed is uint8 [N, H, W] or [N, H, W, C]")
    if images.dtype != np.uint8:
        raise DatasetError(f"{what} is {images.dtype} {list(images.shape)}, needed is uint8 from 0 to 255: {_conversion(name, images)}")
    if images.ndim == 3:
        return images[..., None]
    _, first, second, last = images.shape
    if has_channels_first(images.shape[1:]):
        log.info("channels moved to the end", array=name, shape=list(images.shape))
        return images.transpose(0, 2, 3, 1)
    if last not in (1, 3) and first != second == last:
        raise DatasetError(
            f"{what} is {list(images.shape)}, which looks like {second} x {last} pixels with the channels first: save "
            f"{name}.transpose(0, 2, 3, 1)"
        )
    return images


def has_channels_first(shape: tuple[int, ...]) -> bool:
    """Return whether a shape of three dimensions can only be that of an image whose channels come first."""
    first, second, last = shape
    return last not in (1, 3) and first != second and first <= 4 and (last > 4 or second == last)


def _features(what: str, features: Array) -> npt.NDArray[np.float32]:
    """Return features float32 [N, D]."""
    if features.ndim != 2 or features.size == 0 or features.dtype.kind not in "iufb":
        raise DatasetError(f"{what} is {features.dtype} {list(features.shape)}, needed are numbers [N, D], a row for each example")
    with np.errstate(over="ignore"):
        converted = features.astype(np.float32)
    if not np.isfinite(converted).all():
        row, place = np.argwhere(~np.isfinite(converted))[0]
        raise DatasetError(f"{what}[{row}, {place}] is {features[row, place]}: features must be finite in float32: fill or drop such rows")
    return converted


def _feature_names(path: Path, names: Array | None, features: Array) -> tuple[str, ...]:
    count = features.shape[1]
    if names is None:
        return tuple(map(str, range(count)))
    if names.shape != (count,) or names.dtype.kind != "U":
        raise DatasetError(f"{path}: {_FEATURE_NAMES} is {names.dtype} {list(names.shape)}, needed are {count} strings")
    return tuple(names.tolist())


def _conversion(name: str, images: Array) -> str:
    """Return the fix of images of another type, by their values."""
    if images.dtype == bool:
        return f'save 255 * {name}.astype("uint8")'
    if images.dtype.kind in "iuf":
        low, high = images.min(), images.max()
        if low >= 0 and high <= 1:
            return f'save (255 * {name}).round().astype("uint8")'
        if low >= 0 and high <= 255:
            return f'save {name}.round().astype("uint8")'
        if images.dtype == np.uint16:
            return f'save ({name} // 257).astype("uint8")'
        return f"values are {low:g} to {high:g}, scale them to 0 to 255, round, and save them as uint8"
    return "save numbers from 0 to 255 as uint8"


def checked_labels(what: str, labels: Array, images: Array) -> Array:
    """Return labels int64 [N] or str [N].

    Args:
        what: source and name of the labels, for messages.
        labels: whole numbers [N] or [N, 1], or strings.
        images: the N examples.

    Raises:
        DatasetError: the labels are of another type or number.
    """
    name = what.rsplit(maxsplit=1)[-1]
    if labels.ndim == 2 and len(labels) == len(images) and labels.shape[1] > 1:
        raise DatasetError(f"{what} is {labels.dtype} {list(labels.shape)}, one label for each image is needed: save {name}.argmax(1)")
    if labels.shape == (len(images), 1):
        labels = labels[:, 0]
    if labels.shape != (len(images),):
        hint = ": save np.moveaxis(images, -1, 0)" if images.shape[-1] == labels.size else ""
        raise DatasetError(f"{what} is {labels.dtype} {list(labels.shape)}, needed are {len(images)} labels, one for each image{hint}")
    if labels.dtype.kind == "S":
        return np.char.decode(labels, "utf-8", "replace")
    if labels.dtype.kind == "f":
        labels = labels.astype(np.float64)
        broken = np.flatnonzero(~np.isfinite(labels) | (labels != np.rint(labels)) | (abs(labels) > 2**53))
        if len(broken):
            raise DatasetError(
                f"{what}: {len(broken)} labels are no whole numbers, the first is {labels[broken[0]]} at index {broken[0]}: labels are "
                f"indices of classes from 0, or names"
            )
    elif labels.dtype.kind not in "iubU":
        raise DatasetError(f"{what} is {labels.dtype} {list(labels.shape)}, needed are {len(images)} whole numbers or strings")
    return labels


def _all_labels(path: Path, held: list[_Held], examples: list[Array]) -> tuple[Labels, Labels, tuple[str, ...]]:
    """Return the labels of both splits as indices of classes, and the names of the classes; 0 and no names if there are no labels."""
    labels = [
        checked_labels(f"{path}: {each.labels_name}", each.labels, each.examples)
        if each.labels is not None
        else np.zeros(len(each.examples), np.int64)
        for each in held
    ]
    if len(held) == 1:
        labels.append(labels[0][:0])
    if held[0].labels is None:
        return labels[0], labels[1], ()
    return class_indices(path, [each.labels_name for each in held], labels[0], labels[1])


def class_indices(source: Path | str, names: list[str], train: Array, test: Array) -> tuple[Labels, Labels, tuple[str, ...]]:
    """Return labels as indices of classes, int64 [N] of both splits, and the names of the classes.

    Args:
        source: name of their source in messages.
        names: names of the labels of both splits.
        train: as `checked_labels` returns them.
        test: as `train`.

    Raises:
        DatasetError: the splits have labels of different types, or labels are out of range.
    """
    if (train.dtype.kind == "U") != (test.dtype.kind == "U"):
        raise DatasetError(f"{source}: {names[0]} is {train.dtype}, {names[1]} {test.dtype}: labels of both must be numbers, or names")
    if train.dtype.kind == "U":
        classes = np.unique(train)
        if unknown := sorted(set(test.tolist()) - set(classes.tolist())):
            raise DatasetError(f"{source}: {names[1]} holds {unknown[0]!r}, a class that {names[0]} does not have: add training images")
        return np.searchsorted(classes, train), np.searchsorted(classes, test), tuple(classes.tolist())
    count = int(train.max()) + 1
    if count > len(train):
        raise DatasetError(
            f"{source}: {names[0]} out of range: {count - 1} at index {int(train.argmax())} makes more classes than there are examples"
        )
    return train.astype(np.int64), test.astype(np.int64), tuple(str(label) for label in range(count))
