"""Object store in a folder: one file per object, whose path is its key."""

import errno
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO

from filelock import FileLock

from memtail.errors import ForeignObjectError, StoreError
from memtail.storage import ObjectNotFound, Stored, keys
from memtail.storage.atomic_file import atomic_file

#: Folder of a store with the temporary files of its writers.
UNFINISHED = ".unfinished"
_LOCK = ".lock"
_ABANDONED_AFTER_SECONDS = 24 * 3600


class LocalStore:
    """`ObjectStore` on a local or shared file system with hard links.

    An object is written to a temporary file, flushed to the disk, and then linked or renamed to its name in one step. Temporary files of
    writers that were killed stay in a hidden folder until `sweep` removes them a day later. A tag is the file's time of writing, size and
    inode; under a lock its comparison and the replacement are one step.

    Args:
        root: the folder; it is made by the first write.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()
        self._unfinished = self.root / UNFINISHED

    def local_path(self, key: str) -> Path:
        """Return the path of an object's file, whether it exists or not."""
        return self.root.joinpath(*keys.check(key).split("/"))

    @property
    def address(self) -> str:
        """Absolute path of the folder."""
        return str(self.root)

    def get(self, key: str, limit: int | None = None) -> bytes:
        """Return an object's bytes."""
        return self.get_tagged(key, limit)[0]

    def get_tagged(self, key: str, limit: int | None = None) -> tuple[bytes, str]:
        """Return an object's bytes and their tag."""
        with self._reading(key), self.local_path(key).open("rb") as file:
            status = os.fstat(file.fileno())
            if limit is not None and status.st_size > limit:
                raise ForeignObjectError(
                    f"store {self.root}: '{key}' has {status.st_size} bytes, more than the {limit} that are read: remove it"
                )
            return file.read(), _tag(status)

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """Return consecutive bytes of an object."""
        with self._reading(key), self.local_path(key).open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def put(self, key: str, data: bytes) -> None:
        """Write or replace an object by a rename."""
        self._write(key, lambda file: file.write(data), self._replace)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write an object by a hard link, which fails if the key exists."""
        if self.local_path(key).exists():
            return False
        return self._write(key, lambda file: file.write(data), _link)

    def put_if_match(self, key: str, data: bytes, tag: str) -> bool:
        """Replace an object by a rename, if its file still has a tag."""

        def replace_match(temporary: Path, target: Path) -> bool:
            with self._lock():
                if not target.is_file() or _tag(target.stat()) != tag:
                    return False
                temporary.replace(target)
                return True

        return self._write(key, lambda file: file.write(data), replace_match)

    def upload(self, key: str, path: Path, start: int = 0, length: int | None = None) -> None:
        """Write or replace an object with the content of a file, or a part of it."""

        def copy(file: IO[bytes]) -> None:
            with path.open("rb") as source:
                left = os.fstat(source.fileno()).st_size - start if length is None else length
                source.seek(start)
                while left > 0 and (block := source.read(min(left, 1 << 20))):
                    file.write(block)
                    left -= len(block)

        self._write(key, copy, self._replace)

    def download(self, key: str, path: Path) -> None:
        """Write an object to a file."""
        with self._reading(key), self.local_path(key).open("rb") as source, atomic_file(path) as file:
            shutil.copyfileobj(source, file, 1 << 20)

    def list(self, prefix: str) -> Iterator[str]:
        """Yield the keys that start with a prefix, from a walk of its folder."""
        folder = self.root / prefix.rpartition("/")[0]
        names = []
        for parent, folders, files in os.walk(folder, onerror=self._unreadable):
            if UNFINISHED in folders:
                folders.remove(UNFINISHED)
            names += [(Path(parent) / name).relative_to(self.root).as_posix() for name in files]
        yield from sorted(key for key in names if key.startswith(prefix))

    def list_tagged(self, prefix: str) -> Iterator[tuple[str, str]]:
        """Yield the keys that start with a prefix with the tags of their files."""
        return ((key, _tag(status)) for key, status in self._statuses(prefix))

    def inventory(self, prefix: str) -> Iterator[Stored]:
        """Yield the objects whose keys start with a prefix."""
        return (Stored(key, status.st_size, status.st_mtime) for key, status in self._statuses(prefix))

    def _statuses(self, prefix: str) -> Iterator[tuple[str, os.stat_result]]:
        for key in self.list(prefix):
            try:
                yield key, (self.root / key).stat()
            except FileNotFoundError:  # deleted since
                continue
            except OSError as error:
                self._unreadable(error)

    def folders(self, prefix: str) -> Iterator[str]:
        """Yield the names of the folders directly below a prefix that hold an object."""
        try:
            names = [entry.name for entry in os.scandir(self.root / prefix) if entry.is_dir(follow_symlinks=False)]
        except OSError as error:
            self._unreadable(error)
            return
        # `delete` leaves empty folders
        yield from (name for name in sorted(names) if name != UNFINISHED and self._holds_a_file(self.root / prefix / name))

    def exists(self, key: str) -> bool:
        """Return whether a file has the key."""
        try:
            with self._reading(key):
                return stat.S_ISREG(self.local_path(key).stat().st_mode)
        except ObjectNotFound:
            return False

    def delete(self, key: str) -> None:
        """Remove an object, if it exists."""
        path = self.local_path(key)
        try:
            with suppress(FileNotFoundError):
                path.lstat()
                with self._lock():
                    path.unlink()
        except OSError as error:
            raise StoreError(f"store {self.root}: '{key}' cannot be removed ({error.strerror})") from error

    def _write(self, key: str, fill: Callable[[IO[bytes]], object], place: Callable[[Path, Path], bool]) -> bool:
        target = self.local_path(key)
        try:
            self._unfinished.mkdir(parents=True, exist_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._unfinished, delete=False) as file:
                temporary = Path(file.name)
                try:
                    fill(file)
                    file.flush()
                    os.fsync(file.fileno())
                    temporary.chmod(0o644)
                    # the system's own times advance in steps of milliseconds, within which two files could have one tag
                    os.utime(temporary, ns=(time.time_ns(), time.time_ns()))
                    if not place(temporary, target):
                        return False
                finally:
                    temporary.unlink(missing_ok=True)
            _flush_folder(target.parent)
        except OSError as error:
            raise StoreError(f"store {self.root}: '{key}' cannot be written ({error.strerror}){_hint(error)}") from error
        return True

    def _replace(self, temporary: Path, target: Path) -> bool:
        with self._lock():
            temporary.replace(target)
        return True

    def _lock(self) -> AbstractContextManager[object]:
        """Take the lock under which files are replaced, removed, and compared with a tag."""
        self._unfinished.mkdir(parents=True, exist_ok=True)
        return FileLock(self._unfinished / _LOCK).acquire(poll_interval=0.002)

    def sweep(self) -> None:
        """Remove temporary files that were last written more than a day ago."""
        try:
            for file in self._unfinished.glob("*"):
                if file.name == _LOCK:  # a second lock file would let two processes hold the lock
                    continue
                with suppress(FileNotFoundError):
                    if time.time() - file.stat().st_mtime > _ABANDONED_AFTER_SECONDS:
                        file.unlink()
        except OSError as error:
            raise StoreError(f"store {self.root}: {error.filename} cannot be removed ({error.strerror})") from error

    def _holds_a_file(self, folder: Path) -> bool:
        return any(files for _, _, files in os.walk(folder, onerror=self._unreadable))

    def _unreadable(self, error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise StoreError(f"store {self.root}: {error.filename} cannot be listed ({error.strerror})") from error

    @contextmanager
    def _reading(self, key: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise ObjectNotFound(f"store {self.root}: there is no '{key}'") from None
        except OSError as error:
            raise StoreError(f"store {self.root}: '{key}' cannot be read ({error.strerror})") from error


def _tag(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns}-{status.st_size}-{status.st_ino}"


def _link(temporary: Path, target: Path) -> bool:
    try:
        target.hardlink_to(temporary)
    except FileExistsError:
        return False
    return True


def _flush_folder(folder: Path) -> None:
    """Make a new name durable, where the system lets a folder be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hint(error: OSError) -> str:
    if error.errno in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
        return ": the file system must support hard links"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ": free some space, then run again; nothing committed is lost"
    return ": choose a folder that you can write to with --store"
