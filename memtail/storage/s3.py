"""Object store in a bucket of an S3 server: AWS, MinIO, or any other with conditional writes."""

import base64
import hashlib
import re
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from itertools import islice
from pathlib import Path

from minio.datatypes import Object
from minio.error import InvalidResponseError, MinioException, S3Error

from memtail.errors import StoreError
from memtail.settings import S3Settings
from memtail.storage import Observer, Stored, keys
from memtail.storage.proof import prove_races
from memtail.storage.s3_client import Client, Connection
from memtail.storage.s3_errors import status_of
from memtail.storage.s3_proof import WRITER, prove_answers
from memtail.storage.s3_reader import Reader
from memtail.storage.s3_writer import Writer

#: Length of the longest page of a listing.
_PAGE = 1000


class S3Store:
    """`ObjectStore` in a bucket, under a prefix.

    Requests that fail for a transient reason (no connection, no response, a server that is overloaded or restarting) are retried with a
    random exponential backoff, and each failure is logged as a warning.

    Args:
        bucket: its name; it must exist.
        prefix: of all keys, with a `/` after it; stores under two prefixes do not see each other, unless one is below the other.
        settings: address and credentials of the server, by default those of the environment. Its files of keys are read again.
        attempts: requests in vain before a retried request fails.
        patience: seconds in vain before a retried request fails. Both count anew for each part of a large object, and after progress.
        timeout: seconds to wait for a connection, and for each response.
        part_size: bytes; larger objects are read and written in parts of this size, six at a time. At least 5 MiB.
        observe: is called after each request.

    Raises:
        StoreError: the names or settings cannot be those of a store. No request is made.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        settings: S3Settings | None = None,
        *,
        attempts: int = 30,
        patience: float = 120.0,
        timeout: float = 60.0,
        part_size: int = 16 << 20,
        observe: Observer | None = None,
    ) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket):
            raise StoreError(f"'{bucket}' is not the name of a bucket: give s3://BUCKET or s3://BUCKET/PREFIX")
        self._bucket = bucket
        self._prefix = f"{keys.check(prefix)}/" if prefix else ""
        self._settings = settings or S3Settings.from_environment()
        self._client = Client(
            self.address,
            bucket,
            self._settings,
            rereads=settings is None,
            attempts=attempts,
            patience=patience,
            timeout=timeout,
            observe=observe,
        )
        self._another = partial(S3Store, bucket, prefix, settings, attempts=attempts, patience=patience, timeout=timeout, observe=observe)
        self._reader, self._writer = Reader(self._client, part_size), Writer(self._client, part_size)

    @property
    def address(self) -> str:
        """`s3://BUCKET/PREFIX`."""
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def __repr__(self) -> str:
        return f"S3Store({self.address})"

    def get(self, key: str, limit: int | None = None) -> bytes:
        """Return an object's bytes."""
        return self.get_tagged(key, limit)[0]

    def get_tagged(self, key: str, limit: int | None = None) -> tuple[bytes, str]:
        """Return an object's bytes and their ETag; a large object is read in parts."""
        return self._reader.get(key, self._name(key), limit)

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """Return consecutive bytes of an object by a ranged request."""

        def read(connection: Connection) -> bytes:
            try:
                with connection.opened(self._name(key), {"Range": f"bytes={offset}-{offset + max(length, 1) - 1}"}) as response:
                    if response.status != 206:
                        raise InvalidResponseError(response.status, None, None)
                    return response.read(decode_content=False)[:length]
            except S3Error as error:
                if error.code != "InvalidRange":
                    raise
                return b""

        return self._client.run(key, "read", read, lambda data: ("ok", len(data)))

    def put(self, key: str, data: bytes) -> None:
        """Write or replace an object; a large one is written in parts."""
        self._writer.put(key, self._name(key), data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write an object by a conditional request, which the server refuses if the key exists."""
        return self._put_if(key, data, {"If-None-Match": "*"}, uuid.uuid4().hex)

    def put_if_match(self, key: str, data: bytes, tag: str) -> bool:
        """Replace an object by a conditional request, which the server refuses if the object has another ETag."""
        return self._put_if(key, data, {"If-Match": f'"{tag}"'}, uuid.uuid4().hex)

    def upload(self, key: str, path: Path, start: int = 0, length: int | None = None) -> None:
        """Write or replace an object with the content of a file, a large one in parts; continue an upload of the key that was cut off."""
        self._writer.upload(key, self._name(key), path, start, length)

    def download(self, key: str, path: Path) -> None:
        """Write an object to a file, a large one in parts; continue a download to the path that was cut off."""
        self._reader.download(key, self._name(key), path)

    def list(self, prefix: str) -> Iterator[str]:
        """Yield the keys that start with a prefix, page by page."""
        return (key for key, _ in self.list_tagged(prefix))

    def list_tagged(self, prefix: str) -> Iterator[tuple[str, str]]:
        """Yield the keys that start with a prefix, page by page, with their ETags."""
        return ((key, entry.etag or "") for key, entry in self._listed(prefix))

    def inventory(self, prefix: str) -> Iterator[Stored]:
        """Yield the objects whose keys start with a prefix, page by page."""
        for key, entry in self._listed(prefix):
            yield Stored(key, entry.size or 0, entry.last_modified.timestamp() if entry.last_modified else 0.0)

    def _listed(self, prefix: str) -> Iterator[tuple[str, Object]]:
        last: str | None = None
        while True:

            def page(connection: Connection, after: str | None = last) -> "list[Object]":
                objects = connection.s3.list_objects(
                    bucket_name=self._bucket, prefix=self._prefix + prefix, recursive=True, start_after=after
                )
                return list(islice(objects, _PAGE))

            entries = self._client.run(prefix, "listed", page)
            for entry in entries:
                name = entry.object_name or ""
                if not name.endswith("/"):  # web consoles represent an empty folder by an object whose name ends in a slash
                    yield name.removeprefix(self._prefix), entry
            if len(entries) < _PAGE:
                return
            last = entries[-1].object_name

    def folders(self, prefix: str) -> Iterator[str]:
        """Yield the names of the folders directly below a prefix, from listings with a delimiter."""
        start = self._prefix + prefix

        def names(connection: Connection) -> set[str]:
            entries = connection.s3.list_objects(bucket_name=self._bucket, prefix=start or None, recursive=False)
            below = ((entry.object_name or "").removeprefix(start) for entry in entries)
            return {name.removesuffix("/") for name in below if name.endswith("/")}

        # the server sorts names with their slash: a-b/ before a/
        yield from sorted(self._client.run(prefix, "listed", names))

    def exists(self, key: str) -> bool:
        """Return whether an object has the key."""

        def head(connection: Connection) -> bool:
            return self._writer_of(connection, key) is not None

        return self._client.run(key, "checked", head, lambda exists: ("ok" if exists else "absent", 0))

    def delete(self, key: str) -> None:
        """Remove an object, if it exists."""
        name = self._name(key)
        self._client.run(key, "removed", lambda connection: connection.s3.remove_object(bucket_name=self._bucket, object_name=name))

    def local_path(self, key: str) -> None:
        """Return None: objects are not files of this machine."""
        keys.check(key)

    def sweep(self) -> None:
        """Do nothing: an unfinished upload is not an object, and its parts are left to the bucket's lifecycle rules."""

    def make_bucket(self) -> bool:
        """Make the bucket unless it exists.

        Returns:
            Whether it was made.

        Raises:
            StoreError: the server cannot be used, or another owner has a bucket of this name.
        """

        def make(connection: Connection) -> bool:
            if connection.s3.bucket_exists(bucket_name=self._bucket):
                return False
            try:
                connection.s3.make_bucket(bucket_name=self._bucket, location=self._settings.region)
            except S3Error as error:
                if error.code != "BucketAlreadyOwnedByYou":  # made by a concurrent call, or by this one before a response was lost
                    raise
                return False
            return True

        return self._client.run(self._bucket, "made", make)

    def verify_contract(self) -> None:
        """Verify that the server keeps the contract, also under concurrent writes; the objects written are removed again.

        Raises:
            StoreError: the server cannot be used, or does not keep the contract.
        """
        next(self.list(keys.probe()), None)  # of all requests, its errors name faults of the bucket, the key and the clock most clearly
        fault = prove_answers(self._client, self._prefix) or prove_races(self, self._another())
        if fault:
            raise StoreError(f"store {self.address}: the server {self._settings.endpoint} cannot be used: {fault}; use another server")

    def clock_difference(self) -> float:
        """Return the seconds by which the server's clock is ahead of this machine's.

        Raises:
            StoreError: the server does not answer.
        """

        def ask(connection: Connection) -> float:
            response = connection.http.urlopen("HEAD", self._settings.endpoint, redirect=False)
            return (parsedate_to_datetime(response.headers["Date"]) - datetime.now(UTC)).total_seconds()

        return self._client.run("", "asked for the time", ask)

    def _put_if(self, key: str, data: bytes, condition: dict[str, str], writer: str) -> bool:
        """Write an object under a condition; return whether this call wrote it.

        After a lost response, and after every refusal (a proxy may have repeated the request), the object's `writer` tells whether an
        existing object is this call's own.
        """
        name, again = self._name(key), False
        headers = {**condition, WRITER: writer, "Content-MD5": base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()}

        def write(connection: Connection) -> bool:
            nonlocal again
            if again and self._writer_of(connection, key) == writer:
                return True
            again = True
            try:
                connection.signed("PUT", name, body=data, headers=headers)
            except MinioException as error:
                if status_of(error) == 412:
                    return self._writer_of(connection, key) == writer
                if "If-Match" in condition and isinstance(error, S3Error) and error.code == "NoSuchKey":
                    return False
                raise
            return True

        return self._client.run(key, "written", write, lambda written: ("ok", len(data)) if written else ("exists", 0))

    def _writer_of(self, connection: Connection, key: str) -> str | None:
        """Return the writer of an object, "" if it names none, None if there is no object."""
        name = self._name(key)
        try:
            try:
                headers = connection.s3.stat_object(bucket_name=self._bucket, object_name=name).metadata
            except S3Error as error:
                if error.code != "AccessDenied":
                    raise
                # a response to HEAD has no content: a read names the cause, or is allowed, if the key has been replaced since
                with connection.opened(name) as response:
                    headers = response.headers
        except S3Error as error:
            if error.code != "NoSuchKey":
                raise
            return None
        return (headers or {}).get(WRITER) or ""

    def _name(self, key: str) -> str:
        return self._prefix + keys.check(key)
