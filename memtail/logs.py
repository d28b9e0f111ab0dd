"""Structured logs on standard error, one line an event."""

import sys
from typing import Any

import structlog


def configure() -> None:
    """Readable lines; the stream is looked up at every event, so that a progress bar may take it over."""

    def to_stderr(*_: Any) -> structlog.PrintLogger:
        return structlog.PrintLogger(sys.stderr)

    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0),
        ],
        logger_factory=to_stderr,
        cache_logger_on_first_use=False,
    )
