"""Startup, logging, main loop, health checks and shutdown of the service processes."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NoReturn
from wsgiref.simple_server import WSGIRequestHandler, make_server

import structlog
from prometheus_client import make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from memtail.errors import AccessRefusedError, MemtailError
from memtail.processes import resend_dropped
from memtail.storage import ObjectStore, Observer
from memtail.storage.open import open_store
from services.common.metrics import PASS_SECONDS, PASSES
from services.common.settings import ServiceError, ServiceSettings

log = structlog.get_logger()

# Seconds for which a service waits for access to the store at its start, and between two tries.
_ACCESS_SECONDS, _ACCESS_PAUSE = 60.0, 3.0


def start(service: Callable[[ServiceSettings], int | None]) -> None:
    """Run a service with structured logs, and exit.

    Exit codes: 2 and one log line for a `MemtailError`, which the operator can fix; 1 and a traceback for any other exception; 0 after
    SIGTERM or Ctrl-C.
    """
    configure_logs()
    signal.signal(signal.SIGTERM, _terminated)
    resend_dropped({_TerminatedError: signal.SIGTERM, KeyboardInterrupt: signal.SIGINT})
    try:
        sys.exit(service(ServiceSettings.from_environment()))
    except MemtailError as error:
        log.critical(str(error))
        sys.exit(2)
    except (KeyboardInterrupt, _TerminatedError):
        sys.exit(0)


def configure_logs() -> None:
    """Log one line per event on standard error: JSON, or text on a terminal. Includes libraries' warnings and uncaught exceptions."""
    terminal = sys.stderr.isatty()
    processors: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if terminal else "iso", utc=not terminal),
        structlog.processors.format_exc_info,
    ]
    renderer: Any = structlog.dev.ConsoleRenderer(pad_event_to=0) if terminal else structlog.processors.JSONRenderer()
    structlog.configure(processors=[*processors, renderer], logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    handler = logging.StreamHandler(sys.stderr)
    formatter = structlog.stdlib.ProcessorFormatter
    handler.setFormatter(formatter(foreign_pre_chain=processors, processors=[formatter.remove_processors_meta, renderer]))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(True)
    sys.excepthook = lambda *caught: log.critical("uncaught exception", exc_info=caught)
    threading.excepthook = lambda caught: log.critical("uncaught exception", exc_info=caught[:3])
    sys.unraisablehook = lambda caught: log.error("uncaught exception", exc_info=(caught.exc_type, caught.exc_value, caught.exc_traceback))


class _TerminatedError(BaseException):
    """The process received SIGTERM."""


def _terminated(*_: Any) -> None:
    raise _TerminatedError


def repeat(run_pass: Callable[[], object], seconds: float, heartbeat: Callable[[], None], *outages: type[Exception]) -> NoReturn:
    """Run a service's main loop forever.

    Args:
        run_pass: one pass. A pass that raises `MemtailError`, `OSError` or one of `outages` is given up; the next pass catches up.
        seconds: minimum time between the starts of two passes.
        heartbeat: called after each pass.
        outages: further exceptions that end a pass but not the loop.
    """
    for outcome in ("completed", "given up"):
        PASSES.labels(outcome)
    tolerated: tuple[type[Exception], ...] = (MemtailError, OSError, *outages)
    while True:
        began, outcome = time.monotonic(), "completed"
        try:
            run_pass()
        except tolerated as error:
            log.warning("pass given up", error=str(error) or type(error).__name__)
            outcome = "given up"
        PASSES.labels(outcome).inc()
        PASS_SECONDS.observe(time.monotonic() - began)
        heartbeat()
        time.sleep(max(0.0, began + seconds - time.monotonic()))


def open_when_allowed(address: str, observe: Observer) -> ObjectStore:
    """Open a store; wait up to a minute while its server refuses access.

    In a new deployment bucket and users are made by the init container of the dispatcher, beside which other services start.

    Raises:
        AccessRefusedError: access is still refused.
        StoreError: the store cannot be used.
    """
    until = time.monotonic() + _ACCESS_SECONDS
    while True:
        try:
            return open_store(address, observe=observe)
        except AccessRefusedError as error:
            if time.monotonic() >= until:
                raise
            log.warning("waiting for access to the store, which the dispatcher may be about to give", error=str(error))
            time.sleep(_ACCESS_PAUSE)


class Heartbeat:
    """Liveness and readiness of a service, by the last progress of its main loop.

    Args:
        timeout: seconds without a heartbeat after which the service counts as dead.

    Attributes:
        ready: whether the first pass has ended, or has made progress.
        fault: why the service does no work; empty if it works.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout, self._last = timeout, time.monotonic()
        self.ready, self.fault = False, ""

    def record(self) -> None:
        """Record the end of a pass, or progress within one."""
        self._last, self.ready = time.monotonic(), True

    @property
    def alive(self) -> bool:
        """Return whether the last heartbeat is younger than the timeout."""
        return time.monotonic() - self._last < self._timeout


def serve(port: int, heartbeat: Heartbeat) -> None:
    """Serve /metrics, /healthz and /readyz from a background thread. Raises: ServiceError: the port is unavailable."""
    metrics = make_wsgi_app()

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        checks = {"/healthz": lambda: heartbeat.alive, "/readyz": lambda: heartbeat.alive and heartbeat.ready and not heartbeat.fault}
        path = environ["PATH_INFO"]
        if path == "/metrics":
            page: Iterable[bytes] = metrics(environ, start_response)
            return page
        if path not in checks:
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"paths: /metrics, /healthz, /readyz\n"]
        healthy = checks[path]()
        start_response("200 OK" if healthy else "503 Service Unavailable", [("Content-Type", "text/plain")])
        return [b"ok\n" if healthy else (heartbeat.fault or "no recent heartbeat").encode() + b"\n"]

    try:
        server = make_server("", port, answer, server_class=ThreadingWSGIServer, handler_class=_Handler)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ServiceError(f"MEMTAIL_PORT {port} is unavailable ({reason}): give each service on this machine a different port") from None
    os.register_at_fork(after_in_child=server.server_close)  # a child that outlives its parent must not occupy the port
    threading.Thread(target=server.serve_forever, daemon=True).start()


class _Handler(WSGIRequestHandler):
    """Logs nothing, and closes a connection that is silent for `timeout` seconds."""

    timeout = 10

    def handle(self) -> None:
        with suppress(OSError):
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        pass
