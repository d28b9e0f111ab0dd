"""Download of one file of a staged dataset, from one object or several, each verified and fetched again if it is damaged."""

from collections.abc import Callable, Sequence
from pathlib import Path
from shutil import copyfileobj
from typing import NamedTuple

from memtail.digests import stretch_digest
from memtail.storage import ObjectStore

# A damage on the way, or on this machine's disk, is not there a second time.
_DOWNLOADS = 2


class Piece(NamedTuple):
    """An object with consecutive bytes of a file: its key, number of bytes, and SHA-256 (hex)."""

    key: str
    size: int
    sha256: str


class DamagedFileError(Exception):
    """An object is damaged in the store. Its key is the first argument."""

    @property
    def key(self) -> str:
        """Key of the object."""
        return str(self.args[0])


def complete_file(store: ObjectStore, pieces: Sequence[Piece], path: Path, fetched: Callable[[Piece], None]) -> None:
    """Download a file; what an earlier call left is verified and kept.

    Args:
        store: the store.
        pieces: the file's objects, in order.
        path: of the file; its folder is made.
        fetched: is called for each object, also if it is on the disk already.

    Raises:
        DamagedFileError: an object is damaged.
        ObjectNotFound: an object is missing.
        StoreError: the store cannot be read.
        OSError: the file cannot be written.
    """
    if len(pieces) == 1:
        _fetch(store, pieces[0], path)
        fetched(pieces[0])
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    temporary = path.with_name(f"{path.name}.part")
    start = 0
    for piece in pieces:
        if stretch_digest(path, start, piece.size) != piece.sha256:
            _fetch(store, piece, temporary)
            with temporary.open("rb") as source, path.open("r+b") as file:
                file.seek(start)
                copyfileobj(source, file, 1 << 20)
            temporary.unlink()
        fetched(piece)
        start += piece.size
    with path.open("r+b") as file:
        file.truncate(start)


def _fetch(store: ObjectStore, piece: Piece, path: Path) -> None:
    """Download an object to a file, unless the file has its content."""
    for download in range(_DOWNLOADS + 1):
        if path.exists() and path.stat().st_size == piece.size and stretch_digest(path, 0, piece.size) == piece.sha256:
            return
        if download < _DOWNLOADS:
            store.download(piece.key, path)
    path.unlink()
    raise DamagedFileError(piece.key)
