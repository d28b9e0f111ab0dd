"""Serving the explorer over HTTP."""

import ipaddress
import secrets
import socket
from urllib.parse import quote

import uvicorn

from memtail.errors import MemtailError
from memtail.explorer.app import create
from memtail.settings import ExplorerSettings
from memtail.storage import ObjectStore

# Seconds for which answers that are being made are waited for at the end.
_LAST_ANSWERS = 5


class AddressError(MemtailError):
    """The explorer cannot be served there."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections from now on. Port 0 is any that is free. Raises: AddressError: it cannot be had."""
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition(" (while attempting")[0]
        place = f"{host or 'all addresses'}, port {port}"
        raise AddressError(f"the explorer cannot listen on {place} ({reason}): choose another address or port") from None
    # else the end of an answer waits 40 ms for the browser to say that it has the beginning; connections have this of their listener
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def token_for(host: str) -> str | None:
    """The token that is set; where none is and other machines can reach the address, one made for the occasion. Raises: StoreError."""
    token = ExplorerSettings.from_environment().token
    return token or (None if _is_loopback(host) else secrets.token_urlsafe(24))


def address(listening: socket.socket, token: str | None) -> str:
    """What to give a browser, with the token if there is one."""
    host, port = listening.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = socket.gethostname()
    query = f"?token={quote(token)}" if token else ""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/{query}"


def serve(store: ObjectStore, token: str | None, listening: socket.socket) -> None:
    """Answer on a socket until the process is interrupted or terminated.

    Args:
        store, token: as for `memtail.explorer.app.create`.
        listening: as `listen` gives it.
    """
    config = uvicorn.Config(
        create(store, token), log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=_LAST_ANSWERS
    )
    uvicorn.Server(config).run(sockets=[listening])


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
