"""Object store in a bucket of an S3 server: AWS, MinIO, or any other with conditional writes."""

import base64
import hashlib
import io
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, NamedTuple, TypeVar
from urllib.parse import urlsplit
from xml.etree.ElementTree import ParseError

import structlog
import urllib3
from minio import Minio
from minio.credentials.credentials import Credentials
from minio.credentials.providers import AWSConfigProvider, ChainedProvider, IamAwsProvider, StaticProvider
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, stop_after_delay, wait_random_exponential
from urllib3.exceptions import HTTPError

from memtail.errors import ForeignObjectError, StoreError
from memtail.settings import S3Settings
from memtail.storage import ObjectNotFound, Observer, UnreachableError, keys
from memtail.storage.atomic_file import atomic_file
from memtail.storage.s3_errors import KEY_FIX, TRANSIENT_STATUS, cause_of, error_in, fix_of, is_transient, outcome_of

log = structlog.get_logger()
T = TypeVar("T")

#: Token of one call of `put_if_absent`, stored with the object, by which the call recognises its own write.
_WRITER = "x-amz-meta-writer"
#: Length of the longest page of a listing.
_PAGE = 1000
#: Longer than the clock difference of 15 minutes that S3 tolerates: a larger one is reported as such, not as an expired URL.
_PRESIGNED_FOR = timedelta(minutes=20)
_LONGEST_PAUSE = 10.0
_MOST_PARTS = 10_000
# Operations of an observer, by the verb of an error message.
_OPERATIONS = {
    "read": "get",
    "written": "put",
    "listed": "list",
    "checked": "head",
    "removed": "delete",
    "made": "put",
    "asked for the time": "head",
}
# Errors raised by servers, by connections, and by parsing a response.
_ERRORS = (MinioException, HTTPError, ParseError, ValueError, KeyError)


class _Connection(NamedTuple):
    s3: Minio
    http: urllib3.PoolManager


class S3Store:
    """`ObjectStore` in a bucket, under a prefix.

    Requests that fail for a transient reason (no connection, no response, a server that is overloaded or restarting) are retried with a
    random exponential backoff, and each failure is logged as a warning.

    Args:
        bucket: its name; it must exist.
        prefix: of all keys, with a `/` after it; stores under two prefixes do not see each other, unless one is below the other.
        settings: address and credentials of the server, by default those of the environment.
        attempts: requests before a retried request fails.
        patience: seconds before a retried request fails.
        timeout: seconds to wait for a connection, and for each response.
        part_size: bytes; larger objects are uploaded in parts of this size, three at a time. At least 5 MiB.
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
        self._attempts, self._patience, self._timeout, self._part_size = attempts, patience, timeout, part_size
        self._observe = observe
        self._connections: dict[int, _Connection] = {}
        self._connection()

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
        """Return an object's bytes and their ETag."""

        def read(connection: _Connection) -> tuple[bytes, str]:
            with self._opened(connection, key) as response:
                size = response.headers.get("Content-Length", "an unknown number of")
                if limit is not None and not (size.isdigit() and int(size) <= limit):
                    raise ForeignObjectError(
                        f"store {self.address}: '{key}' has {size} bytes, more than the {limit} that are read: remove it"
                    )
                return response.read(decode_content=False), _etag(response)

        return self._try(key, "read", read, lambda read: ("ok", len(read[0])))

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """Return consecutive bytes of an object by a ranged request."""

        def read(connection: _Connection) -> bytes:
            try:
                with self._opened(connection, key, {"Range": f"bytes={offset}-{offset + max(length, 1) - 1}"}) as response:
                    if response.status != 206:
                        raise InvalidResponseError(response.status, None, None)
                    return response.read(decode_content=False)[:length]
            except S3Error as error:
                if error.code != "InvalidRange":
                    raise
                return b""

        return self._try(key, "read", read, lambda data: ("ok", len(data)))

    def put(self, key: str, data: bytes) -> None:
        """Write or replace an object."""
        self._put(key, lambda: io.BytesIO(data), len(data))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write an object by a conditional request, which the server refuses if the key exists."""
        return self._put_if(key, data, {"If-None-Match": "*"}, uuid.uuid4().hex)

    def put_if_match(self, key: str, data: bytes, tag: str) -> bool:
        """Replace an object by a conditional request, which the server refuses if the object has another ETag."""
        return self._put_if(key, data, {"If-Match": f'"{tag}"'}, uuid.uuid4().hex)

    def upload(self, key: str, path: Path) -> None:
        """Write or replace an object with the content of a file."""
        try:
            self._put(key, lambda: path.open("rb"), path.stat().st_size)
        except OSError as error:
            raise StoreError(f"store {self.address}: '{key}' cannot be written ({path}: {error.strerror or error})") from error

    def download(self, key: str, path: Path) -> None:
        """Write an object to a file."""

        def copy(connection: _Connection) -> int:
            with self._opened(connection, key) as response, atomic_file(path) as file:
                return sum(file.write(block) for block in response.stream(1 << 20, decode_content=False))

        self._try(key, "read", copy, lambda size: ("ok", size))

    def list(self, prefix: str) -> Iterator[str]:
        """Yield the keys that start with a prefix, page by page."""
        return (key for key, _ in self.list_tagged(prefix))

    def list_tagged(self, prefix: str) -> Iterator[tuple[str, str]]:
        """Yield the keys that start with a prefix, page by page, with their ETags."""
        last: str | None = None
        while True:

            def page(connection: _Connection, after: str | None = last) -> "list[tuple[str, str]]":
                objects = connection.s3.list_objects(
                    bucket_name=self._bucket, prefix=self._prefix + prefix, recursive=True, start_after=after
                )
                return [(entry.object_name or "", entry.etag or "") for entry in islice(objects, _PAGE)]

            entries = self._try(prefix, "listed", page)
            # web consoles represent an empty folder by an object whose name ends in a slash
            yield from ((name.removeprefix(self._prefix), tag) for name, tag in entries if not name.endswith("/"))
            if len(entries) < _PAGE:
                return
            last = entries[-1][0]

    def folders(self, prefix: str) -> Iterator[str]:
        """Yield the names of the folders directly below a prefix, from listings with a delimiter."""
        start = self._prefix + prefix

        def names(connection: _Connection) -> set[str]:
            entries = connection.s3.list_objects(bucket_name=self._bucket, prefix=start or None, recursive=False)
            below = ((entry.object_name or "").removeprefix(start) for entry in entries)
            return {name.removesuffix("/") for name in below if name.endswith("/")}

        # the server sorts names with their slash: a-b/ before a/
        yield from sorted(self._try(prefix, "listed", names))

    def exists(self, key: str) -> bool:
        """Return whether an object has the key."""

        def head(connection: _Connection) -> bool:
            return self._writer(connection, key) is not None

        return self._try(key, "checked", head, lambda exists: ("ok" if exists else "absent", 0))

    def delete(self, key: str) -> None:
        """Remove an object, if it exists."""
        name = self._name(key)
        self._try(key, "removed", lambda connection: connection.s3.remove_object(bucket_name=self._bucket, object_name=name))

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

        def make(connection: _Connection) -> bool:
            if connection.s3.bucket_exists(bucket_name=self._bucket):
                return False
            try:
                connection.s3.make_bucket(bucket_name=self._bucket, location=self._settings.region)
            except S3Error as error:
                if error.code != "BucketAlreadyOwnedByYou":  # made by a concurrent call, or by this one before a response was lost
                    raise
                return False
            return True

        return self._try(self._bucket, "made", make)

    def verify_contract(self) -> None:
        """Verify that the server keeps the contract, with an object that is removed again.

        Raises:
            StoreError: the server cannot be used, overwrites an object in spite of `If-None-Match`, or does not keep an object's metadata.
        """
        key, writer = keys.probe(), uuid.uuid4().hex
        next(self.list(key), None)  # of all requests, its errors name faults of the bucket, the key and the clock most clearly
        first = self._put_if(key, b"first", {"If-None-Match": "*"}, writer)
        kept = self._try(key, "checked", lambda connection: self._writer(connection, key))
        second = self.put_if_absent(key, b"second")
        self.delete(key)
        for wrong, what in (
            (not first, "it refuses a conditional write of a new object"),
            (second, "it overwrites an object in spite of If-None-Match: *"),
            (kept != writer, "it does not keep the metadata of a presigned write"),
        ):
            if wrong:
                raise StoreError(f"store {self.address}: the server {self._settings.endpoint} cannot be used: {what}; use another server")

    def clock_difference(self) -> float:
        """Return the seconds by which the server's clock is ahead of this machine's.

        Raises:
            StoreError: the server does not answer.
        """

        def ask(connection: _Connection) -> float:
            response = connection.http.urlopen("HEAD", self._settings.endpoint, redirect=False)
            return (parsedate_to_datetime(response.headers["Date"]) - datetime.now(UTC)).total_seconds()

        return self._try("", "asked for the time", ask)

    def _put(self, key: str, source: Callable[[], BinaryIO], size: int) -> None:
        name = self._name(key)

        def write(connection: _Connection) -> None:
            with source() as data:
                written = connection.s3.put_object(
                    bucket_name=self._bucket,
                    object_name=name,
                    data=data,
                    length=size,
                    part_size=max(self._part_size, -(-size // _MOST_PARTS)),
                )
            if not written.etag:  # an upload in parts may end in an error with status 200, which minio does not raise
                raise ServerError("the server did not put the parts together", 500)

        self._try(key, "written", write, lambda _: ("ok", size))

    def _put_if(self, key: str, data: bytes, condition: dict[str, str], writer: str) -> bool:
        """Write an object under a condition; return whether this call wrote it.

        After a lost response, and after every refusal (a proxy may have repeated the request), the object's `writer` tells whether an
        existing object is this call's own.
        """
        name, again = self._name(key), False
        headers = {**condition, "Content-MD5": base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()}

        def write(connection: _Connection) -> bool:
            nonlocal again
            if again and self._writer(connection, key) == writer:
                return True
            again = True
            # minio's put_object drops If-None-Match; and servers refuse unsigned x-amz- headers, so the writer is in the URL
            url = connection.s3.get_presigned_url(
                method="PUT",
                bucket_name=self._bucket,
                object_name=name,
                expires=_PRESIGNED_FOR,
                extra_query_params={_WRITER: writer},
            )
            response = connection.http.urlopen("PUT", url, body=data, headers=headers, redirect=False)
            if response.status == 412:
                return self._writer(connection, key) == writer
            if response.status == 200:
                return True
            error = error_in(response)
            if "If-Match" in condition and isinstance(error, S3Error) and error.code == "NoSuchKey":
                return False
            raise error

        return self._try(key, "written", write, lambda written: ("ok", len(data)) if written else ("exists", 0))

    def _writer(self, connection: _Connection, key: str) -> str | None:
        """Return the writer of an object, "" if it names none, None if there is no object."""
        try:
            head = connection.s3.stat_object(bucket_name=self._bucket, object_name=self._name(key))
        except S3Error as error:
            if error.code != "NoSuchKey":
                raise
            return None
        return (head.metadata or {}).get(_WRITER) or ""

    @contextmanager
    def _opened(
        self, connection: _Connection, key: str, headers: Mapping[str, str] = MappingProxyType({})
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        response = connection.s3.get_object(bucket_name=self._bucket, object_name=self._name(key), request_headers={**headers})
        try:
            yield response
        finally:
            response.close()
            response.release_conn()

    def _name(self, key: str) -> str:
        return self._prefix + keys.check(key)

    def _connection(self) -> _Connection:
        """Return the connection of this process, since sockets must not be shared with the process that it was forked from.

        The parent's connection is kept: closing it could wait for ever for a lock that was held during the fork.
        """
        own = self._connections.get(os.getpid())
        return own or self._connections.setdefault(os.getpid(), _connect(self._settings, self._timeout))

    def _try(
        self, key: str, done: str, action: Callable[[_Connection], T], result: Callable[[T], tuple[str, int]] = lambda _: ("ok", 0)
    ) -> T:
        """Run an action, and retry it after transient failures.

        Args:
            key: of the object, for the error.
            done: the verb of the error, of `_OPERATIONS`.
            action: one or a few requests about one object.
            result: from the action's value, the outcome and the bytes for the observer.
        """

        def observed(connection: _Connection) -> T:
            began, outcome, size = time.perf_counter(), "ok", 0
            try:
                returned = action(connection)
                outcome, size = result(returned)
                return returned
            except _ERRORS as error:
                outcome = outcome_of(error)
                raise
            finally:
                if self._observe:
                    self._observe(_OPERATIONS[done], outcome, time.perf_counter() - began, size)

        def warn(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            log.warning(
                "store fails, trying again",
                store=self.address,
                key=key,
                attempt=state.attempt_number,
                pause=f"{state.upcoming_sleep:.1f} s",
                error=cause_of(error, self._timeout) if error else "",
            )

        retrying = Retrying(
            retry=retry_if_exception(is_transient),
            stop=stop_after_attempt(self._attempts) | stop_after_delay(self._patience),
            wait=wait_random_exponential(multiplier=0.25, max=_LONGEST_PAUSE),
            before_sleep=warn,
            reraise=True,
        )
        try:
            return retrying(observed, self._connection())
        except _ERRORS as error:
            if isinstance(error, S3Error) and error.code == "NoSuchKey":
                raise ObjectNotFound(f"store {self.address}: there is no '{key}'") from None
            cause, fix = cause_of(error, self._timeout), fix_of(error)
            at = f"store {self.address} at {self._settings.endpoint}"
            # `from None`: the cause may hold a signed URL
            kind = UnreachableError if is_transient(error) else StoreError
            raise kind(f"{at}: '{key}' cannot be {done} ({cause}): {fix}") from None


def _etag(response: urllib3.BaseHTTPResponse) -> str:
    return response.headers.get("ETag", "").strip('"')


class _AmbientCredentials(ChainedProvider):
    """Credentials from AWS's configuration file, a web identity, a container or an instance, used if no key is set."""

    def retrieve(self) -> Credentials:
        try:
            return super().retrieve()
        except (ValueError, KeyError, OSError, HTTPError):  # their messages may hold a token
            raise StoreError(f"there is no key for the S3 server, here or from AWS: {KEY_FIX}") from None


def _connect(settings: S3Settings, timeout: float) -> _Connection:
    if settings.addressing not in (None, "path", "virtual"):
        raise StoreError(f"MEMTAIL_S3_ADDRESSING is '{settings.addressing}': set it to path or virtual")
    if settings.ca_file is not None and not settings.ca_file.is_file():
        raise StoreError(f"MEMTAIL_S3_CA_FILE names {settings.ca_file}, which is not a file: name the certificate of its authority")
    http = urllib3.PoolManager(
        timeout=urllib3.Timeout(connect=timeout, read=timeout),
        maxsize=16,
        retries=False,
        cert_reqs="CERT_REQUIRED",
        ca_certs=settings.ca_file and str(settings.ca_file),
    )
    try:
        url = urlsplit(settings.endpoint)
        if url.username or url.password or url.scheme not in ("http", "https") or url.path.strip("/") or url.query or url.fragment:
            raise ValueError
        s3 = Minio(
            endpoint=url.netloc,
            secure=url.scheme == "https",
            region=settings.region,
            http_client=http,
            credentials=_credentials(settings),
        )
    except ValueError:
        raise StoreError("MEMTAIL_S3_ENDPOINT or MEMTAIL_S3_REGION is malformed: an endpoint is like https://s3.example.org:9000") from None
    if settings.addressing == "virtual":
        s3.enable_virtual_style_endpoint()
    elif settings.addressing == "path":
        s3.disable_virtual_style_endpoint()
    return _Connection(s3, http)


def _credentials(settings: S3Settings) -> StaticProvider | _AmbientCredentials:
    if settings.access_key and settings.secret_key:
        return StaticProvider(access_key=settings.access_key, secret_key=settings.secret_key, session_token=settings.session_token)
    # the address of instance credentials exists only on AWS's machines; elsewhere it does not answer
    retries = urllib3.Retry(total=2, backoff_factor=0.2, status_forcelist=TRANSIENT_STATUS)
    http = urllib3.PoolManager(timeout=urllib3.Timeout(connect=2.0, read=10.0), retries=retries)
    return _AmbientCredentials(providers=[AWSConfigProvider(), IamAwsProvider(http_client=http)])
