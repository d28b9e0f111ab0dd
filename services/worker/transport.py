"""Kombu's Redis transport, which drops and counts malformed queue entries instead of ending the worker.

Kombu and Celery have hooks for messages with an invalid body or an unknown task, but raise an exception for entries that are not messages.
"""

from typing import Any

import structlog
from kombu.transport import TRANSPORT_ALIASES, redis, virtual

from services.common.broker import MALFORMED
from services.worker import metrics

log = structlog.get_logger()


class _Message(virtual.Message):
    def __init__(self, payload: Any, channel: Any = None, **options: Any) -> None:
        try:
            super().__init__(payload, channel=channel, **options)  # type: ignore[no-untyped-call]
            self.headers["task"], self.headers["id"]
        except MALFORMED as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None


class _Channel(redis.Channel):
    Message = _Message

    def _brpop_read(self, **options: Any) -> bool:
        try:
            return bool(super()._brpop_read(**options))  # type: ignore[no-untyped-call]
        except (ValueError, RecursionError) as error:  # the entry has already left the queue
            metrics.DROPPED.inc()
            log.warning("message dropped: it cannot be read", error=str(error))
            return True


class Transport(redis.Transport):
    """Redis transport that tolerates malformed entries."""

    Channel = _Channel


def register() -> None:
    """Make this process use the transport for all Redis URLs."""
    for scheme in ("redis", "rediss"):
        TRANSPORT_ALIASES[scheme] = f"{__name__}:Transport"
