"""Reads of objects in parts, several at a time. A lost connection costs nothing, a killed process the parts in transfer.

Each part is a ranged request with the object's ETag, so that a replaced object is never mixed with its successor. A part continues at the
byte that it reached. A large download keeps a partial file beside its target, and a journal with number and CRC-32 of each finished part; a
later download of the same object to the same path checks these parts in the file and fetches the others.
"""

import io
import json
import threading
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, TypeVar

from filelock import FileLock, Timeout
from minio.error import InvalidResponseError, MinioException
from urllib3.exceptions import IncompleteRead

from memtail.errors import ForeignObjectError, LocalFileError, StoreError
from memtail.storage.atomic_file import atomic_file
from memtail.storage.s3_client import Client, Connection, etag, in_parallel
from memtail.storage.s3_errors import status_of

T = TypeVar("T")

# What a lost connection costs at most, since a block is received whole or not at all.
_BLOCK = 1 << 18
_MOST_REPLACEMENTS = 5


class _ReplacedError(Exception):
    """The object is no longer the one whose first part was read."""


class _Stretch:
    """Consecutive bytes of an object, read by one request, or by several where connections are lost.

    Args:
        name: of the object.
        limit: bytes of the stretch. Without a tag, bytes of the largest object that is read; of a larger one only size and ETag are.
        write: takes an offset and the bytes from there on.
        start: offset of the first byte.
        tag: ETag that the object must have.

    Attributes:
        size: bytes of the object, once it has been read without a tag.
    """

    def __init__(self, name: str, limit: int, write: Callable[[int, bytes], object], start: int = 0, tag: str = "") -> None:
        self._name, self._limit, self._write, self.tag = name, limit, write, tag
        self._position, self._asked, self._end = start, start, start + limit
        self.size = 0

    def read(self, connection: Connection) -> int:
        """Read on from the last position; return the bytes of this request."""
        began = self._position
        if began == self._end:
            return 0
        headers = {"If-Match": f'"{self.tag}"', "Range": f"bytes={began}-{self._end - 1}"} if self.tag else {}
        try:
            with connection.opened(self._name, headers) as response:
                if not self.tag:
                    self.size, self.tag = int(response.headers["Content-Length"]), etag(response)
                    self._end = self.size
                    if self.size > self._limit:
                        return 0
                elif etag(response) != self.tag:
                    raise _ReplacedError
                elif response.status != 206:
                    raise InvalidResponseError(response.status, None, None)
                for block in response.stream(_BLOCK, decode_content=False):
                    self._write(self._position, block)
                    self._position += len(block)
                if self._position != self._end:  # HTTP allows to send less than was asked for
                    raise IncompleteRead(self._position - began, self._end - self._position)
        except MinioException as error:
            if headers and status_of(error) in (404, 412, 416):
                raise _ReplacedError from None
            raise
        return self._position - began

    def progressed(self) -> bool:
        """Return whether the position has changed since the last call."""
        before, self._asked = self._asked, self._position
        return self._position > before


class Reader:
    """Reads objects of a bucket.

    Args:
        client: of the bucket.
        part_size: bytes of a part; smaller objects are read by one request.
    """

    def __init__(self, client: Client, part_size: int) -> None:
        self._client, self._part_size = client, part_size

    def get(self, key: str, name: str, limit: int | None) -> tuple[bytes, str]:
        """Return an object's bytes and ETag. `limit`: bytes of the largest object that is read."""

        def read() -> tuple[bytes, str]:
            buffer = io.BytesIO()
            size, tag = self._start(key, name, buffer)
            if limit is not None and size > limit:
                raise ForeignObjectError(
                    f"store {self._client.address}: '{key}' has {size} bytes, more than the {limit} that are read: remove it"
                )
            if size > self._part_size:
                self._read_parts(key, name, size, tag, buffer, range(-(-size // self._part_size)))
            return buffer.getvalue(), tag

        return self._until_not_replaced(key, read)

    def download(self, key: str, name: str, path: Path) -> None:
        """Write an object to a file, which appears whole or not at all."""

        def read() -> None:
            buffer = io.BytesIO()
            size, tag = self._start(key, name, buffer)
            if size <= self._part_size:
                with atomic_file(path) as file:
                    file.write(buffer.getvalue())
                return
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                lock = path.with_name(f".{path.name}.lock")  # not the journal: a lock may empty or remove its file
                with FileLock(lock, timeout=0):
                    self._download_parts(key, name, size, tag, path)
                    lock.unlink()
            except Timeout:  # another process or thread downloads it to this path
                with atomic_file(path) as file:
                    self._read_parts(key, name, size, tag, file, range(-(-size // self._part_size)))
            except OSError as error:
                raise LocalFileError(f"{path} cannot be written ({error.strerror or error}): choose another folder") from error

        self._until_not_replaced(key, read)

    def _start(self, key: str, name: str, buffer: IO[bytes]) -> tuple[int, str]:
        """Return size and ETag of an object; its content is in the buffer if it is no larger than a part."""
        stretch = _Stretch(name, self._part_size, lambda _, block: buffer.write(block))
        self._client.run(key, "read", stretch.read, lambda size: ("ok", size), stretch.progressed)
        return stretch.size, stretch.tag

    def _read_parts(
        self,
        key: str,
        name: str,
        size: int,
        tag: str,
        file: IO[bytes],
        parts: Iterable[int],
        finished: Callable[[int, int], object] = lambda part, crc: None,
    ) -> None:
        """Write parts of an object to their places in a file; call `finished` with number and CRC-32 of each, one at a time."""
        lock = threading.Lock()

        def read(part: int) -> None:
            crc = 0

            def write(offset: int, block: bytes) -> None:
                nonlocal crc
                crc = zlib.crc32(block, crc)
                with lock:
                    file.seek(offset)
                    file.write(block)

            start = part * self._part_size
            stretch = _Stretch(name, min(self._part_size, size - start), write, start, tag)
            self._client.run(key, "read", stretch.read, lambda size: ("ok", size), stretch.progressed)
            with lock:
                file.flush()
                finished(part, crc)

        in_parallel(read, parts)

    def _download_parts(self, key: str, name: str, size: int, tag: str, path: Path) -> None:
        partial, journal = (path.with_name(f".{path.name}.{kind}") for kind in ("partial", "journal"))
        header = json.dumps({"object": f"{self._client.address}/{key}", "tag": tag, "size": size, "part": self._part_size})
        done = self._verified(partial, journal, header)
        with partial.open("r+b" if done else "wb") as file, journal.open("a" if done else "w") as lines:
            if not done:
                lines.write(f"{header}\n")

            def finished(part: int, crc: int) -> None:
                lines.write(f"{part} {crc}\n")
                lines.flush()

            missing = [part for part in range(-(-size // self._part_size)) if part not in done]
            self._read_parts(key, name, size, tag, file, missing, finished)
        partial.chmod(0o644)
        partial.replace(path)
        journal.unlink()

    def _verified(self, partial: Path, journal: Path, header: str) -> set[int]:
        """Return the finished parts of an earlier download of the same object, without those that are damaged in the file."""
        with suppress(FileNotFoundError, ValueError):
            first, *lines = journal.read_text().splitlines()
            if first == header:
                numbers = [[int(number) for number in line.split()] for line in lines]
                with partial.open("rb") as file:
                    return {part for part, crc in numbers if zlib.crc32(_read_at(file, part * self._part_size, self._part_size)) == crc}
        return set()

    def _until_not_replaced(self, key: str, read: Callable[[], T]) -> T:
        for _ in range(_MOST_REPLACEMENTS):
            with suppress(_ReplacedError):
                return read()
        raise StoreError(f"store {self._client.address}: '{key}' is replaced again and again while it is read: end its other writer")


def _read_at(file: IO[bytes], offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length)
