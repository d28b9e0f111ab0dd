"""HTTP server of the explorer."""

import ipaddress
import secrets
import socket
from collections.abc import Callable
from urllib.parse import quote

import uvicorn

from memtail.errors import MemtailError
from memtail.explorer.app import create
from memtail.explorer.connections import Connection, most_connections
from memtail.settings import EXPLORER_TOKEN_VARIABLE, ExplorerSettings
from memtail.storage import ObjectStore

# Timeout of open requests at shutdown, in seconds.
_SHUTDOWN_SECONDS = 5
# Interval of heartbeats, in seconds.
_HEARTBEAT_SECONDS = 5


#: Fewest characters of a token, as many as a random one of 96 bits has.
LEAST_TOKEN = 16


class AddressError(MemtailError):
    """The explorer cannot listen on an address."""


class TokenError(MemtailError):
    """The explorer's token is missing or too short."""


def listen(host: str, port: int) -> socket.socket:
    """Open a socket that accepts connections; port 0 is any free port. Raises: AddressError: the address is unavailable."""
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition(" (while attempting")[0]
        place = f"{host or 'all addresses'}, port {port}"
        raise AddressError(f"the explorer cannot listen on {place} ({reason}): choose another address or port") from None
    # without it, the end of a response waits up to 40 ms for an acknowledgement; connections inherit the option
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def configured_token() -> str | None:
    """Return the configured token, or None.

    Raises:
        TokenError: it is too short.
        StoreError: its file cannot be read.
    """
    token = ExplorerSettings.from_environment().token
    if token is not None and len(token) < LEAST_TOKEN:
        raise TokenError(f"{EXPLORER_TOKEN_VARIABLE} has {len(token)} characters: set it to {LEAST_TOKEN} random ones or more")
    return token


def token_for(host: str) -> str | None:
    """Return the configured token, or a random one if other machines can reach the address, or None. Raises: TokenError, StoreError."""
    return configured_token() or (None if _is_loopback(host) else secrets.token_urlsafe(24))


def address(listening: socket.socket, token: str | None) -> str:
    """Return the URL for a browser, with the token if there is one."""
    host, port = listening.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = socket.gethostname()
    query = f"?token={quote(token)}" if token else ""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/{query}"


def serve(
    store: ObjectStore, token: str | None, listening: socket.socket, log_requests: bool = False, heartbeat: Callable[[], None] | None = None
) -> None:
    """Serve until the process is interrupted or terminated.

    Args:
        store: the store whose experiments are shown.
        token: the access token (see `memtail.explorer.access`).
        listening: socket of `listen`.
        log_requests: whether to log each request.
        heartbeat: called every few seconds while the server handles requests.
    """

    async def notify() -> None:
        if heartbeat:
            heartbeat()

    config = uvicorn.Config(
        create(store, token, log_requests),
        log_config=None,
        access_log=False,
        server_header=False,
        http=Connection,
        backlog=most_connections() // 2,  # also the number accepted at once
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
        callback_notify=notify,
        timeout_notify=_HEARTBEAT_SECONDS,
    )
    uvicorn.Server(config).run(sockets=[listening])


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
