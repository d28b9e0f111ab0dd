"""Access control and security headers of the explorer."""

import hashlib
import hmac
import ipaddress
from collections.abc import Awaitable, Callable
from urllib.parse import parse_qs, urlsplit

import structlog
from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse, Response

log = structlog.get_logger()

COOKIE = "memtail-explorer"
# Largest form read, in bytes; a form holds a token.
_MOST_BYTES = 4096

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


def guard(app: FastAPI, token: str | None, refuse: Refusal) -> None:
    """Require a token on every request, and add security headers to every response.

    Args:
        app: the application.
        token: the token, accepted as `Authorization: Bearer TOKEN`, or once as `?token=TOKEN` or in a form, which set a cookie. If None,
            everybody who reaches the server has access, but only at localhost or an IP address: with a DNS name, pages of other sites could
            read the explorer (DNS rebinding).
        refuse: makes the page of a refusal, from the request, a status and a line.
    """

    @app.middleware("http")
    async def answer(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        try:
            response = _check(request, token, await _submitted_token(request), refuse) or await call_next(request)
        except Exception as error:
            log.error("page failed", path=request.url.path, exc_info=error)
            response = refuse(request, 500, "internal error, see the log of the explorer")
        for name, value in _HEADERS.items():
            response.headers.setdefault(name, value)
        return response


async def _submitted_token(request: Request) -> str | None:
    """Return the token in the form of a request, else in its query."""
    size = request.headers.get("content-length", "")
    if request.method == "POST" and size.isdecimal() and int(size) <= _MOST_BYTES:
        form = parse_qs((await request.body()).decode(errors="replace"))
        if "token" in form:
            return form["token"][0].strip()
    return request.query_params.get("token")


def _check(request: Request, token: str | None, submitted: str | None, refuse: Refusal) -> Response | None:
    """Return a refusal, or a redirect that sets the cookie, or None if the request is authorized."""
    if request.url.path.startswith("/static/"):
        return None
    if token is None:
        if _is_local_or_ip(request.headers.get("host", "")):
            return None
        return refuse(request, 403, "without a token, the explorer answers only at localhost or an IP address: set MEMTAIL_EXPLORER_TOKEN")
    if submitted is not None:
        if not _equal(submitted.encode(errors="replace"), token):
            return refuse(request, 401, "wrong token")
        url = request.url.remove_query_params("token")
        path = f"/{url.path.lstrip('/')}"  # two slashes would redirect to another server
        response = RedirectResponse(f"{path}?{url.query}" if url.query else path, 303)
        # the header comes from a proxy that terminates TLS; a client that forges it only restricts its own cookie
        secure = "https" in (request.url.scheme, request.headers.get("x-forwarded-proto"))
        # lax, so that links from other sites work: no request changes anything
        response.set_cookie(COOKIE, _digest(token), httponly=True, samesite="lax", secure=secure)
        return response
    # starlette decodes headers as latin-1
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and _equal(bearer.strip().encode("latin-1"), token):
        return None
    if _equal(request.cookies.get(COOKIE, "").encode("latin-1"), _digest(token)):
        return None
    return refuse(request, 401, "ask the operator of this explorer for the token")


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _equal(submitted: bytes, expected: str) -> bool:
    return hmac.compare_digest(submitted, expected.encode())


def _is_local_or_ip(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False
