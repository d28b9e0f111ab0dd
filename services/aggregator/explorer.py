"""Runs the explorer in a child process of the aggregator, so that aggregation and page requests do not delay each other."""

import multiprocessing
import socket

import structlog

from memtail.explorer.server import listen, serve
from memtail.processes import follow_parent
from memtail.settings import ExplorerSettings
from memtail.storage import ObjectStore
from memtail.storage.open import open_store
from services.aggregator.metrics import EXPLORER_RESTARTS
from services.common.process import configure_logs

log = structlog.get_logger()

# Seconds until a page request fails when the bucket does not answer.
_STORE_TIMEOUT = 20.0


class Explorer:
    """The explorer's process. Listens from construction on, and ends with the aggregator.

    Args:
        address: address of the store.
        port: port to listen on.

    Raises:
        AddressError: the port is unavailable.
        StoreError: the file with the token cannot be read.
    """

    def __init__(self, address: str, port: int) -> None:
        self._address, self._token = address, ExplorerSettings.from_environment().token
        self._listening = listen("", port)
        self._process: multiprocessing.process.BaseProcess | None = None

    def ensure_running(self) -> None:
        """Start the process if it is not running, also after a crash."""
        if self._process is not None and self._process.is_alive():
            return
        if self._process is not None:
            EXPLORER_RESTARTS.inc()
            log.error("the explorer ended and is started again", exit_code=self._process.exitcode)
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_serve, args=(self._address, self._token, self._listening), name="explorer", daemon=True)
        self._process.start()


def _serve(address: str, token: str | None, listening: socket.socket) -> None:
    configure_logs()
    follow_parent()
    serve(_open(address), token, listening)


def _open(address: str) -> ObjectStore:
    return open_store(address, verify=False, patience=_STORE_TIMEOUT, timeout=_STORE_TIMEOUT / 2)
