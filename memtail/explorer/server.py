"""Serving the explorer over HTTP."""

import socket

import uvicorn

from memtail.errors import MemtailError
from memtail.explorer.app import create
from memtail.storage import ObjectStore


class AddressError(MemtailError):
    """The explorer cannot be served there."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections from now on. Port 0 is any that is free. Raises: AddressError: it cannot be had."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        place = f"{host or 'all addresses'}, port {port}"
        raise AddressError(f"the explorer cannot listen on {place} ({reason}): choose another address or port") from None


def serve(store: ObjectStore, token: str | None, listening: socket.socket) -> None:
    """Answer on a socket until the process is interrupted or terminated.

    Args:
        store, token: as for `memtail.explorer.app.create`.
        listening: as `listen` gives it.
    """
    config = uvicorn.Config(create(store, token), log_level="warning", access_log=False, server_header=False, date_header=True)
    uvicorn.Server(config).run(sockets=[listening])
