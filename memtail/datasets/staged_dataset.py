"""Datasets, and the masks of explicit designs, in a store: put there once, and brought to a machine's cache by everyone who needs them.

A staged dataset is complete when its manifest is there, which is written last and names every file with its size and digest.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from memtail.datasets.image_dataset import ImageDataset
from memtail.errors import DatasetError, ForeignObjectError
from memtail.storage import ObjectNotFound, ObjectStore, keys

_MANIFEST = "manifest.json"
_MOST_MANIFEST_BYTES = 1 << 16


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    size: Annotated[int, Field(ge=0)]
    sha256: str


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    files: dict[Annotated[str, Field(pattern=r"^[a-z_]+\.(json|npy)$")], _File]


def stage(dataset: ImageDataset, store: ObjectStore) -> bool:
    """Put a prepared dataset into a store; False if it was there.

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
            files[path.name] = _File(size=path.stat().st_size, sha256=_digest(path))
    return store.put_if_absent(manifest_key, _Manifest(files=files).model_dump_json(indent=1).encode())


def fetch(store: ObjectStore, fingerprint: str, cache: Path, limit: int | None = None) -> ImageDataset:
    """Open a staged dataset, brought from the store into the folder `cache` if it is not there yet.

    Safe to call from several processes and machines that share the folder: one brings it, the others wait. If the cache would grow beyond
    `limit` bytes, the datasets that were opened longest ago leave it; whoever has them open may go on reading.

    Raises:
        DatasetError: it was not staged, is damaged in the store, or is larger than the cache may be; or the cache cannot be written.
        StoreError: the store cannot be read.
    """
    folder = cache / "datasets" / fingerprint
    with _alone_in(folder.parent):
        if not (folder / "meta.json").exists():
            _bring(store, fingerprint, folder, limit)
        os.utime(folder)
    return ImageDataset.open(folder)


def stage_masks(masks: Path, digest: str, store: ObjectStore) -> None:
    """Put the subsets of an explicit design into a store, unless they are there.

    Raises:
        StoreError: the store cannot be written.
    """
    if not store.exists(keys.masks(digest)):
        store.upload(keys.masks(digest), masks)


def fetch_masks(store: ObjectStore, digest: str, cache: Path) -> Path:
    """The file of an explicit design's subsets, brought from the store into the folder `cache` if it is not there yet.

    Raises:
        DatasetError: it was not staged, or is damaged in the store; or the cache cannot be written.
        StoreError: the store cannot be read.
    """
    key = keys.check(keys.masks(digest))
    path = cache / key
    with _alone_in(path.parent):
        if not path.exists():
            unfinished = path.with_suffix(".unfinished")
            try:
                store.download(key, unfinished)
            except ObjectNotFound:
                raise DatasetError(f"{key} is not in {store.address}: memtail submit SPEC puts it there") from None
            if _digest(unfinished) != digest:
                raise DatasetError(f"{key} in {store.address} is damaged: remove it, then memtail submit SPEC")
            unfinished.rename(path)
    return path


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """While it lasts, no other process is in the same folder of the cache."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            yield
    except OSError as error:
        raise DatasetError(f"{folder} cannot be written ({error.strerror or error}): set MEMTAIL_CACHE to another folder") from None


def _bring(store: ObjectStore, fingerprint: str, folder: Path, limit: int | None) -> None:
    try:
        data = store.get(keys.dataset(fingerprint, _MANIFEST), limit=_MOST_MANIFEST_BYTES)
        manifest = _Manifest.model_validate_json(data)
    except ObjectNotFound:
        raise DatasetError(f"dataset {fingerprint[:8]}... is not in {store.address}: memtail stage SPEC puts it there") from None
    except (ValidationError, ForeignObjectError):
        raise _damaged(store, fingerprint, "its manifest is damaged") from None
    size = sum(file.size for file in manifest.files.values())
    if limit is not None:
        _make_room(folder.parent, limit - size, f"dataset {fingerprint[:8]}... has {size} bytes")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unfinished-") as temporary:
        unfinished = Path(temporary) / fingerprint
        for name, file in manifest.files.items():
            try:
                store.download(keys.dataset(fingerprint, name), unfinished / name)
            except ObjectNotFound:
                raise _damaged(store, fingerprint, f"{name} is missing") from None
            if _digest(unfinished / name) != file.sha256:
                raise _damaged(store, fingerprint, f"{name} is damaged")
        try:
            found = ImageDataset.open(unfinished).fingerprint
        except (DatasetError, ValueError, KeyError, TypeError):
            raise _damaged(store, fingerprint, "its files make no dataset") from None
        if found != fingerprint:
            raise _damaged(store, fingerprint, f"it is {found[:8]}... in truth")
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)


def _damaged(store: ObjectStore, fingerprint: str, what: str) -> DatasetError:
    """A dataset is staged again only where it has no manifest."""
    manifest = keys.dataset(fingerprint, _MANIFEST)
    return DatasetError(f"dataset {fingerprint[:8]}... in {store.address}: {what}: remove {manifest} there, then memtail stage SPEC")


def _make_room(folder: Path, room: int, what: str) -> None:
    """Remove the datasets opened longest ago until those left take no more than `room` bytes."""
    if room < 0:
        raise DatasetError(f"{what}, more than the cache may hold: set MEMTAIL_CACHE_LIMIT to more")
    there = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    sizes = {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in there}
    taken = sum(sizes.values())
    for path in there:
        if taken <= room:
            return
        shutil.rmtree(path, ignore_errors=True)
        taken -= sizes[path]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
