"""Locks of the cache, for processes and machines that share it.

A lock is an empty file beside what it protects. The system releases the locks of a process that ends, however it ends. The files stay: one
that is removed while somebody waits for it would let two processes hold the lock.
"""

import fcntl
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from memtail.errors import DatasetError


class CacheLock:
    """A lock that several may share, or one may hold alone. It is released by `close`, and when the process ends.

    Args:
        path: of its file; the folder is made.

    Raises:
        OSError: the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # NFS requires reading for a shared lock, and writing for an exclusive one
        self._file = path.open("a+b")
        self._maps = 0

    def share(self) -> None:
        """Wait for the lock, and share it. Raises: OSError: the file system has no locks."""
        fcntl.flock(self._file, fcntl.LOCK_SH)

    def take(self, wait: bool = True) -> bool:
        """Hold the lock alone; return False if others hold it and `wait` is false. Raises: OSError: the file system has no locks."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Release the lock."""
        self._file.close()

    def hold_for(self, arrays: Iterable[np.memmap[Any, Any]]) -> None:
        """Release the lock when none of the arrays is mapped into memory any more, neither itself nor through a view."""
        for array in arrays:
            self._maps += 1
            weakref.finalize(array.base, self._unmapped)

    def _unmapped(self) -> None:
        self._maps -= 1
        if not self._maps:
            self.close()


def lock_of(folder: Path) -> Path:
    """Return the path of the lock of a dataset's folder, whether it is complete or not."""
    return folder.with_name(f".{folder.name}.lock")


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the lock of a dataset's folder alone. Raises: OSError: the lock cannot be made or taken."""
    lock = CacheLock(lock_of(folder))
    try:
        lock.take()
        yield
    finally:
        lock.close()


@contextmanager
def usable(folder: Path) -> Iterator[None]:
    """Explain errors of a folder of the cache.

    Raises:
        DatasetError: the folder cannot be written or locked.
    """
    try:
        yield
    except OSError as error:
        raise DatasetError(f"{folder} cannot be written ({error.strerror or error}): set MEMTAIL_CACHE to another folder") from None
