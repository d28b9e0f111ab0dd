"""Prepared datasets in a store: staged once, and fetched into the cache of each machine that needs them.

A staged dataset is complete when its manifest exists: it is written last, and names every file with its size and digest.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from memtail.datasets.folder_lock import locked
from memtail.datasets.image_dataset import DatasetLabels, ImageDataset
from memtail.digests import file_digest
from memtail.errors import DatasetError, ForeignObjectError
from memtail.storage import ObjectNotFound, ObjectStore, keys

_MANIFEST = "manifest.json"
_WITHOUT_IMAGES = ("meta.json", "train_labels.npy", "test_labels.npy", "train_files.npy", "test_files.npy")
_MOST_MANIFEST_BYTES = 1 << 16


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    size: Annotated[int, Field(ge=0)]
    sha256: str


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    files: dict[Annotated[str, Field(pattern=r"^[a-z_]+\.(json|npy)$")], _File]


def stage(dataset: ImageDataset, store: ObjectStore) -> bool:
    """Upload a prepared dataset, unless the store has it.

    Args:
        dataset: the dataset.
        store: the store.

    Returns:
        Whether this call staged it.

    Raises:
        StoreError: the store cannot be written.
    """
    manifest_key = keys.dataset(dataset.fingerprint, _MANIFEST)
    if store.exists(manifest_key):
        return False
    files = {}
    for path in sorted(dataset.folder.iterdir()):
        if path.suffix in (".json", ".npy"):
            store.upload(keys.dataset(dataset.fingerprint, path.name), path)
            files[path.name] = _File(size=path.stat().st_size, sha256=file_digest(path))
    return store.put_if_absent(manifest_key, _Manifest(files=files).model_dump_json(indent=1).encode())


def fetch(store: ObjectStore, fingerprint: str, cache: Path, limit: int | None = None) -> ImageDataset:
    """Open a staged dataset, downloaded unless the cache has it.

    Safe to call from several processes and machines that share the cache: one downloads, the others wait. Where the cache would grow beyond
    `limit`, the datasets opened longest ago are removed; a process that has one open may continue to read it.

    Args:
        store: the store.
        fingerprint: of the dataset.
        cache: the folder of the cache.
        limit: bytes that staged and prepared datasets may take in the cache, None without a limit.

    Raises:
        DatasetError: the dataset is not staged, is damaged in the store, or is larger than `limit`; or the cache cannot be written.
        StoreError: the store cannot be read.
    """
    folder = cache / "datasets" / fingerprint
    with locked(folder.parent):
        if not (folder / "meta.json").exists():
            files = _staged_files(store, fingerprint)
            size = sum(file.size for file in files.values())
            if limit is not None:
                _evict(folder.parent, limit - size, f"dataset {fingerprint[:8]}... has {size} bytes")
            _download(store, fingerprint, files, folder, ImageDataset)
        os.utime(folder)
    return ImageDataset.open(folder)


def fetch_labels(store: ObjectStore, fingerprint: str, cache: Path) -> DatasetLabels:
    """Open the labels and names of a staged dataset, downloaded without the images unless the cache has them.

    They have a folder of the cache to themselves, so that nobody waits while the images of a dataset are downloaded. The cache's limit does
    not apply to them.

    Args:
        store: the store.
        fingerprint: of the dataset.
        cache: the folder of the cache.

    Raises:
        DatasetError: the dataset is not staged, or is damaged in the store; or the cache cannot be written.
        StoreError: the store cannot be read.
    """
    folder = cache / "labels" / fingerprint
    with locked(folder.parent):
        if not (folder / "meta.json").exists():
            files = {name: file for name, file in _staged_files(store, fingerprint).items() if name in _WITHOUT_IMAGES}
            _download(store, fingerprint, files, folder, DatasetLabels)
    return DatasetLabels.open(folder)


def _staged_files(store: ObjectStore, fingerprint: str) -> dict[str, _File]:
    try:
        data = store.get(keys.dataset(fingerprint, _MANIFEST), limit=_MOST_MANIFEST_BYTES)
        return dict(_Manifest.model_validate_json(data).files)
    except ObjectNotFound:
        raise DatasetError(f"dataset {fingerprint[:8]}... is not in {store.address}: memtail stage SPEC puts it there") from None
    except (ValidationError, ForeignObjectError):
        raise _damaged(store, fingerprint, "its manifest is damaged") from None


def _download(store: ObjectStore, fingerprint: str, files: dict[str, _File], folder: Path, kind: type[DatasetLabels]) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unfinished-") as temporary:
        unfinished = Path(temporary) / fingerprint
        for name, file in files.items():
            try:
                store.download(keys.dataset(fingerprint, name), unfinished / name)
            except ObjectNotFound:
                raise _damaged(store, fingerprint, f"{name} is missing") from None
            if file_digest(unfinished / name) != file.sha256:
                raise _damaged(store, fingerprint, f"{name} is damaged")
        try:
            actual = kind.open(unfinished).fingerprint
        except (DatasetError, ValueError, KeyError, TypeError):
            raise _damaged(store, fingerprint, "its files make no dataset") from None
        if actual != fingerprint:
            raise _damaged(store, fingerprint, f"its fingerprint is {actual[:8]}...")
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)


def _damaged(store: ObjectStore, fingerprint: str, fault: str) -> DatasetError:
    """Return an error whose fix removes the manifest, without which a dataset is staged again."""
    manifest = keys.dataset(fingerprint, _MANIFEST)
    return DatasetError(f"dataset {fingerprint[:8]}... in {store.address}: {fault}: remove {manifest} there, then memtail stage SPEC")


def _evict(folder: Path, room: int, what: str) -> None:
    """Remove the datasets opened longest ago until the rest takes no more than `room` bytes."""
    if room < 0:
        raise DatasetError(f"{what}, more than the cache may hold: set MEMTAIL_CACHE_LIMIT to more")
    cached = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    sizes = {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in cached}
    taken = sum(sizes.values())
    for path in cached:
        if taken <= room:
            return
        shutil.rmtree(path, ignore_errors=True)
        taken -= sizes[path]
