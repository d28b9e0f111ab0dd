"""An object store in a bucket of an S3 server: AWS, MinIO, or another that keeps to conditional writes."""

import base64
import hashlib
import io
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar
from urllib.parse import urlsplit
from xml.etree.ElementTree import ParseError

import structlog
import urllib3
from minio import Minio
from minio.credentials.credentials import Credentials
from minio.credentials.providers import AWSConfigProvider, ChainedProvider, IamAwsProvider, StaticProvider
from minio.error import MinioException, S3Error, ServerError
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, stop_after_delay, wait_random_exponential
from urllib3.exceptions import HTTPError

from memtail.errors import ForeignObjectError, StoreError
from memtail.settings import S3Settings
from memtail.storage import ObjectNotFound, UnreachableError, keys
from memtail.storage.atomic_file import atomic_file
from memtail.storage.s3_errors import KEY_MEND, PASSING_STATUS, cause_of, error_in, may_pass, mend_of, outcome_of

log = structlog.get_logger()
T = TypeVar("T")

#: Is told of each request, repeated ones too: the operation (get, put, list, head, delete), its outcome (ok, absent, exists, refused,
#: failed), the seconds it took, and the bytes of an object that it read or wrote.
Observer = Callable[[str, str, float, int], None]

#: Who wrote an object: a token of one call of `put_if_absent`, by which it knows its own object again.
_WRITER = "x-amz-meta-writer"
#: As many as the longest page of a listing holds.
_PAGE = 1000
#: More than the 15 minutes by which S3 lets clocks differ, so that a clock further off is reported as that.
_PRESIGNED_FOR = timedelta(minutes=20)
_LONGEST_PAUSE = 10.0
_MOST_PARTS = 10_000
# What requests are called by what they do.
_OPERATIONS = {
    "read": "get",
    "written": "put",
    "listed": "list",
    "looked for": "head",
    "removed": "delete",
    "made": "put",
    "asked for the time": "head",
}
# Of what servers, connections and what came over them raise.
_ERRORS = (MinioException, HTTPError, ParseError, ValueError, KeyError)


class _Connection(NamedTuple):
    s3: Minio
    http: urllib3.PoolManager


class S3Store:
    """`ObjectStore` in a bucket, under a prefix.

    What fails for a reason that may pass (no connection, no answer, a server that is overloaded or restarting) is tried again after
    growing, random pauses, and each time logged as a warning.

    Args:
        bucket: its name; it must be there.
        prefix: of all keys, with a `/` after it; stores under two prefixes do not see each other, unless one is below the other.
        settings: how the server is reached; those of the environment by default.
        attempts, patience: how often, and for how many seconds, a request is tried before it is given up.
        timeout: seconds to wait for a connection, and for each answer.
        part_size: bytes; larger objects go up in parts of this size, three at a time. At least 5 MiB.
        observe: is told of each request; it must not raise.

    Raises:
        StoreError: the names or settings cannot be those of a store. The server is not asked.
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
        def read(connection: _Connection) -> bytes:
            with self._opened(connection, key) as response:
                size = response.headers.get("Content-Length", "an unknown number of")
                if limit is not None and not (size.isdigit() and int(size) <= limit):
                    raise ForeignObjectError(
                        f"store {self.address}: '{key}' has {size} bytes, more than the {limit} that are read: remove it"
                    )
                return response.read(decode_content=False)

        return self._try(key, "read", read, lambda data: ("ok", len(data)))

    def put(self, key: str, data: bytes) -> None:
        self._put(key, lambda: io.BytesIO(data), len(data))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return self._put_new(key, data, uuid.uuid4().hex)

    def upload(self, key: str, path: Path) -> None:
        try:
            self._put(key, lambda: path.open("rb"), path.stat().st_size)
        except OSError as error:
            raise StoreError(f"store {self.address}: '{key}' cannot be written ({path}: {error.strerror or error})") from error

    def download(self, key: str, path: Path) -> None:
        def copy(connection: _Connection) -> int:
            with self._opened(connection, key) as response, atomic_file(path) as file:
                return sum(file.write(block) for block in response.stream(1 << 20, decode_content=False))

        self._try(key, "read", copy, lambda size: ("ok", size))

    def list(self, prefix: str) -> Iterator[str]:
        last: str | None = None
        while True:

            def page(connection: _Connection, after: str | None = last) -> list[str]:
                objects = connection.s3.list_objects(
                    bucket_name=self._bucket, prefix=self._prefix + prefix, recursive=True, start_after=after
                )
                return [entry.object_name or "" for entry in islice(objects, _PAGE)]

            names = self._try(prefix, "listed", page)
            # consoles make objects that end in a slash to show an empty folder
            yield from (name.removeprefix(self._prefix) for name in names if not name.endswith("/"))
            if len(names) < _PAGE:
                return
            last = names[-1]

    def folders(self, prefix: str) -> Iterator[str]:
        start = self._prefix + prefix

        def names(connection: _Connection) -> set[str]:
            entries = connection.s3.list_objects(bucket_name=self._bucket, prefix=start or None, recursive=False)
            found = ((entry.object_name or "").removeprefix(start) for entry in entries)
            return {name.removesuffix("/") for name in found if name.endswith("/")}

        # the server sorts them with their slash: a-b/ before a/
        yield from sorted(self._try(prefix, "listed", names))

    def exists(self, key: str) -> bool:
        def there(connection: _Connection) -> bool:
            return self._writer(connection, key) is not None

        return self._try(key, "looked for", there, lambda found: ("ok" if found else "absent", 0))

    def delete(self, key: str) -> None:
        name = self._name(key)
        self._try(key, "removed", lambda connection: connection.s3.remove_object(bucket_name=self._bucket, object_name=name))

    def make_bucket(self) -> bool:
        """Make the bucket unless it is there.

        Returns: whether it was made.
        """

        def make(connection: _Connection) -> bool:
            if connection.s3.bucket_exists(bucket_name=self._bucket):
                return False
            try:
                connection.s3.make_bucket(bucket_name=self._bucket, location=self._settings.region)
            except S3Error as error:
                if error.code != "BucketAlreadyOwnedByYou":  # by another, or by a try before this one whose answer was lost
                    raise
                return False
            return True

        return self._try(self._bucket, "made", make)

    def verify_contract(self) -> None:
        """Try out what the contract rests on, with an object that is removed again.

        Raises:
            StoreError: the server cannot be reached or used; or it does not refuse to write an object that is there, or does not keep
                with an object who wrote it.
        """
        key, writer = keys.probe(), uuid.uuid4().hex
        next(self.list(key), None)  # says best what is wrong with the bucket, the key or the clock
        first = self._put_new(key, b"first", writer)
        kept = self._try(key, "looked for", lambda connection: self._writer(connection, key))
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
        """Seconds by which the server's clock is ahead of ours. Raises: StoreError."""

        def ask(connection: _Connection) -> float:
            answer = connection.http.urlopen("HEAD", self._settings.endpoint, redirect=False)
            return (parsedate_to_datetime(answer.headers["Date"]) - datetime.now(UTC)).total_seconds()

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
            if not written.etag:  # the end of an upload in parts may be an error under status 200, which minio passes over
                raise ServerError("the server did not put the parts together", 500)

        self._try(key, "written", write, lambda _: ("ok", size))

    def _put_new(self, key: str, data: bytes, writer: str) -> bool:
        """`put_if_absent`. An object that is there after a lost answer, or refuses this one, may be this call's own: `writer` tells.

        It is asked after every refusal, since a proxy, too, may have repeated the request.
        """
        name, again = self._name(key), False
        headers = {"If-None-Match": "*", "Content-MD5": base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()}

        def write(connection: _Connection) -> bool:
            nonlocal again
            if again and (there := self._writer(connection, key)) is not None:
                return there == writer
            again = True
            # minio's put_object drops If-None-Match without a word; and unsigned x-amz- headers are refused, so that it is in the URL
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
            if response.status != 200:
                raise error_in(response)
            return True

        return self._try(key, "written", write, lambda written: ("ok", len(data)) if written else ("exists", 0))

    def _writer(self, connection: _Connection, key: str) -> str | None:
        """Who wrote an object, "" if it does not say; None if there is no object."""
        try:
            found = connection.s3.stat_object(bucket_name=self._bucket, object_name=self._name(key))
        except S3Error as error:
            if error.code != "NoSuchKey":
                raise
            return None
        return (found.metadata or {}).get(_WRITER) or ""

    @contextmanager
    def _opened(self, connection: _Connection, key: str) -> Iterator[urllib3.BaseHTTPResponse]:
        response = connection.s3.get_object(bucket_name=self._bucket, object_name=self._name(key))
        try:
            yield response
        finally:
            response.close()
            response.release_conn()

    def _name(self, key: str) -> str:
        return self._prefix + keys.check(key)

    def _connection(self) -> _Connection:
        """This process's own: sockets must not be shared with one that it was forked from.

        The parent's is kept, since to close it may wait for ever for a lock that was held when this process was forked.
        """
        own = self._connections.get(os.getpid())
        return own or self._connections.setdefault(os.getpid(), _connect(self._settings, self._timeout))

    def _try(
        self, key: str, done: str, action: Callable[[_Connection], T], result: Callable[[T], tuple[str, int]] = lambda _: ("ok", 0)
    ) -> T:
        """Run an action, again and again while its failure may pass.

        Args:
            key: of the object, for the error.
            done: what could not be done, for the error.
            action: a request or a few, one object's.
            result: the outcome and the bytes, for who observes, of what the action returns.
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
            retry=retry_if_exception(may_pass),
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
            cause, mend = cause_of(error, self._timeout), mend_of(error)
            at = f"store {self.address} at {self._settings.endpoint}"
            # what was raised below may hold a signed URL
            kind = UnreachableError if may_pass(error) else StoreError
            raise kind(f"{at}: '{key}' cannot be {done} ({cause}): {mend}") from None


class _AmbientCredentials(ChainedProvider):
    """Where no key is set: those of AWS's own configuration file, of a web identity, a container or an instance."""

    def retrieve(self) -> Credentials:
        try:
            return super().retrieve()
        except (ValueError, KeyError, OSError, HTTPError):  # what they say may hold a token
            raise StoreError(f"there is no key for the S3 server, here or from AWS: {KEY_MEND}") from None


def _connect(settings: S3Settings, timeout: float) -> _Connection:
    if settings.addressing not in (None, "path", "virtual"):
        raise StoreError(f"MEMTAIL_S3_ADDRESSING is '{settings.addressing}': set it to path or virtual")
    if settings.ca_file is not None and not settings.ca_file.is_file():
        raise StoreError(f"MEMTAIL_S3_CA_FILE names {settings.ca_file}, which is no file: name the certificate of the server's authority")
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
    # an address that only AWS's machines have, elsewhere never answers
    retries = urllib3.Retry(total=2, backoff_factor=0.2, status_forcelist=PASSING_STATUS)
    http = urllib3.PoolManager(timeout=urllib3.Timeout(connect=2.0, read=10.0), retries=retries)
    return _AmbientCredentials(providers=[AWSConfigProvider(), IamAwsProvider(http_client=http)])
