"""What the service processes have in common: how they start, say that they live, and end."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NoReturn
from wsgiref.simple_server import WSGIRequestHandler, make_server

import structlog
from prometheus_client import make_wsgi_app

from memtail.errors import MemtailError
from services.common.metrics import PASS_SECONDS, PASSES
from services.common.settings import ServiceError, ServiceSettings

log = structlog.get_logger()


def start(service: Callable[[ServiceSettings], int | None]) -> None:
    """Run a service to its end, with structured logs; what a user can mend ends it with one line and 2, all else with a traceback and 1."""
    configure_logs()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        sys.exit(service(ServiceSettings.from_environment()))
    except MemtailError as error:
        log.critical(str(error))
        sys.exit(2)
    except (KeyboardInterrupt, _TerminatedError):
        sys.exit(0)


def configure_logs() -> None:
    """One line an event on standard error: JSON, or readable on a terminal. Libraries' warnings and what nobody catches, too."""
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
    sys.excepthook = lambda *caught: log.critical("not caught", exc_info=caught)
    threading.excepthook = lambda caught: log.critical("not caught", exc_info=caught[:3])
    sys.unraisablehook = lambda caught: log.error("not caught", exc_info=(caught.exc_type, caught.exc_value, caught.exc_traceback))


class _TerminatedError(BaseException):
    """SIGTERM came."""


def _terminated(*_: Any) -> None:
    raise _TerminatedError


def repeat(one_pass: Callable[[], object], seconds: float, beat: Callable[[], None], *outages: type[Exception]) -> NoReturn:
    """Run a pass of a service's loop for ever, and call `beat` after each.

    Args:
        one_pass: may raise `MemtailError`, `OSError` or one of `outages`: then it is given up, and made up for by the next.
        seconds: from the beginning of one to that of the next, at least.
        beat: the loop has come round.
        outages: what else is waited out.
    """
    for outcome in ("completed", "given up"):
        PASSES.labels(outcome)
    waited_out: tuple[type[Exception], ...] = (MemtailError, OSError, *outages)
    while True:
        began, outcome = time.monotonic(), "completed"
        try:
            one_pass()
        except waited_out as error:
            log.warning("pass given up", error=str(error) or type(error).__name__)
            outcome = "given up"
        PASSES.labels(outcome).inc()
        PASS_SECONDS.observe(time.monotonic() - began)
        beat()
        time.sleep(max(0.0, began + seconds - time.monotonic()))


class Heartbeat:
    """When a service's loop last came round; healthy if that was not long ago.

    Args:
        patience: seconds without a beat after which it counts as dead.
    """

    def __init__(self, patience: float) -> None:
        self._patience, self._last = patience, time.monotonic()
        self.ready = False

    def beat(self) -> None:
        """The loop has come round; the service is ready from its first beat on."""
        self._last, self.ready = time.monotonic(), True

    @property
    def alive(self) -> bool:
        """Whether it has come round lately."""
        return time.monotonic() - self._last < self._patience


def serve(port: int, heartbeat: Heartbeat) -> None:
    """Answer /metrics, /healthz and /readyz from a thread of its own. Raises: ServiceError: the port cannot be had."""
    metrics = make_wsgi_app()

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        checks = {"/healthz": lambda: heartbeat.alive, "/readyz": lambda: heartbeat.alive and heartbeat.ready}
        path = environ["PATH_INFO"]
        if path == "/metrics":
            page: Iterable[bytes] = metrics(environ, start_response)
            return page
        if path not in checks:
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"there are /metrics, /healthz and /readyz\n"]
        fine = checks[path]()
        start_response("200 OK" if fine else "503 Service Unavailable", [("Content-Type", "text/plain")])
        return [b"ok\n" if fine else b"no pass for too long\n"]

    try:
        server = make_server("", port, answer, handler_class=_Quiet)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ServiceError(f"MEMTAIL_PORT is {port}, which cannot be had ({reason}): give each service here a port of its own") from None
    os.register_at_fork(after_in_child=server.server_close)  # a child that outlives its parent must not keep the port
    threading.Thread(target=server.serve_forever, daemon=True).start()


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name it has in the base class
        pass
