"""Pairs of an example and a label that are read one by one, as a torch `Dataset` gives them -> a prepared dataset.

The first training example decides the kind: a text, an image (Pillow's, or an array of 2 or 3 dimensions), or a vector of features. Each
item is read once, in order. Images go to the disk one by one, so that memory is bounded.
"""

import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from memtail.datasets.arrays import Array, checked_labels, class_indices
from memtail.datasets.dataset import Labels, Names
from memtail.datasets.decoding import DamagedImageError
from memtail.datasets.item_examples import ItemExamples, ItemFeatures, ItemImages, ItemTexts, described, examples_like
from memtail.datasets.prepared import OnProgress, Split, check_labels, finish, write_arrays
from memtail.datasets.sources import shortened
from memtail.errors import DatasetError

# Items between two reports of progress.
_REPORTED = 100


class Items(Protocol):
    """Pairs of an example and its label, by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class ItemError(Exception):
    """An item cannot be read, for the reason that is the cause; the text names the item, as `train[17]`."""


@dataclass(frozen=True)
class ItemSplit:
    """Items of a split.

    Attributes:
        items: pairs of an example and its label.
        most: number of items to read, the first ones; all if None.
        ids: names of all items, if they have any.
    """

    items: Items
    most: int | None = None
    ids: list[str] | None = None

    def __len__(self) -> int:
        return len(self.items) if self.most is None else min(self.most, len(self.items))

    @property
    def names(self) -> Names | None:
        """Names of the items that are read."""
        return None if self.ids is None else np.array([name.encode() for name in self.ids[: len(self)]], dtype=np.bytes_)


def write_items(
    source: str,
    splits: dict[str, ItemSplit],
    target: Path,
    *,
    labelled: bool = True,
    classes: tuple[str, ...] | None = None,
    features: tuple[str, ...] | None = None,
    resolution: int | None = None,
    on_progress: OnProgress | None = None,
) -> Path:
    """Read items and write the prepared dataset.

    Args:
        source: name of their source in messages.
        splits: `train`, and `test` if there is a test set.
        target: the folder of all prepared datasets.
        labelled: whether items are pairs of an example and its label; otherwise they are examples.
        classes: names of the classes; by default labels are names, or indices of classes without names.
        features: names of the features; by default their indices.
        resolution: side in pixels to which images are resized and cropped; None to keep their size.
        on_progress: called with (items read, all items).

    Returns:
        The dataset's folder below `target`.

    Raises:
        ItemError: reading an item raised an exception.
        DatasetError: an item is of no known kind, or of another kind or shape than the first one; images are damaged; or labels cannot be
            used.
        OSError: the dataset cannot be written.
    """
    target.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=target))
    try:
        examples, labels = _read(source, splits, folder, labelled, resolution, on_progress)
        if len({(each.kind, each.shape) for each in examples.values()}) > 1:
            shown = ", ".join(f"{name} examples are {each.kind} {list(each.shape)}" for name, each in examples.items())
            raise DatasetError(f"{source}: {shown}: all must be alike")
        numbers, names = _numbered(source, labels, () if not labelled else classes)
        images = {name: each for name, each in examples.items() if isinstance(each, ItemImages)}
        if images:
            prepared = {name: Split(numbers[name], splits[name].names, *each.written()) for name, each in images.items()}
            shape = prepared["train"].image_shape
            if "test" not in splits:
                np.save(folder / "test_images.npy", np.empty((0, *shape), np.uint8))
            nothing = Split(numbers["test"], _no_names(splits), shape, [])
            return finish(folder, target, prepared["train"], prepared.get("test", nothing), names)
        check_labels(numbers["train"], numbers["test"], len(names))
        columns = {name: each for name, each in examples.items() if not isinstance(each, ItemImages)}
        return _write_columns(source, splits, columns, numbers, names, features, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _read(
    source: str, splits: dict[str, ItemSplit], folder: Path, labelled: bool, resolution: int | None, on_progress: OnProgress | None
) -> tuple[dict[str, ItemExamples], dict[str, list[Any]]]:
    """Read the items of all splits: examples and labels."""
    examples: dict[str, ItemExamples] = {}
    labels: dict[str, list[Any]] = {name: [] for name in splits}
    damaged, done, total = [], 0, sum(map(len, splits.values()))
    for name, split in splits.items():
        if not len(split):
            raise DatasetError(f"{source}: {name} has no examples")
        for index in range(len(split)):
            what = f"{source}: {name}[{index}]"
            done += 1
            try:
                item = _item(split.items, name, index)
            except DamagedImageError as error:
                damaged.append(f"{name}[{index}] {error}")
                continue
            example, label = _pair(what, item) if labelled else (item, 0)
            labels[name].append(label)
            if name not in examples:
                examples[name] = examples_like(what, example, folder / f"{name}_images.npy", len(split), resolution)
            examples[name].add(what, example)
            if on_progress and (done % _REPORTED == 0 or done == total):
                on_progress(done, total)
    if damaged:
        raise DatasetError(f"{source}: {len(damaged)} of {total} images cannot be used: {shortened(damaged)}: replace or remove them")
    return examples, labels


def _item(items: Items, name: str, index: int) -> Any:
    try:
        return items[index]
    except DamagedImageError:
        raise
    except Exception as error:
        raise ItemError(f"{name}[{index}]") from error


def _pair(what: str, item: Any) -> tuple[Any, Any]:
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise DatasetError(f"{what} is {described(item)}, needed is a pair of example and label")
    example, label = item
    if hasattr(label, "item"):
        if math.prod(getattr(label, "shape", ())) != 1:
            raise DatasetError(f"{what}: its label is {described(label)}, needed is one number or name: of one-hot labels return argmax(1)")
        label = label.item()
    return example, label


def _numbered(source: str, labels: dict[str, list[Any]], classes: tuple[str, ...] | None) -> tuple[dict[str, Labels], tuple[str, ...]]:
    """Return labels as indices of classes, and the names of the classes; without classes there are no labels, and all are 0."""
    if classes == ():
        return {name: np.zeros(len(labels.get(name, [])), np.int64) for name in ("train", "test")}, ()
    held = {
        name: checked_labels(f"{source}: labels of {name}", _as_labels(each), np.empty((len(each), 0))) for name, each in labels.items()
    }
    held.setdefault("test", held["train"][:0])
    if classes is None:
        *indices, names = class_indices(source, [f"labels of {name}" for name in held], held["train"], held["test"])
        return dict(zip(held, indices, strict=True)), names
    places = {name: place for place, name in enumerate(classes)}
    for name, each in held.items():
        if each.dtype.kind == "U":
            if unknown := sorted(set(each.tolist()) - places.keys()):
                raise DatasetError(f"{source}: {unknown[0]!r} is a label of {name}, and none of the classes {', '.join(classes)}")
            held[name] = np.array([places[label] for label in each.tolist()])
    return {name: each.astype(np.int64) for name, each in held.items()}, classes


def _as_labels(labels: list[Any]) -> Array:
    kinds = {type(label).__name__ for label in labels}
    # numpy would turn numbers beside texts into texts
    return np.array(labels, dtype=object) if "str" in kinds and len(kinds) > 1 else np.asarray(labels)


def _no_names(splits: dict[str, ItemSplit]) -> Names | None:
    """Return the names of no test examples, if those of training have names."""
    return None if splits["train"].ids is None else np.empty(0, np.bytes_)


def _write_columns(
    source: str,
    splits: dict[str, ItemSplit],
    examples: dict[str, ItemTexts | ItemFeatures],
    numbers: dict[str, Labels],
    classes: tuple[str, ...],
    features: tuple[str, ...] | None,
    target: Path,
) -> Path:
    """Write texts or features."""
    meta: dict[str, Any] = {"schema": 1, "kind": examples["train"].kind, "classes": list(classes)}
    meta["has_files"] = splits["train"].ids is not None
    if meta["kind"] == "features":
        count = examples["train"].shape[0]
        if features is not None and len(features) != count:
            raise DatasetError(f"{source}: {len(features)} names of features, and {count} features: name each of them")
        meta["features"] = list(features or map(str, range(count)))
    arrays: dict[str, Array] = {}
    for split in ("train", "test"):
        names = splits[split].names if split in splits else _no_names(splits)
        parts = {"labels": numbers[split]} | ({} if names is None else {"files": names})
        parts |= examples[split].arrays() if split in splits else examples["train"].no_arrays()
        arrays |= {f"{split}_{key}": array for key, array in parts.items()}
    return write_arrays(meta, arrays, target)
