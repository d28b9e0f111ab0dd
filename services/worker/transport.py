"""Kombu's Redis transport, except that an entry of a queue that is no message is dropped and counted, instead of ending the worker.

Kombu and Celery pass on what is a message with an unfit body or an unknown task to those who log and drop it; what is none, they raise.
"""

from typing import Any

import structlog
from kombu.transport import TRANSPORT_ALIASES, redis, virtual

from services.common.broker import UNREADABLE
from services.worker import metrics

log = structlog.get_logger()


class _Message(virtual.Message):
    def __init__(self, payload: Any, channel: Any = None, **options: Any) -> None:
        try:
            super().__init__(payload, channel=channel, **options)  # type: ignore[no-untyped-call]
            self.headers["task"], self.headers["id"]
        except UNREADABLE as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None


class _Channel(redis.Channel):
    Message = _Message

    def _brpop_read(self, **options: Any) -> bool:
        try:
            return bool(super()._brpop_read(**options))  # type: ignore[no-untyped-call]
        except (ValueError, RecursionError) as error:  # it is out of the queue already
            metrics.DROPPED.inc()
            log.warning("message dropped: it cannot be read", error=str(error))
            return True


class Transport(redis.Transport):
    """The transport."""

    Channel = _Channel


def register() -> None:
    """Have this process use it wherever a URL names Redis."""
    for scheme in ("redis", "rediss"):
        TRANSPORT_ALIASES[scheme] = f"{__name__}:Transport"
