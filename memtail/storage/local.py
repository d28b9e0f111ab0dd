"""An object store in a folder: one file per object, at the path its key spells."""

import errno
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from memtail.errors import ForeignObjectError, StoreError
from memtail.storage import ObjectNotFound, keys
from memtail.storage.atomic_file import atomic_file

_UNFINISHED = ".unfinished"
_ABANDONED_AFTER_SECONDS = 24 * 3600


class LocalStore:
    """`ObjectStore` on a local or shared file system with hard links.

    An object is written to a temporary file, flushed to the disk, and then linked or renamed to its name in one step. Files of
    writers that were killed stay in a hidden folder and are removed a day later.

    Raises:
        StoreError: the folder cannot be made or written.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()
        self._unfinished = self.root / _UNFINISHED

    def path(self, key: str) -> Path:
        """The file that holds (or would hold) an object.

        Raises:
            StoreError: the key leaves the folder.
        """
        return self.root.joinpath(*keys.check(key).split("/"))

    @property
    def address(self) -> str:
        """The folder's absolute path."""
        return str(self.root)

    def get(self, key: str, limit: int | None = None) -> bytes:
        with self._reading(key), self.path(key).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if limit is not None and size > limit:
                raise ForeignObjectError(f"store {self.root}: '{key}' has {size} bytes, more than the {limit} that are read: remove it")
            return file.read()

    def put(self, key: str, data: bytes) -> None:
        self._write(key, lambda file: file.write(data), replace=True)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        if self.path(key).exists():
            return False
        return self._write(key, lambda file: file.write(data), replace=False)

    def upload(self, key: str, path: Path) -> None:
        def copy(file: IO[bytes]) -> None:
            with path.open("rb") as source:
                shutil.copyfileobj(source, file, 1 << 20)

        self._write(key, copy, replace=True)

    def download(self, key: str, path: Path) -> None:
        with self._reading(key), self.path(key).open("rb") as source, atomic_file(path) as file:
            shutil.copyfileobj(source, file, 1 << 20)

    def list(self, prefix: str) -> Iterator[str]:
        folder = self.root / prefix.rpartition("/")[0]
        found = []
        for parent, folders, files in os.walk(folder, onerror=self._unreadable):
            if _UNFINISHED in folders:
                folders.remove(_UNFINISHED)
            found += [(Path(parent) / name).relative_to(self.root).as_posix() for name in files]
        yield from sorted(key for key in found if key.startswith(prefix))

    def folders(self, prefix: str) -> Iterator[str]:
        try:
            found = [entry.name for entry in os.scandir(self.root / prefix) if entry.is_dir(follow_symlinks=False)]
        except OSError as error:
            self._unreadable(error)
            return
        # one that all objects have left is no folder any more
        yield from (name for name in sorted(found) if name != _UNFINISHED and self._holds_a_file(self.root / prefix / name))

    def exists(self, key: str) -> bool:
        try:
            with self._reading(key):
                return stat.S_ISREG(self.path(key).stat().st_mode)
        except ObjectNotFound:
            return False

    def delete(self, key: str) -> None:
        try:
            self.path(key).unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"store {self.root}: '{key}' cannot be removed ({error.strerror})") from error

    def _write(self, key: str, fill: Callable[[IO[bytes]], object], *, replace: bool) -> bool:
        target = self.path(key)
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
                    if replace:
                        temporary.replace(target)
                    else:
                        target.hardlink_to(temporary)
                except FileExistsError:
                    return False
                finally:
                    temporary.unlink(missing_ok=True)
            _flush_folder(target.parent)
        except OSError as error:
            raise StoreError(f"store {self.root}: '{key}' cannot be written ({error.strerror}){_hint(error)}") from error
        return True

    def remove_abandoned(self) -> None:
        """Remove the temporary files of writers that were killed more than a day ago."""
        for file in self._unfinished.glob("*"):
            with suppress(FileNotFoundError):
                if time.time() - file.stat().st_mtime > _ABANDONED_AFTER_SECONDS:
                    file.unlink()

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


def _flush_folder(folder: Path) -> None:
    """Make a new name durable; not every system lets a folder be opened."""
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
