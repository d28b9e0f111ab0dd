"""Who may look, and what browsers may do with what they get."""

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
# Bytes of the largest form that is read: it holds a token.
_MOST_BYTES = 4096

#: Nothing but this page's own files; no page of others may show it in a frame, and no script or style stands in a page itself.
POLICY = (
    "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
#: Of the report, which has its styles and images in itself, and no script.
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
    """Let an application answer only those who may look, with headers that keep browsers from doing anything else with its pages.

    Args:
        app: the application.
        token: what must be given: as `Authorization: Bearer TOKEN`, or once as `?token=TOKEN` or by a form, which leave a cookie. If None,
            whoever reaches it may look, but only under the name localhost or an address: under another name a page from elsewhere could
            read it.
        refuse: makes the page for a request, a status and a line.
    """

    @app.middleware("http")
    async def answer(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        try:
            response = _refused(request, token, await _given(request), refuse) or await go_on(request)
        except Exception as error:
            log.error("page not made", path=request.url.path, exc_info=error)
            response = refuse(request, 500, "this cannot be shown because of a defect, which is in the log")
        for name, value in _HEADERS.items():
            response.headers.setdefault(name, value)
        return response


async def _given(request: Request) -> str | None:
    """The token in the form of a request, else in its address."""
    size = request.headers.get("content-length", "")
    if request.method == "POST" and size.isdecimal() and int(size) <= _MOST_BYTES:
        form = parse_qs((await request.body()).decode(errors="replace"))
        if "token" in form:
            return form["token"][0].strip()
    return request.query_params.get("token")


def _refused(request: Request, token: str | None, given: str | None, refuse: Refusal) -> Response | None:
    if request.url.path.startswith("/static/"):
        return None
    if token is None:
        if _is_an_address(request.headers.get("host", "")):
            return None
        return refuse(request, 403, "without a token it answers on localhost or an address only: set MEMTAIL_EXPLORER_TOKEN")
    if given is not None:
        if not _equal(given.encode(errors="replace"), token):
            return refuse(request, 401, "that is not the token")
        url = request.url.remove_query_params("token")
        there = f"/{url.path.lstrip('/')}"  # two slashes would lead to another server
        response = RedirectResponse(f"{there}?{url.query}" if url.query else there, 303)
        # as a proxy says that ends TLS before it; whoever says so of himself keeps his cookie from going out in the clear
        secure = "https" in (request.url.scheme, request.headers.get("x-forwarded-proto"))
        # lax, since a link from elsewhere is to lead here: no page changes anything
        response.set_cookie(COOKIE, _digest(token), httponly=True, samesite="lax", secure=secure)
        return response
    # headers come as bytes, which are given as if each were a letter
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and _equal(bearer.strip().encode("latin-1"), token):
        return None
    if _equal(request.cookies.get(COOKIE, "").encode("latin-1"), _digest(token)):
        return None
    return refuse(request, 401, "whoever serves this page can say which")


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _equal(given: bytes, wanted: str) -> bool:
    return hmac.compare_digest(given, wanted.encode())


def _is_an_address(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False
