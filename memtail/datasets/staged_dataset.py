"""Prepared datasets in a store: staged once, and fetched into the cache of each machine that needs them.

A staged dataset is complete when its manifest exists: it is written last, and names every file with its size and digest. A file larger than
a part is staged as several objects, whose keys end with their digests: what has such a key and the size need not be uploaded again.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from memtail.datasets import cache_folder
from memtail.datasets.cache_lock import exclusive, usable
from memtail.datasets.dataset import Dataset, DatasetLabels
from memtail.datasets.opening import open_dataset
from memtail.datasets.staged_file import DamagedFileError, Piece, complete_file
from memtail.digests import file_digest, stretch_digest
from memtail.errors import DatasetError, ForeignObjectError
from memtail.storage import ObjectNotFound, ObjectStore, keys

#: Is called with (bytes on the disk, all bytes), when each object has been fetched.
OnBytes = Callable[[int, int], None]

T = TypeVar("T", bound=DatasetLabels)

#: Bytes of a part.
PART_BYTES = 1 << 30

_MANIFEST = "manifest.json"
_WITHOUT_EXAMPLES = ("meta.json", "train_labels.npy", "test_labels.npy", "train_files.npy", "test_files.npy")
# 8,000 parts take 1 MiB.
_MOST_MANIFEST_BYTES = 1 << 22


class _Object(BaseModel):
    model_config = ConfigDict(extra="forbid")

    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Parts(BaseModel):
    model_config = ConfigDict(extra="forbid")

    parts: list[_Object]


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    files: dict[Annotated[str, Field(pattern=r"^[a-z_]+\.(json|npy)$")], _Object | _Parts]


def stage(dataset: DatasetLabels, store: ObjectStore) -> bool:
    """Upload a prepared dataset, unless the store has it. A staging that was interrupted is continued.

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
    held = {each.key: each.bytes for each in store.inventory(keys.dataset(dataset.fingerprint, ""))}
    files: dict[str, _Object | _Parts] = {}
    for path in sorted(dataset.folder.iterdir()):
        if path.suffix not in (".json", ".npy"):
            continue
        size = path.stat().st_size
        if size > PART_BYTES:
            files[path.name] = _stage_parts(store, dataset.fingerprint, path, size, held)
        else:
            store.upload(keys.dataset(dataset.fingerprint, path.name), path)
            files[path.name] = _Object(size=size, sha256=file_digest(path))
    return store.put_if_absent(manifest_key, _Manifest(files=files).model_dump_json(indent=1).encode())


def _stage_parts(store: ObjectStore, fingerprint: str, path: Path, size: int, held: dict[str, int]) -> _Parts:
    """Upload the parts of a file that the store does not hold, by the sizes of the objects that it holds."""
    parts = []
    for start in range(0, size, PART_BYTES):
        length = min(PART_BYTES, size - start)
        part = _Object(size=length, sha256=stretch_digest(path, start, length))
        key = keys.dataset_part(fingerprint, path.name, part.sha256)
        if held.get(key) != length:
            store.upload(key, path, start, length)
        parts.append(part)
    return _Parts(parts=parts)


def fetch(store: ObjectStore, fingerprint: str, cache: Path, limit: int | None = None, on_progress: OnBytes | None = None) -> Dataset:
    """Open a staged dataset, downloaded unless the cache has it. It is not evicted while one of its arrays exists.

    Safe to call from several processes and machines that share the cache: one downloads, those that need the same dataset wait. A download
    that was interrupted is continued. Where the cache would grow beyond `limit`, datasets that nobody has open are removed, those used
    longest ago first.

    Args:
        store: the store.
        fingerprint: of the dataset.
        cache: the folder of the cache.
        limit: bytes that staged and prepared datasets may take in the cache; None for what its volume has room for.
        on_progress: is called during the download. What it raises interrupts the download.

    Raises:
        DatasetError: the dataset is not staged, is damaged in the store, or finds no room in the cache; or the cache cannot be written.
        StoreError: the store cannot be read.
    """
    folder = cache / "datasets" / fingerprint

    def fill() -> None:
        files = _staged_files(store, fingerprint)
        cache_folder.reserve(folder, sum(piece.size for pieces in files.values() for piece in pieces), limit)
        _download(store, fingerprint, files, folder, open_dataset, on_progress)

    return _opened(open_dataset, folder, fill)


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

    def fill() -> None:
        files = {name: pieces for name, pieces in _staged_files(store, fingerprint).items() if name in _WITHOUT_EXAMPLES}
        _download(store, fingerprint, files, folder, DatasetLabels.open, None)

    return _opened(DatasetLabels.open, folder, fill)


def _opened(open_folder: Callable[[Path], T], folder: Path, fill: Callable[[], None]) -> T:
    with usable(folder.parent):
        while (dataset := cache_folder.open_if_complete(open_folder, folder)) is None:
            with exclusive(folder):
                if not cache_folder.is_complete(folder):  # another process may have filled it meanwhile
                    fill()
        return dataset


def _staged_files(store: ObjectStore, fingerprint: str) -> dict[str, list[Piece]]:
    """Read the manifest; return the objects of each file in order."""
    try:
        data = store.get(keys.dataset(fingerprint, _MANIFEST), limit=_MOST_MANIFEST_BYTES)
        files = _Manifest.model_validate_json(data).files
    except ObjectNotFound:
        raise DatasetError(f"dataset {fingerprint[:8]}... is not in {store.address}: memtail stage SPEC puts it there") from None
    except (ValidationError, ForeignObjectError):
        raise _damaged(store, fingerprint, "its manifest is damaged") from None
    return {
        name: [Piece(keys.dataset_part(fingerprint, name, part.sha256), part.size, part.sha256) for part in file.parts]
        if isinstance(file, _Parts)
        else [Piece(keys.dataset(fingerprint, name), file.size, file.sha256)]
        for name, file in files.items()
    }


def _download(
    store: ObjectStore,
    fingerprint: str,
    files: dict[str, list[Piece]],
    folder: Path,
    open_folder: Callable[[Path], DatasetLabels],
    on_progress: OnBytes | None,
) -> None:
    filled = cache_folder.unfinished(folder)
    done, size = 0, sum(piece.size for pieces in files.values() for piece in pieces)

    def fetched(piece: Piece) -> None:
        nonlocal done
        done += piece.size
        if on_progress:
            on_progress(done, size)

    for name, pieces in files.items():
        try:
            complete_file(store, pieces, filled / name, fetched)
        except ObjectNotFound:
            raise _damaged(store, fingerprint, f"{name} is missing") from None
        except DamagedFileError as error:
            # the key of a part holds its digest, so a part that is not removed would not be staged again
            raise _damaged(store, fingerprint, f"{name} is damaged", "" if len(pieces) == 1 else f"{error.key} and ") from None
    try:
        actual = open_folder(filled).fingerprint
    except (DatasetError, ValueError, KeyError, TypeError):
        raise _damaged(store, fingerprint, "its files make no dataset") from None
    if actual != fingerprint:
        raise _damaged(store, fingerprint, f"its fingerprint is {actual[:8]}...")
    cache_folder.finish(folder, set(files))


def _damaged(store: ObjectStore, fingerprint: str, fault: str, also: str = "") -> DatasetError:
    """Return an error whose fix removes the manifest, without which a dataset is staged again."""
    manifest = keys.dataset(fingerprint, _MANIFEST)
    return DatasetError(f"dataset {fingerprint[:8]}... in {store.address}: {fault}: remove {also}{manifest} there, then memtail stage SPEC")
