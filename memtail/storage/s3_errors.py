"""What goes wrong with an S3 server: what may pass, what it is in a few words, and its mend."""

import re
import ssl
from xml.etree.ElementTree import ParseError

import urllib3
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, ReadTimeoutError, SSLError

PASSING_STATUS = {429, 500, 502, 503, 504}
_PASSING_CODES = {
    "ConditionalRequestConflict",
    "InternalError",
    "NoSuchUpload",  # minio aborts an upload in parts whose last answer was lost, and then says only that there is none to abort
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
}
KEY_MEND = "set MEMTAIL_S3_ACCESS_KEY and MEMTAIL_S3_SECRET_KEY to a key of this server"
_REGION_MEND = "set MEMTAIL_S3_REGION to the bucket's region"
_MENDS = {
    "AccessDenied": "let this key list the bucket, and get, put and delete objects in it",
    "AuthorizationHeaderMalformed": _REGION_MEND,
    "ExpiredToken": "get a new session token",
    "InvalidAccessKeyId": KEY_MEND,
    "InvalidToken": KEY_MEND,
    "InvalidTokenId": KEY_MEND,
    "NoSuchBucket": "make the bucket, or name one that is there",
    "NotImplemented": "use a server that knows conditional writes",
    "PermanentRedirect": _REGION_MEND,
    "RequestTimeTooSkewed": "set the clock of this machine",
    "SignatureDoesNotMatch": KEY_MEND,
}


def error_in(response: urllib3.BaseHTTPResponse) -> MinioException:
    """The error that an answer reports."""
    try:
        return S3Error.fromxml(response)
    except (ParseError, UnicodeDecodeError):
        return ServerError(f"server failed with HTTP status code {response.status}", response.status)


def _status(error: BaseException) -> int | None:
    if isinstance(error, S3Error):
        return error.response.status
    if isinstance(error, ServerError):
        return error.status_code
    return error._code if isinstance(error, InvalidResponseError) else None


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, SSLError):
        return any(isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError | ssl.SSLSyscallError) for cause in error.args)
    if isinstance(error, HTTPError):
        return True
    return _status(error) in PASSING_STATUS or (isinstance(error, S3Error) and error.code in _PASSING_CODES)


def outcome_of(error: BaseException) -> str:
    """How a request ended that raised this: "absent" (there is no such object), "refused", or "failed", which may pass."""
    if isinstance(error, S3Error) and error.code == "NoSuchKey":
        return "absent"
    status = _status(error)
    return "failed" if may_pass(error) or status is None or status >= 500 else "refused"


def cause_of(error: BaseException, timeout: float) -> str:
    """What went wrong, in a few words of one line, which hold no URL: a signature may be in it."""
    if isinstance(error, S3Error):
        return " ".join(f"{error.code}: {error.message}".split())[:300]
    if (status := _status(error)) is not None:
        return f"HTTP status {status}"
    if isinstance(error, NewConnectionError):  # a ConnectTimeoutError, too
        return re.sub(r"\[Errno -?\d+\] ", "", str(error).rpartition(": ")[2])
    if isinstance(error, ConnectTimeoutError | ReadTimeoutError):
        return f"no answer within {timeout:g} s"
    if isinstance(error, SSLError):
        return f"TLS: {error}"[:300]
    if isinstance(error, HTTPError):
        return f"the connection was lost: {type(error).__name__}"
    return "the answer is not that of an S3 server"


def mend_of(error: BaseException) -> str:
    """What to do about it."""
    if isinstance(error, S3Error):
        return _MENDS.get(error.code or "", "see what the server's log says")
    if isinstance(error, SSLError):
        return "name the certificate of the server's authority in MEMTAIL_S3_CA_FILE, and the server as its certificate does"
    if isinstance(error, HTTPError):
        return "check that the server is up, and that MEMTAIL_S3_ENDPOINT is its URL"
    return "check MEMTAIL_S3_ENDPOINT" if (_status(error) or 0) < 500 else "see what the server's log says"
