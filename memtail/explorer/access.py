"""Access control, access log and security headers of the explorer."""

import hmac
import ipaddress
import re
import time
from collections.abc import Awaitable, Callable
from urllib.parse import parse_qs, quote, urlsplit

import structlog
from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse, Response
from starlette.requests import ClientDisconnect

from memtail.explorer.sessions import SESSION_SECONDS, LoginLimit, Sessions

log = structlog.get_logger()

COOKIE = "memtail-explorer"
#: Path of the request that ends a session.
LOGOUT = "/logout"
# Largest form read, in bytes; a form holds a token.
_MOST_BYTES = 4096
# Longest path in the access log, in characters.
_MOST_PATH = 500
# A name or an address with an optional port. Anything else could make another path of a URL that is put together with it.
_HOST = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")

#: Policy of all pages: only the explorer's own files, no frames, no inline scripts or styles.
POLICY = (
    "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
#: Policy of the report, which has inline styles and images but no script.
REPORT_POLICY = (
    "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)

_HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

Refusal = Callable[[Request, int, str], Response]


def guard(app: FastAPI, token: str | None, refuse: Refusal, log_requests: bool = False) -> None:
    """Require a token on every request, and add security headers to every response.

    Args:
        app: the application.
        token: the token, accepted as `Authorization: Bearer TOKEN`, or once as `?token=TOKEN` or in a form, which open a session. If None,
            everybody who reaches the server has access, but only at localhost or an IP address: with a DNS name, pages of other sites could
            read the explorer (DNS rebinding).
        refuse: makes the page of a refusal, from the request, a status and a line.
        log_requests: whether to log each request, without its query.
    """
    door = _Door(token, refuse)

    @app.middleware("http")
    async def answer(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        began, path = time.monotonic(), request.scope["path"]
        try:
            response = door.check(request, await _submitted_token(request)) or await call_next(request)
        except ClientDisconnect:
            response = refuse(request, 408, "the form did not arrive in time")
        except Exception as error:
            log.error("page failed", path=path, exc_info=error)
            response = refuse(request, 500, "internal error, see the log of the explorer")
        for name, value in _HEADERS.items():
            response.headers.setdefault(name, value)
        if log_requests:
            facts = {"method": request.method, "path": path[:_MOST_PATH], "status": response.status_code, "address": _client(request)}
            log.info("request", **facts, seconds=round(time.monotonic() - began, 4))
        return response


class _Door:
    """Decides on requests.

    Authorizes `scope["path"]`, which routes are found by: old versions of Starlette make the path of `request.url` of the header Host.
    """

    def __init__(self, token: str | None, refuse: Refusal) -> None:
        self._token, self._refuse = token, refuse
        self._sessions, self._limit = Sessions(), LoginLimit()

    def check(self, request: Request, submitted: str | None) -> Response | None:
        """Return a refusal, or a redirect that begins or ends a session, or None if the request is authorized."""
        path, host = request.scope["path"], request.headers.get("host", "")
        if not _HOST.fullmatch(host):
            return self._refuse(request, 400, "the header Host must be a name or an address")
        if path.startswith("/static/"):
            return None
        if self._token is None:
            if _is_local_or_ip(host):
                return None
            return self._refuse(request, 403, "without a token, the explorer answers only at localhost or an IP address: set one")
        session = request.cookies.get(COOKIE, "")
        if request.method == "POST" and path == LOGOUT:
            self._sessions.close(session)
            ended = RedirectResponse("/", 303)
            ended.delete_cookie(COOKIE)
            return ended
        if submitted is not None:
            return self._refusal(request, submitted.encode(errors="replace")) or self._begin_session(request)
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self._refusal(request, bearer.strip().encode("latin-1"))  # as starlette decodes headers
        if self._sessions.is_open(session):
            return None
        return self._refuse(request, 401, "ask the operator of this explorer for the token")

    def _refusal(self, request: Request, submitted: bytes) -> Response | None:
        """Return a refusal unless a token is right and may be tried."""
        address = _client(request)
        if seconds := self._limit.wait(address):
            response = self._refuse(request, 429, "too many wrong tokens, try again in a minute")
            response.headers["Retry-After"] = str(seconds)
            return response
        if self._token is not None and hmac.compare_digest(submitted, self._token.encode()):
            return None
        self._limit.count(address)
        log.warning("login refused", address=address)
        return self._refuse(request, 401, "wrong token")

    def _begin_session(self, request: Request) -> Response:
        log.info("login accepted", address=_client(request))
        query = request.url.remove_query_params("token").query
        path = f"/{quote(request.scope['path'].lstrip('/'))}"  # two slashes would redirect to another server
        response = RedirectResponse(f"{path}?{query}" if query else path, 303)
        # the header comes from a proxy that terminates TLS, the first of several; a client that forges it only restricts its own cookie
        client_scheme = request.headers.get("x-forwarded-proto", "").partition(",")[0].strip().lower()
        secure = "https" in (request.url.scheme, client_scheme)
        # lax, so that links from other sites work: no request with the cookie changes anything but the session
        response.set_cookie(COOKIE, self._sessions.open(), max_age=SESSION_SECONDS, httponly=True, samesite="lax", secure=secure)
        return response


async def _submitted_token(request: Request) -> str | None:
    """Return the token in the form of a request, else in its query."""
    size = request.headers.get("content-length", "")
    if request.method == "POST" and size.isdecimal() and int(size) <= _MOST_BYTES:
        form = parse_qs((await request.body()).decode(errors="replace"))
        if "token" in form:
            return form["token"][0].strip()
    return request.query_params.get("token")


def _client(request: Request) -> str:
    """Return the address of the client, which uvicorn takes from X-Forwarded-For if the request is from a trusted proxy."""
    return request.client.host if request.client else ""


def _is_local_or_ip(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False
