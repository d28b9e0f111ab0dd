"""Named datasets: found, prepared once into memory-mapped uint8 arrays, and opened from there.

`prepare(spec)` takes the `dataset` part of an experiment and gives an `ImageDataset`. Datasets are looked for in the spec's `root`,
then in `MEMTAIL_DATA`, then in `~/.cache/memtail`; prepared ones are kept under the latter (or `MEMTAIL_CACHE`), one folder each,
named by the fingerprint of its content.

`max_train` and `max_test` take the first so many examples of a dataset; of a folder, whose order is by class, evenly spaced ones.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from memtail.datasets.image_dataset import ImageDataset
from memtail.datasets.prepared import OnProgress, write_dataset
from memtail.datasets.sources import InMemoryDataset, arrays_file, digits, load_arrays, load_torchvision, torchvision_files
from memtail.errors import DatasetError
from memtail.settings import Settings
from memtail.spec import DatasetSpec

__all__ = ["ImageDataset", "prepare"]


def prepare(spec: DatasetSpec, on_progress: OnProgress | None = None) -> ImageDataset:
    """Find a dataset, prepare it if that has not been done, and open it.

    Safe to call from several processes at once: one prepares, the others wait. A preparation that was interrupted goes on where
    it was.

    Args:
        spec: the `dataset` part of an experiment.
        on_progress: called with (images done, images in all) while a folder is prepared.

    Raises:
        DatasetError: it is not there (says where it looked and how to get it), or is corrupt (says which file).
    """
    cache = Settings().cache
    try:
        return _prepare(spec, cache, on_progress)
    except OSError as error:
        raise DatasetError(
            f"dataset '{spec.name}' cannot be prepared: {error.filename or cache}: {error.strerror}: free some space there, or set "
            f"MEMTAIL_CACHE to a folder that you can write to"
        ) from error


def _prepare(spec: DatasetSpec, cache: Path, on_progress: OnProgress | None) -> ImageDataset:
    identity, make = _find(spec, cache, on_progress)
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    known = cache / "sources" / key
    known.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(known.with_suffix(".lock")):
        if known.exists():
            folder = cache / "datasets" / known.read_text()
            if (folder / "meta.json").exists():
                return ImageDataset.open(folder)
        folder = make()
        known.write_text(folder.name)
    return ImageDataset.open(folder)


def _find(spec: DatasetSpec, cache: Path, on_progress: OnProgress | None) -> tuple[list[Any], Callable[[], Path]]:
    """What identifies the source as it lies on the disk now, and how to make a prepared folder of it."""
    limits = [spec.max_train, spec.max_test]
    target = cache / "datasets"

    def write(dataset: InMemoryDataset) -> Path:
        return write_dataset(dataset.limited(spec.max_train, spec.max_test), target)

    if spec.name == "digits":
        return ["digits", limits], lambda: write(digits())
    if spec.name == "folder":
        assert spec.root is not None
        from memtail.datasets.folder import find_images, prepare_folder  # needs pillow, which a machine that prepares nothing may lack

        images = find_images(spec.root, spec.max_train, spec.max_test)
        return ["folder", images.identity(), spec.resolution], lambda: prepare_folder(images, spec.resolution, target, on_progress)
    if spec.name == "arrays":
        assert spec.root is not None
        path = arrays_file(spec.root)
        return ["arrays", _stamps([path]), limits], lambda: write(load_arrays(path))
    files = torchvision_files(spec.name, spec.root)
    return [spec.name, _stamps(files), limits], lambda: write(load_torchvision(spec.name, files))


def _stamps(paths: list[Path]) -> list[tuple[str, int, int]]:
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
