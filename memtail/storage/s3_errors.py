"""Errors of an S3 server: whether they are transient, their cause in a few words, and their fix."""

import re
import ssl
from xml.etree.ElementTree import ParseError

import urllib3
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, ReadTimeoutError, SSLError

TRANSIENT_STATUS = {429, 500, 502, 503, 504}
_TRANSIENT_CODES = {
    "BadDigest",  # the content was damaged on its way
    "ConditionalRequestConflict",
    "IncompleteBody",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
}
#: Errors about a key that the server does not know, or no longer.
REFUSED_KEY_CODES = {
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "InvalidTokenId",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
#: Errors about a key or a bucket that the server has not, or not yet.
ACCESS_CODES = {*REFUSED_KEY_CODES, "AccessDenied", "NoSuchBucket"}
KEY_FIX = "set MEMTAIL_S3_ACCESS_KEY and MEMTAIL_S3_SECRET_KEY to a key of this server"
_REGION_FIX = "set MEMTAIL_S3_REGION to the bucket's region"
_FIXES = {
    "AccessDenied": "let this key list the bucket, and get, put and delete objects in it",
    "AuthorizationHeaderMalformed": _REGION_FIX,
    "ExpiredToken": "get a new session token",
    "InvalidAccessKeyId": KEY_FIX,
    "InvalidToken": KEY_FIX,
    "InvalidTokenId": KEY_FIX,
    "NoSuchBucket": "make the bucket, or name one that exists",
    "NotImplemented": "use a server with conditional writes",
    "PermanentRedirect": _REGION_FIX,
    "RequestTimeTooSkewed": "set the clock of this machine",
    "SignatureDoesNotMatch": KEY_FIX,
}


def error_in(response: urllib3.BaseHTTPResponse) -> MinioException:
    """Return the error that a response reports."""
    try:
        return S3Error.fromxml(response)
    except (ParseError, UnicodeDecodeError):
        return ServerError(f"server failed with HTTP status code {response.status}", response.status)


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of the response that an error reports, None if there was no response."""
    if isinstance(error, S3Error):
        return error.response.status
    if isinstance(error, ServerError):
        return error.status_code
    return error._code if isinstance(error, InvalidResponseError) else None


def is_transient(error: BaseException) -> bool:
    """Return whether a retry may succeed."""
    if isinstance(error, SSLError):
        return any(isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError | ssl.SSLSyscallError) for cause in error.args)
    if isinstance(error, HTTPError):
        return True
    return status_of(error) in TRANSIENT_STATUS or (isinstance(error, S3Error) and error.code in _TRANSIENT_CODES)


def outcome_of(error: BaseException) -> str:
    """Return the outcome of a request that raised an error: "absent" (no object has the key), "refused", or "failed" (transient)."""
    if isinstance(error, S3Error) and error.code == "NoSuchKey":
        return "absent"
    status = status_of(error)
    return "failed" if is_transient(error) or status is None or status >= 500 else "refused"


def cause_of(error: BaseException, timeout: float) -> str:
    """Return the cause of an error in a few words of one line, without URLs, which may hold a signature.

    Args:
        error: raised by a request.
        timeout: seconds waited for a response.
    """
    if isinstance(error, S3Error):
        return " ".join(f"{error.code}: {error.message}".split())[:300]
    if (status := status_of(error)) is not None:
        return f"HTTP status {status}"
    if isinstance(error, NewConnectionError):  # includes ConnectTimeoutError
        return re.sub(r"\[Errno -?\d+\] ", "", str(error).rpartition(": ")[2])
    if isinstance(error, ConnectTimeoutError | ReadTimeoutError):
        return f"no answer within {timeout:g} s"
    if isinstance(error, SSLError):
        return f"TLS: {error}"[:300]
    if isinstance(error, HTTPError):
        return f"the connection was lost: {type(error).__name__}"
    return "the answer is not that of an S3 server"


def fix_of(error: BaseException) -> str:
    """Return the fix of an error."""
    if isinstance(error, S3Error):
        return _FIXES.get(error.code or "", "see what the server's log says")
    if isinstance(error, SSLError):
        return "name the certificate of the server's authority in MEMTAIL_S3_CA_FILE, and the server as its certificate does"
    if isinstance(error, HTTPError):
        return "check that the server is up, and that MEMTAIL_S3_ENDPOINT is its URL"
    return "check MEMTAIL_S3_ENDPOINT" if (status_of(error) or 0) < 500 else "see what the server's log says"
