"""The explorer beside the aggregator: a process of its own, so that neither a long fold nor a large page makes the other wait."""

import multiprocessing
import os
import socket
import threading

import structlog

from memtail.explorer.server import listen, serve
from memtail.settings import ExplorerSettings
from memtail.storage import ObjectStore
from memtail.storage.open import open_store
from services.aggregator.metrics import EXPLORER_RESTARTS
from services.common.process import configure_logs

log = structlog.get_logger()

# Seconds for which somebody who looks at a page waits for a bucket that does not answer.
_PATIENCE = 20.0


class Explorer:
    """Serves the explorer until this process ends. It is started again if it ends before.

    Args:
        address: of the store.
        port: where it listens, from now on.

    Raises:
        AddressError: the port cannot be had.
        StoreError: the file that holds the token cannot be read.
    """

    def __init__(self, address: str, port: int) -> None:
        self._address, self._token = address, ExplorerSettings.from_environment().token
        self._listening = listen("", port)
        self._process: multiprocessing.process.BaseProcess | None = None

    def keep(self) -> None:
        """Start it unless it runs."""
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
    threading.Thread(target=_end_with_parent, daemon=True).start()
    serve(_open(address), token, listening)


def _open(address: str) -> ObjectStore:
    return open_store(address, verify=False, patience=_PATIENCE, timeout=_PATIENCE / 2)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(0)  # nothing is left to be written
