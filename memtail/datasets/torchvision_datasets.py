"""torchvision's classification datasets, read by their classes in `torchvision.datasets`.

A class that takes a `loader` of images only lists the files, which are decoded like those of a folder. Others give decoded images.
"""

import hashlib
import inspect
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from memtail.datasets.folder import prepare_folder
from memtail.datasets.image_tree import ImageFiles, ImageTree
from memtail.datasets.items import ItemError, Items, ItemSplit, write_items
from memtail.datasets.prepared import OnProgress, Prepare
from memtail.datasets.torchvision_table import ENTRIES, Entry
from memtail.errors import DatasetError
from memtail.settings import Settings
from memtail.spec import TorchvisionDataset

# Arguments of constructors that are not the user's to choose.
_OURS = {"self", "root", "train", "transform", "transforms", "target_transform", "download", "loader", "is_valid_file", "allow_empty"}
# Options that choose other labels than those that the attribute of the classes names.
_OTHER_LABELS = {"target_type", "target_types"}

# Attributes that name the classes.
_CLASSES = ("classes", "categories", "all_categories", "class_to_idx")


def torchvision_source(spec: TorchvisionDataset) -> tuple[list[Any], Prepare]:
    """Find a dataset, and download it if it is not there.

    Args:
        spec: the declaration.

    Returns:
        JSON values that change with the files and the options; and a function that writes the prepared dataset below a folder, and returns
        the dataset's folder.

    Raises:
        DatasetError: torchvision is not installed; the dataset has no such options; or it is missing and cannot be
            downloaded, or damaged.
        OSError: a file cannot be read.
    """
    entry, kind = ENTRIES[spec.torchvision], _imported(spec)
    _check(spec, entry, kind)
    root = _found(spec, entry, kind)
    options = spec.model_dump(mode="json").get("options", {})  # with dates as text
    identity = ["torchvision", spec.torchvision, options, spec.resolution, spec.orientation, spec.on_error]
    if entry.listed:
        tree = _tree(spec, entry, kind, root)
        return [*identity, tree.identity(), tree.declared()], partial(prepare_folder, tree, spec)
    files = sorted({file for pattern in entry.files for file in root.glob(pattern) if file.is_file()})
    digest = hashlib.sha256()
    for file in files:
        status = file.stat()
        digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return [*identity, digest.hexdigest(), spec.max_train, spec.max_test], partial(_prepare_items, spec, entry, kind, root)


def _imported(spec: TorchvisionDataset) -> Any:
    try:
        from torchvision import datasets
    except ImportError:
        raise DatasetError(f"dataset '{spec.name}' is read by torchvision, which is not installed: pip install 'memtail[train]'") from None
    if not hasattr(datasets, spec.torchvision):
        raise DatasetError(f"dataset '{spec.name}' is not in this version of torchvision: install a newer one")
    return getattr(datasets, spec.torchvision)


def _check(spec: TorchvisionDataset, entry: Entry, kind: Any) -> None:
    """Refuse options that do not fit."""
    parameters = _parameters(kind)
    if entry.listed and "loader" not in parameters:
        raise DatasetError(f"dataset '{spec.name}' needs torchvision 0.22 or newer, which lists its images: upgrade torchvision")
    known = {name: one.default is one.empty for name, one in parameters.items() if name not in _OURS}  # whether they are required
    names = ", ".join(known) or "none"
    if unknown := sorted(spec.options.keys() - known.keys()):
        raise DatasetError(f"dataset.options: torchvision's {spec.name} has no option '{unknown[0]}': known are {names}")
    if missing := [name for name, required in known.items() if required and name not in spec.options.keys() | entry.train.keys()]:
        raise DatasetError(f"dataset.options: torchvision's {spec.name} needs '{missing[0]}': set it in dataset.options")
    if not entry.listed and (spec.orientation, spec.on_error) != ("stored", "stop"):
        raise DatasetError(f"dataset '{spec.name}': torchvision decodes its images: remove dataset.orientation and dataset.on_error")


def _parameters(kind: Any) -> dict[str, inspect.Parameter]:
    """Return the parameters of a constructor, with those that it passes on as keywords."""
    found: dict[str, inspect.Parameter] = {}
    for each in kind.__mro__:
        own = inspect.signature(each.__init__).parameters if "__init__" in vars(each) else {}
        found = {**{name: one for name, one in own.items() if one.kind is not one.VAR_KEYWORD}, **found}
        if own and not any(one.kind is one.VAR_KEYWORD for one in own.values()):
            break
    return found


def _arguments(spec: TorchvisionDataset, entry: Entry, split: str) -> dict[str, Any]:
    if split == "train":
        return {**entry.train, **spec.options}
    return {**{name: value for name, value in spec.options.items() if name not in entry.train}, **(entry.test or {})}


def _splits(spec: TorchvisionDataset, entry: Entry) -> dict[str, int | None]:
    """Return the splits, and the number of images that are used of each."""
    return {"train": spec.max_train} if entry.test is None else {"train": spec.max_train, "test": spec.max_test}


def _found(spec: TorchvisionDataset, entry: Entry, kind: Any) -> Path:
    """Return the folder that holds the files, downloaded if no place has them."""
    settings = Settings()
    places = settings.places(spec.root)
    for place in places:
        if all(any(place.glob(pattern)) for pattern in entry.files):
            return place
    searched, download_to = ", ".join(map(str, places)), spec.root or settings.cache
    if entry.by_hand:
        raise DatasetError(
            f"dataset '{spec.name}' is not in {searched}, and torchvision cannot download it: put {entry.by_hand} into a folder, and set "
            f"dataset.root or MEMTAIL_DATA to it"
        )
    splits = [_arguments(spec, entry, split) for split in _splits(spec, entry)]
    try:
        for arguments in splits:
            kind(str(download_to), download=True, **arguments)
    except Exception as error:  # of networks, archives and arguments
        shown = (str(error).splitlines() or [type(error).__name__])[0]
        if spec.options and isinstance(error, TypeError | ValueError):
            raise DatasetError(f"dataset '{spec.name}': torchvision refuses dataset.options ({shown}): fix them") from None
        raise DatasetError(
            f"dataset '{spec.name}' is not in {searched}, and cannot be downloaded ({shown}): on a machine with a network run python -c "
            f"\"from torchvision.datasets import {spec.name}; [{spec.name}('DIR', download=True, **split) for split in {splits}]\", and "
            f"set dataset.root or MEMTAIL_DATA to DIR"
        ) from None
    return download_to


def _opened(spec: TorchvisionDataset, entry: Entry, kind: Any, root: Path, split: str, **more: Any) -> Any:
    fixed = {name: value for name, value in (("root", str(root)), ("download", False)) if name in _parameters(kind)}
    try:
        return kind(**fixed, **_arguments(spec, entry, split), **more)
    except Exception as error:  # torchvision checks little, and parsers of damaged files raise anything
        shown = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise DatasetError(
            f"dataset '{spec.name}' in {root}: torchvision cannot read its {split} split ({shown}): fix dataset.options, or complete or "
            f"replace its files"
        ) from None


def _classes(spec: TorchvisionDataset, dataset: Any) -> tuple[str, ...] | None:
    """Return the names of the classes, if torchvision has them."""
    names = next((getattr(dataset, name) for name in _CLASSES if hasattr(dataset, name)), None)
    if not names or spec.options.keys() & _OTHER_LABELS:
        return None
    return tuple(name if isinstance(name, str) else ", ".join(name) for name in names)


def _tree(spec: TorchvisionDataset, entry: Entry, kind: Any, root: Path) -> ImageTree:
    """List the image files of both splits."""
    splits, classes = {}, None
    for split, most in _splits(spec, entry).items():
        dataset = _opened(spec, entry, kind, root, split, loader=str)
        samples = [dataset[index] for index in range(len(dataset))]
        if entry.unordered:
            samples.sort()
        files = [path.removeprefix(f"{root}/") for path, _ in samples]
        splits[split] = ImageFiles(root, files, np.array([label for _, label in samples], np.int64)).limited(most)
        classes = classes or _classes(spec, dataset)
    count = max(int(split.labels.max(initial=-1)) for split in splits.values()) + 1
    nothing = ImageFiles(root, [], np.empty(0, np.int64))
    return ImageTree(root, list(classes or map(str, range(count))), splits["train"], splits.get("test", nothing))


class _Spaced:
    """Evenly spaced items of a dataset."""

    def __init__(self, items: Items, most: int | None) -> None:
        self._items, self._count = items, len(items) if most is None else min(most, len(items))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        return self._items[index * len(self._items) // self._count]


def _coloured(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def _prepare_items(
    spec: TorchvisionDataset, entry: Entry, kind: Any, root: Path, target: Path, unusable: Path, on_progress: OnProgress | None
) -> Path:
    """Write the images that torchvision decodes; `unusable` is not written, since all must be usable."""
    del unusable
    more = {"transform": _coloured} if entry.mixed else {}
    opened = {split: _opened(spec, entry, kind, root, split, **more) for split in _splits(spec, entry)}
    splits = {split: ItemSplit(_Spaced(opened[split], most)) for split, most in _splits(spec, entry).items()}
    try:
        return write_items(
            spec.name, splits, target, classes=_classes(spec, opened["train"]), resolution=spec.resolution, on_progress=on_progress
        )
    except ItemError as error:
        raise DatasetError(f"dataset '{spec.name}' in {root}: {error} cannot be read ({error.__cause__}): replace its file") from None
