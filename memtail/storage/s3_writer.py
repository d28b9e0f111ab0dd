"""Writes of objects in parts, several at a time, each retried by itself and sent with its MD5, which the server verifies.

An upload that was cut off stays at the server. A later upload of the same key finds it, and sends the parts that the server does not have
by their ETags. Servers remove forgotten uploads by a lifecycle rule, MinIO after a day.
"""

import base64
import hashlib
import io
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement, fromstring, tostring

from minio.datatypes import CompleteMultipartUploadResult, ListPartsResult
from minio.error import S3Error
from minio.xml import findtext

from memtail.errors import StoreError
from memtail.storage import ObjectNotFound, UnreachableError
from memtail.storage.s3_client import Client, Connection, etag, in_parallel
from memtail.storage.s3_errors import error_in

_MOST_PARTS = 10_000
_CONTENT = {"Content-Type": "application/octet-stream"}
# Errors about an upload that another process completed, changed or aborted.
_LOST_UPLOAD = {"NoSuchUpload", "InvalidPart", "InvalidPartOrder", "EntityTooSmall"}


class _LostUploadError(Exception):
    """The server no longer has the upload, or not with these parts."""


class Writer:
    """Writes objects of a bucket.

    Args:
        client: of the bucket.
        part_size: bytes of a part, at least 5 MiB; smaller objects are written by one request.
    """

    def __init__(self, client: Client, part_size: int) -> None:
        self._client, self._part_size = client, part_size

    def put(self, key: str, name: str, data: bytes) -> None:
        """Write or replace an object."""
        self._write(key, name, lambda start, length: data[start : start + length], len(data))

    def upload(self, key: str, name: str, path: Path, start: int, length: int | None) -> None:
        """Write or replace an object with bytes of a file, which must not change meanwhile; all from `start` on without a length."""
        try:
            with path.open("rb") as file:
                before, lock = os.fstat(file.fileno()), threading.Lock()

                def read(offset: int, count: int) -> bytes:
                    with lock:
                        file.seek(start + offset)
                        data = file.read(count)
                    after = os.fstat(file.fileno())
                    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                        raise StoreError(f"store {self._client.address}: '{key}' cannot be written: {path} has changed: upload it again")
                    return data

                self._write(key, name, read, before.st_size - start if length is None else length)
        except OSError as error:
            raise StoreError(f"store {self._client.address}: '{key}' cannot be written ({path}: {error.strerror or error})") from error

    def _write(self, key: str, name: str, read: Callable[[int, int], bytes], size: int) -> None:
        part_size = max(self._part_size, -(-size // _MOST_PARTS))
        if size <= part_size:
            data = read(0, size)
            self._client.run(key, "written", partial(self._put, name=name, data=data), lambda _: ("ok", size))
            return
        upload = _Upload(self._client, key, name, [(start, min(part_size, size - start)) for start in range(0, size, part_size)], read)
        with suppress(_LostUploadError):
            return upload.send(*upload.find())
        if not upload.is_complete():
            try:
                upload.send(None, {})
            except _LostUploadError:
                raise UnreachableError(
                    f"store {self._client.address}: '{key}' cannot be written (its upload was ended from elsewhere, twice): "
                    f"end its other writer"
                ) from None

    def _put(self, connection: Connection, *, name: str, data: bytes) -> None:
        connection.s3.put_object(
            bucket_name=connection.bucket, object_name=name, data=io.BytesIO(data), length=len(data), part_size=max(len(data), 5 << 20)
        )


class _Upload:
    """One object on its way to the server.

    Args:
        client: of the bucket.
        key: of the object.
        name: of the object in the bucket.
        parts: start and length of each.
        read: returns bytes by start and length.
    """

    def __init__(self, client: Client, key: str, name: str, parts: list[tuple[int, int]], read: Callable[[int, int], bytes]) -> None:
        self._client, self._key, self._name, self._parts, self._read = client, key, name, parts, read

    def find(self) -> tuple[str | None, Mapping[int, str]]:
        """Return the identifier of the newest upload of the key that was cut off, if there is one, and the ETags of its parts by number."""

        def newest(connection: Connection) -> str | None:
            # minio-py has no public method for this
            uploads = connection.s3._list_multipart_uploads(bucket_name=connection.bucket, prefix=self._name).uploads
            own = [(upload.initiated_time, upload.upload_id) for upload in uploads if upload.object_name == self._name]
            return max(own)[1] if own else None

        try:
            identifier = self._client.run(self._key, "listed", newest)
            return identifier, self._client.run(self._key, "listed", partial(self._held, identifier=identifier)) if identifier else {}
        except UnreachableError:
            raise
        except StoreError:  # the key must not, or the server does not, list uploads
            return None, {}

    def send(self, identifier: str | None, held: Mapping[int, str]) -> None:
        """Send the parts that the server does not have, and put them together.

        Args:
            identifier: of the upload that is continued; None begins one.
            held: ETags of its parts, by number.

        Raises:
            _LostUploadError: the server no longer has the upload, or has other parts.
            StoreError: the server refuses; the upload has been aborted.
        """
        identifier = identifier or self._client.run(self._key, "written", self._begin)
        tags = dict[int, str]()

        def send(part: int) -> None:
            data = self._read(*self._parts[part])
            digest = hashlib.md5(data, usedforsecurity=False)
            if held.get(part + 1) == digest.hexdigest():
                tags[part + 1] = digest.hexdigest()
                return
            seen = len(tags)

            def progressed() -> bool:
                nonlocal seen
                before, seen = seen, len(tags)
                return seen > before

            put = partial(self._put_part, identifier=identifier, number=part + 1, data=data, digest=digest.digest())
            tags[part + 1] = self._client.run(self._key, "written", put, lambda _: ("ok", len(data)), progressed)

        try:
            in_parallel(send, range(len(self._parts)))
            self._client.run(self._key, "written", partial(self._complete, identifier=identifier, tags=tags))
        except UnreachableError:
            raise
        except StoreError:
            with suppress(StoreError):
                self._client.run(self._key, "removed", partial(self._abort, identifier=identifier))
            raise

    def is_complete(self) -> bool:
        """Return whether the object has the ETag of these parts: its upload was completed by a lost response, or by another process."""
        digests = b"".join(hashlib.md5(self._read(*part), usedforsecurity=False).digest() for part in self._parts)
        tag = f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(self._parts)}"

        def head(connection: Connection) -> bool:
            return connection.s3.stat_object(bucket_name=connection.bucket, object_name=self._name).etag == tag

        with suppress(ObjectNotFound):
            return self._client.run(self._key, "checked", head)
        return False

    def _begin(self, connection: Connection) -> str:
        response = connection.signed("POST", self._name, {"uploads": ""}, headers=_CONTENT)
        return findtext(fromstring(response.data), "UploadId", strict=True) or ""  # noqa: S314 - as minio-py does with every response

    def _held(self, connection: Connection, *, identifier: str) -> dict[int, str]:
        """Return the ETags of an upload's parts by their numbers."""
        held, marker = dict[int, str](), "0"
        while True:
            with _lost():
                query = {"uploadId": identifier, "max-parts": "1000", "part-number-marker": marker}
                page = ListPartsResult(connection.signed("GET", self._name, query))
            held |= {part.part_number: part.etag for part in page.parts}
            if not page.is_truncated or not page.next_part_number_marker:
                return held
            marker = page.next_part_number_marker

    def _put_part(self, connection: Connection, *, identifier: str, number: int, data: bytes, digest: bytes) -> str:
        headers = {**_CONTENT, "Content-MD5": base64.b64encode(digest).decode()}
        with _lost():
            return etag(connection.signed("PUT", self._name, {"partNumber": str(number), "uploadId": identifier}, data, headers))

    def _complete(self, connection: Connection, *, identifier: str, tags: Mapping[int, str]) -> None:
        parts = Element("CompleteMultipartUpload")
        for number, tag in sorted(tags.items()):
            part = SubElement(parts, "Part")
            SubElement(part, "PartNumber").text = str(number)
            SubElement(part, "ETag").text = f'"{tag}"'
        with _lost():
            response = connection.signed("POST", self._name, {"uploadId": identifier}, tostring(parts), {"Content-Type": "application/xml"})
            if not CompleteMultipartUploadResult(response).etag:  # an error with status 200
                raise error_in(response)

    def _abort(self, connection: Connection, *, identifier: str) -> None:
        connection.signed("DELETE", self._name, {"uploadId": identifier})


@contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except S3Error as error:
        if error.code in _LOST_UPLOAD:
            raise _LostUploadError from None
        raise
