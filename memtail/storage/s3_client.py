"""Client of one bucket of an S3 server: connections, credentials, and retry of requests.

Requests are made by minio-py. Those that it cannot make, or not with all headers, are only signed by it: its `put_object` drops conditions.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import TypeVar
from urllib.parse import parse_qs, quote, urlencode, urlsplit
from xml.etree.ElementTree import ParseError

import structlog
import urllib3
from minio import Minio
from minio.credentials.credentials import Credentials
from minio.credentials.providers import AWSConfigProvider, ChainedProvider, IamAwsProvider, Provider, StaticProvider
from minio.error import MinioException, S3Error
from minio.signer import sign_v4_s3
from tenacity import RetryCallState, Retrying, stop_after_attempt, stop_after_delay, wait_random_exponential
from urllib3.exceptions import HTTPError

from memtail.errors import AccessRefusedError, StoreError
from memtail.settings import S3Settings, in_file, secret
from memtail.storage import ObjectNotFound, Observer, UnreachableError
from memtail.storage.s3_errors import (
    ACCESS_CODES,
    KEY_FIX,
    REFUSED_KEY_CODES,
    TRANSIENT_STATUS,
    cause_of,
    error_in,
    fix_of,
    is_transient,
    outcome_of,
)

log = structlog.get_logger()
T = TypeVar("T")

# In place of the digest of a request's body, which has a Content-MD5.
_UNSIGNED = "UNSIGNED-PAYLOAD"
_LONGEST_PAUSE = 10.0
_THREADS = 6
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
_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Connection:
    """Connections of one process to the server, used by its threads."""

    bucket: str
    s3: Minio
    http: urllib3.PoolManager
    credentials: Provider

    @contextmanager
    def opened(self, name: str, headers: Mapping[str, str] = _NO_HEADERS) -> Iterator[urllib3.BaseHTTPResponse]:
        """Yield the response to a read of an object, whose content has not been received yet."""
        response = self.s3.get_object(bucket_name=self.bucket, object_name=name, request_headers={**headers})
        try:
            yield response
        finally:
            response.close()
            response.release_conn()

    def signed(
        self,
        method: str,
        name: str,
        query: Mapping[str, str] = _NO_HEADERS,
        body: bytes | None = None,
        headers: Mapping[str, str] = _NO_HEADERS,
    ) -> urllib3.BaseHTTPResponse:
        """Return the response to a request.

        Args:
            method: of HTTP.
            name: of the object.
            query: parameters of the URL, which are signed.
            body: of the request, which is not signed.
            headers: of the request, which are signed.

        Raises:
            MinioException: the status is not 200 or 204.
        """
        credentials, date = self.credentials.retrieve(), datetime.now(UTC)
        # a presigned URL has the object's address and the bucket's region, but its signature covers no headers, and servers refuse those
        # that begin with x-amz- unless they are signed
        presigned = urlsplit(self.s3.get_presigned_url(method=method, bucket_name=self.bucket, object_name=name))
        region = parse_qs(presigned.query)["X-Amz-Credential"][0].split("/")[2]
        url = presigned._replace(query=urlencode(query, quote_via=quote))
        to_sign: dict[str, str | list[str] | tuple[str]] = {
            **headers,
            "Host": presigned.netloc,
            "x-amz-content-sha256": _UNSIGNED,
            "x-amz-date": date.strftime("%Y%m%dT%H%M%SZ"),
        }
        if credentials.session_token:
            to_sign["X-Amz-Security-Token"] = credentials.session_token
        signed = sign_v4_s3(
            method=method, url=url, region=region, headers=to_sign, credentials=credentials, content_sha256=_UNSIGNED, date=date
        )
        response = self.http.urlopen(method, url.geturl(), body=body, headers=signed, redirect=False)
        if response.status not in (200, 204):
            raise error_in(response)
        return response


def etag(response: urllib3.BaseHTTPResponse) -> str:
    """Return the ETag of the response's object, without quotes; raise KeyError if it has none."""
    return response.headers["ETag"].strip('"')


def in_parallel(work: Callable[[int], object], parts: Iterable[int]) -> None:
    """Call a function with each number, in a few threads; after an exception, begin no more calls and raise it."""
    pool = ThreadPoolExecutor(_THREADS)
    try:
        for future in as_completed([pool.submit(work, part) for part in parts]):
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)


class Client:
    """Makes requests to a bucket. Those that fail for a transient reason are retried, and each failure is logged as a warning.

    Args:
        address: of the store, for messages.
        bucket: its name.
        settings: address and credentials of the server.
        rereads: whether the settings are those of the environment, whose files of keys are read again.
        attempts: requests in vain before a retried request fails.
        patience: seconds in vain before a retried request fails.
        timeout: seconds to wait for a connection, and for each response.
        observe: is called after each request.

    Raises:
        StoreError: the settings cannot be those of a server. No request is made.
    """

    def __init__(
        self,
        address: str,
        bucket: str,
        settings: S3Settings,
        *,
        rereads: bool,
        attempts: int,
        patience: float,
        timeout: float,
        observe: Observer | None,
    ) -> None:
        self.address, self.bucket, self.settings, self._rereads = address, bucket, settings, rereads
        self._accepted = False
        self._attempts, self._patience, self._timeout, self._observe = attempts, patience, timeout, observe
        self._connections: dict[int, Connection] = {}
        self._connection()

    def run(
        self,
        key: str,
        done: str,
        action: Callable[[Connection], T],
        result: Callable[[T], tuple[str, int]] = lambda _: ("ok", 0),
        progressed: Callable[[], bool] = lambda: False,
    ) -> T:
        """Run an action, and retry it after transient failures.

        Args:
            key: of the object, for the error.
            done: the verb of the error, of `_OPERATIONS`.
            action: one or a few requests about one object.
            result: from the action's value, the outcome and the bytes for the observer.
            progressed: whether an action that failed has made progress, after which attempts and patience count anew.

        Raises:
            ObjectNotFound: the server has no such object.
            UnreachableError: the server fails for a transient reason.
            AccessRefusedError: the server does not know the key or the bucket, or does not let the key use it.
            StoreError: the server refuses for another reason.
        """

        def observed(connection: Connection) -> T:
            began, outcome, size = time.perf_counter(), "ok", 0
            try:
                returned = action(connection)
                outcome, size = result(returned)
                self._accepted = True
                return returned
            except _ERRORS as error:
                outcome = outcome_of(error)
                raise
            finally:
                if self._observe:
                    self._observe(_OPERATIONS[done], outcome, time.perf_counter() - began, size)

        def may_pass(state: RetryCallState) -> bool:
            error = state.outcome.exception() if state.outcome else None
            if error is None or not (is_transient(error) or self._awaits_key(error, connection)):
                return False
            if progressed():
                state.attempt_number, state.start_time = 1, time.monotonic()
            return True

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

        connection = self._connection()
        retrying = Retrying(
            retry=may_pass,
            stop=stop_after_attempt(self._attempts) | stop_after_delay(self._patience),
            wait=wait_random_exponential(multiplier=0.25, max=_LONGEST_PAUSE),
            before_sleep=warn,
            reraise=True,
        )
        try:
            return retrying(observed, connection)
        except _ERRORS as error:
            if isinstance(error, S3Error) and error.code == "NoSuchKey":
                raise ObjectNotFound(f"store {self.address}: there is no '{key}'") from None
            cause, fix = cause_of(error, self._timeout), fix_of(error)
            at = f"store {self.address} at {self.settings.endpoint}"
            # `from None`: the cause may hold a signed URL
            kind: type[StoreError] = UnreachableError if is_transient(error) else StoreError
            if isinstance(error, S3Error) and error.code in ACCESS_CODES:
                kind = AccessRefusedError
            raise kind(f"{at}: '{key}' cannot be {done} ({cause}): {fix}") from None

    def _awaits_key(self, error: BaseException, connection: Connection) -> bool:
        """Return whether a key is refused that was accepted before, and its successor will be found where the key was."""
        if not (self._accepted and isinstance(error, S3Error) and error.code in REFUSED_KEY_CODES):
            return False
        if isinstance(connection.credentials, _AmbientCredentials):
            connection.credentials.forget()
        return not isinstance(connection.credentials, StaticProvider)

    def _connection(self) -> Connection:
        """Return the connection of this process, since sockets must not be shared with the process that it was forked from.

        The parent's connection is kept: closing it could wait for ever for a lock that was held during the fork.
        """
        own = self._connections.get(os.getpid())
        return own or self._connections.setdefault(os.getpid(), _connect(self.bucket, self.settings, self._rereads, self._timeout))


class _FileCredentials(Provider):
    """Keys from the files that the environment names, read for each request."""

    def __init__(self) -> None:
        self._last: Credentials | None = None

    def retrieve(self) -> Credentials:
        try:
            access, key, token = map(secret, S3Settings.key_variables())
            if access and key:
                self._last = Credentials(access, key, token)
        except StoreError:  # a file that is being replaced: the server tells whether the last key is still valid
            if self._last is None:
                raise
        if self._last is None:
            raise StoreError(f"there is no key for the S3 server: {KEY_FIX}")
        return self._last


class _AmbientCredentials(Provider):
    """Credentials from AWS's configuration file, a web identity, a container or an instance, used if no key is set."""

    def __init__(self) -> None:
        self.forget()

    def retrieve(self) -> Credentials:
        try:
            return self._chain.retrieve()
        except (ValueError, KeyError, OSError, HTTPError):  # their messages may hold a token
            raise StoreError(f"there is no key for the S3 server, here or from AWS: {KEY_FIX}") from None

    def forget(self) -> None:
        """Forget credentials that are kept until they expire."""
        # the address of instance credentials exists only on AWS's machines; elsewhere it does not answer
        retries = urllib3.Retry(total=2, backoff_factor=0.2, status_forcelist=TRANSIENT_STATUS)
        http = urllib3.PoolManager(timeout=urllib3.Timeout(connect=2.0, read=10.0), retries=retries)
        self._chain = ChainedProvider(providers=[AWSConfigProvider(), IamAwsProvider(http_client=http)])


def _connect(bucket: str, settings: S3Settings, rereads: bool, timeout: float) -> Connection:
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
    credentials = _credentials(settings, rereads)
    try:
        url = urlsplit(settings.endpoint)
        if url.username or url.password or url.scheme not in ("http", "https") or url.path.strip("/") or url.query or url.fragment:
            raise ValueError
        s3 = Minio(
            endpoint=url.netloc,
            secure=url.scheme == "https",
            region=settings.region,
            http_client=http,
            credentials=credentials,
        )
    except ValueError:
        raise StoreError("MEMTAIL_S3_ENDPOINT or MEMTAIL_S3_REGION is malformed: an endpoint is like https://s3.example.org:9000") from None
    if settings.addressing == "virtual":
        s3.enable_virtual_style_endpoint()
    elif settings.addressing == "path":
        s3.disable_virtual_style_endpoint()
    return Connection(bucket, s3, http, credentials)


def _credentials(settings: S3Settings, rereads: bool) -> Provider:
    if not (settings.access_key and settings.secret_key):
        return _AmbientCredentials()
    if rereads and any(map(in_file, S3Settings.key_variables())):
        return _FileCredentials()
    return StaticProvider(access_key=settings.access_key, secret_key=settings.secret_key, session_token=settings.session_token)
