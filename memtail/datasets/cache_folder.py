"""The datasets in the cache: a folder each, named by the fingerprint, opened, filled and evicted under its lock.

Whoever has a dataset open shares its lock, for as long as one of its arrays is mapped into memory. Whoever fills or evicts it holds the
lock alone. No process on any machine that shares the cache evicts a dataset in use.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from memtail.datasets.cache_lock import CacheLock, lock_of
from memtail.datasets.dataset import DatasetLabels
from memtail.errors import DatasetError

T = TypeVar("T", bound=DatasetLabels)

_UNFINISHED = ".unfinished-"
# File of an unfinished dataset with the number of bytes that it will have.
_RESERVED = "reserved"
# Digits of a fingerprint; the names of unfinished preparations have fewer.
_DIGITS = 64
# Share of the space that is left free where no limit is set.
_RESERVE = 0.05
# A preparation writes more often than that.
_ABANDONED_AFTER_SECONDS = 24 * 3600


def is_complete(folder: Path) -> bool:
    """Return whether a dataset's folder is complete."""
    # NFS remembers for up to a minute that a name is there or not, unless the folder is listed
    return folder in folder.parent.iterdir() and (folder / "meta.json").exists()


def open_if_complete(open_folder: Callable[[Path], T], folder: Path) -> T | None:
    """Open a dataset, unless it is not there or not complete. While one of its arrays exists, it is not evicted.

    Raises:
        DatasetError: a file is missing or corrupt.
        OSError: the folder cannot be locked.
    """
    lock = CacheLock(lock_of(folder))
    try:
        lock.share()
        if not is_complete(folder):
            lock.close()
            return None
        os.utime(folder)
        dataset = open_folder(folder)
    except BaseException:
        lock.close()
        raise
    lock.hold_for(array for array in vars(dataset).values() if isinstance(array, np.memmap))
    return dataset


def note_use(dataset: DatasetLabels) -> None:
    """Note that an open dataset is still used: those used longest ago are evicted first."""
    with suppress(OSError):
        os.utime(dataset.folder)


def unfinished(folder: Path) -> Path:
    """Return the folder in which a dataset is filled, before it is renamed."""
    return folder.with_name(_UNFINISHED + folder.name)


def finish(folder: Path, files: set[str]) -> None:
    """Give a dataset that has been filled its name; other files are removed. Its lock must be held alone."""
    filled = unfinished(folder)
    for path in filled.iterdir():
        if path.name not in files:
            path.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    filled.rename(folder)


def reserve(folder: Path, size: int, limit: int | None) -> None:
    """Make room for a dataset that is about to be filled, and reserve it. The dataset's lock must be held alone.

    Datasets that nobody has open are evicted, those used longest ago first, and so are datasets that nobody continues to fill.

    Args:
        folder: of the dataset.
        size: bytes of the dataset.
        limit: bytes that all datasets beside it may take with it; None for the volume's space, less a reserve.

    Raises:
        DatasetError: the dataset is larger than the limit, or the datasets in use leave too little room. In the first case none is evicted.
        OSError: the cache cannot be written.
    """
    place, own = folder.parent, unfinished(folder)
    lock = CacheLock(place / ".room.lock")
    try:
        lock.take()
        entries = [entry for path in place.iterdir() if path.is_dir() for entry in _entries(path)]
        what = f"dataset {folder.name[:8]}..."
        if limit is None:
            limit = int((1 - _RESERVE) * (shutil.disk_usage(place).free + sum(entry.written for entry in entries)))
            if size > limit:
                raise DatasetError(
                    f"{what} has {size} bytes, and {place} has room for {limit}: free some space there, "
                    f"or set MEMTAIL_CACHE to another folder"
                )
        if size > limit:
            raise DatasetError(f"{what} has {size} bytes, more than the cache may hold: set MEMTAIL_CACHE_LIMIT to more than {limit} bytes")
        others = sorted((entry for entry in entries if entry.path != own), key=lambda entry: entry.used)
        excess = size + sum(entry.size for entry in others) - limit
        for entry in others:
            if excess > 0 and _evict(entry):
                excess -= entry.size
        if excess > 0:
            raise DatasetError(
                f"{what} has {size} bytes, {excess} more than are left in {place}, since the datasets there are in use: "
                f"end their users, or make the cache larger"
            )
        own.mkdir(exist_ok=True)
        (own / _RESERVED).write_text(str(size))
    finally:
        lock.close()


class _Entry(NamedTuple):
    """A folder of the cache: time of its last use, bytes on the disk, and bytes that it takes or will take."""

    path: Path
    used: float
    written: int
    size: int


def _entries(path: Path) -> Iterator[_Entry]:
    """Yield the entry of a folder, unless the folder has been renamed or removed meanwhile."""
    statuses, reserved = [], 0
    for file in path.rglob("*"):
        with suppress(FileNotFoundError):
            statuses.append(file.stat())
    with suppress(OSError, ValueError):
        reserved = int((path / _RESERVED).read_text())
    with suppress(FileNotFoundError):
        used = path.stat().st_mtime
        if _is_preparation(path):
            used = max([used, *(status.st_mtime for status in statuses)])
        written = sum(min(512 * status.st_blocks, status.st_size) for status in statuses)  # of a file in transfer less than its size
        yield _Entry(path, used, written, max(reserved, sum(status.st_size for status in statuses)))


def _is_preparation(path: Path) -> bool:
    return path.name.startswith(_UNFINISHED) and len(path.name) != len(_UNFINISHED) + _DIGITS


def _evict(entry: _Entry) -> bool:
    """Remove a dataset that nobody uses or fills; return whether it was removed."""
    if _is_preparation(entry.path) and time.time() - entry.used < _ABANDONED_AFTER_SECONDS:
        return False
    lock = CacheLock(lock_of(entry.path.with_name(entry.path.name.removeprefix(_UNFINISHED))))
    try:
        if not lock.take(wait=False) or not entry.path.exists():
            return False
        (entry.path / "meta.json").unlink(missing_ok=True)  # it is not complete any more
        shutil.rmtree(entry.path, ignore_errors=True)
        return True
    finally:
        lock.close()
