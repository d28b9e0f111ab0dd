"""Structured logs on standard error, one line per event."""

import sys
from typing import Any

import structlog


def configure() -> None:
    """Set up readable lines. The stream is looked up at every event, so that a progress bar may replace it."""

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
