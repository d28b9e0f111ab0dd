"""Named datasets: finds the source, prepares it once into memory-mapped arrays, and opens these.

`prepare(spec)` takes the `dataset` part of an experiment and returns a `Dataset`. Sources are searched in the spec's `root`, then in
`MEMTAIL_DATA`, then in the cache (`MEMTAIL_CACHE`, by default the user's cache folder), which also keeps the prepared datasets: a folder
each, named by the fingerprint of its content.

`max_train` and `max_test` take the first examples of a dataset; of a folder, whose order is by class, evenly spaced ones.

A further dataset is an entry in `_SOURCES`, and its name in `memtail.spec.DatasetSpec`.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import structlog
from filelock import FileLock

from memtail.datasets.arrays import ARRAYS_VERSION, arrays_file, load_arrays
from memtail.datasets.cache_folder import open_if_complete
from memtail.datasets.dataset import Dataset, DatasetLabels
from memtail.datasets.feature_dataset import FeatureDataset
from memtail.datasets.image_dataset import ImageDataset, as_images
from memtail.datasets.opening import open_dataset
from memtail.datasets.prepared import OnProgress, Prepare, write_dataset
from memtail.datasets.sources import InMemoryDataset, InMemoryFeatures, digits, shortened
from memtail.datasets.text_dataset import TextDataset
from memtail.datasets.torchvision_sources import TORCHVISION, load_torchvision, torchvision_files
from memtail.datasets.trainable import Trainable, as_trainable
from memtail.errors import DatasetError
from memtail.processes import end_if_imported
from memtail.settings import Settings
from memtail.spec import AnyDataset, DatasetSpec, FunctionDataset, HuggingFaceDataset, TableColumns, TorchvisionDataset

__all__ = [
    "Dataset",
    "DatasetLabels",
    "FeatureDataset",
    "ImageDataset",
    "TextDataset",
    "Trainable",
    "as_images",
    "as_trainable",
    "open_dataset",
    "prepare",
]

log = structlog.get_logger()


def prepare(spec: AnyDataset, on_progress: OnProgress | None = None) -> Dataset:
    """Find a dataset, prepare it unless it is prepared, and open it.

    Safe to call from several processes at once: one prepares, the others wait. An interrupted preparation of a folder is resumed.

    Args:
        spec: the `dataset` part of an experiment.
        on_progress: called with (images done, all images) while a folder is prepared.

    Raises:
        DatasetError: the dataset is missing (the message names the places searched and how to get it) or corrupt (it names the file).
        SpecError: the code of a function is missing.
    """
    end_if_imported()  # it would wait for the process that prepares
    cache = Settings().cache
    try:
        source = _source(spec)
    except OSError as error:
        raise _unreadable(spec, error) from None
    try:
        dataset = _prepare(source, cache, on_progress)
    except OSError as error:
        path = Path(str(error.filename or cache))
        if not (path.is_relative_to(cache) or cache.is_relative_to(path)):
            raise _unreadable(spec, error) from None
        raise DatasetError(
            f"dataset '{spec.name}' cannot be prepared: {path}: {error.strerror}: free some space there, or set "
            f"MEMTAIL_CACHE to a folder that you can write to"
        ) from error
    _warn_of_empty_classes(spec, dataset)
    return dataset


def _unreadable(spec: AnyDataset, error: OSError) -> DatasetError:
    return DatasetError(f"dataset '{spec.name}': {error.filename} cannot be read ({error.strerror}): make it readable, or remove it")


def _warn_of_empty_classes(spec: AnyDataset, dataset: DatasetLabels) -> None:
    empty = np.flatnonzero(np.bincount(dataset.train_labels, minlength=len(dataset.classes)) == 0)
    if len(empty):
        numbered = isinstance(spec, FunctionDataset) or spec.name == "arrays"
        hint = {"hint": "labels that begin at 1? subtract 1"} if numbered and empty[0] == 0 else {}
        names = shortened([dataset.classes[index] for index in empty])
        log.warning("classes without a training example", dataset=spec.name, number=len(empty), classes=names, **hint)


@dataclass(frozen=True)
class _Source:
    """A dataset as it is on the disk.

    Attributes:
        identity: JSON values that change with the files, and with every option that the prepared dataset depends on.
        prepare: writes the prepared dataset below a folder and returns the dataset's folder; its second argument is a file for a list of
            images that cannot be used.
    """

    identity: list[Any]
    prepare: Prepare


def _prepare(source: _Source, cache: Path, on_progress: OnProgress | None) -> Dataset:
    key = hashlib.sha256(json.dumps(source.identity, sort_keys=True).encode()).hexdigest()
    known = cache / "sources" / key
    known.parent.mkdir(parents=True, exist_ok=True)
    unusable = known.with_suffix(".unusable.txt")
    with FileLock(known.with_suffix(".lock")):
        while True:
            if known.exists() and (dataset := open_if_complete(open_dataset, cache / "datasets" / known.read_text())):
                if unusable.exists():
                    log.warning("damaged images left out", images=unusable.read_bytes().count(b"\n"), list=str(unusable))
                return dataset
            known.write_text(source.prepare(cache / "datasets", unusable, on_progress).name)


def _in_memory(spec: DatasetSpec, files: list[Path] | None, load: Callable[[], InMemoryDataset | InMemoryFeatures]) -> _Source:
    """Return a source that is loaded as a whole; `files` is None where no file of the user's is read."""

    def write(target: Path, unusable: Path, on_progress: OnProgress | None) -> Path:
        return write_dataset(load().limited(spec.max_train, spec.max_test), target)

    stamps = [] if files is None else [[(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]]
    return _Source([spec.name, *stamps, [spec.max_train, spec.max_test]], write)


def _digits(spec: DatasetSpec) -> _Source:
    return _in_memory(spec, None, digits)


def _arrays(spec: DatasetSpec) -> _Source:
    path = arrays_file(cast(Path, spec.root))  # required by the spec
    source = _in_memory(spec, [path], partial(load_arrays, path))
    return _Source([*source.identity, ARRAYS_VERSION], source.prepare)


def _torchvision(spec: DatasetSpec) -> _Source:
    files = torchvision_files(spec.name, spec.root)
    return _in_memory(spec, files, partial(load_torchvision, spec.name, files))


def _folder(spec: DatasetSpec) -> _Source:
    # needs pillow, which a machine that prepares nothing may lack
    from memtail.datasets.folder import prepare_folder
    from memtail.datasets.image_tree import find_images

    tree = find_images(cast(Path, spec.root), spec.max_train, spec.max_test)  # required by the spec
    if tree.left_out:
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(tree.left_out.items()))
        log.info("files left out that are no images", files=tree.left_out.total(), kinds=kinds)
    options = [option for option, default in ((spec.orientation, "stored"), (spec.on_error, "stop")) if option != default]
    return _Source(["folder", tree.identity(), spec.resolution, *options], partial(prepare_folder, tree, spec))


def _table(spec: DatasetSpec) -> _Source:
    # needs pyarrow and pillow, which a machine that prepares nothing may lack
    from memtail.datasets.folder import prepare_folder
    from memtail.datasets.table import Table, prepare_table, table_images

    table = Table(cast(Path, spec.root), spec.test, cast(TableColumns, spec.columns), spec.max_train, spec.max_test)  # required by the spec
    if table.columns.image is None:
        return _Source(["table", *table.identity()], partial(prepare_table, table))
    tree = table_images(table)
    options = [spec.resolution, spec.orientation, spec.on_error]
    return _Source(["table", *table.identity(), *tree.identity(), *options], partial(prepare_folder, tree, spec))


def _function(spec: FunctionDataset) -> _Source:
    # needs pillow, which a machine that prepares nothing may lack
    from memtail.datasets.function import function_identity, prepare_function

    return _Source(function_identity(spec), partial(prepare_function, spec))


def _torchvision_class(spec: TorchvisionDataset) -> _Source:
    from memtail.datasets.torchvision_datasets import torchvision_source

    return _Source(*torchvision_source(spec))


def _huggingface(spec: HuggingFaceDataset) -> _Source:
    # needs pillow, which a machine that prepares nothing may lack
    from memtail.datasets.huggingface import huggingface_source

    return _Source(*huggingface_source(spec))


def _opaque(spec: DatasetSpec) -> _Source:
    raise DatasetError(f"dataset '{spec.name}': its examples are known by their indices only, as memtail import declares it: name another")


def _source(spec: AnyDataset) -> _Source:
    if isinstance(spec, HuggingFaceDataset):
        return _huggingface(spec)
    if isinstance(spec, TorchvisionDataset):
        return _torchvision_class(spec)
    if isinstance(spec, FunctionDataset):
        return _function(spec)
    return _SOURCES[spec.name](spec)


_SOURCES: dict[str, Callable[[DatasetSpec], _Source]] = {
    "digits": _digits,
    "folder": _folder,
    "arrays": _arrays,
    "table": _table,
    "opaque": _opaque,
    **dict.fromkeys(TORCHVISION, _torchvision),
}
