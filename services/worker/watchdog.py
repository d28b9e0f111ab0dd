"""Restarts stalled consumers, registers the worker, and ends idle ones.

When an outage of Redis prevents the acknowledgement of a message, Celery's consumer may reconnect without receiving messages again: it
still counts the message against its prefetch limit. The symptom is an idle worker while its queue is not empty. Whatever the cause, the
remedy is a new connection.
"""

import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import redis
import structlog
from celery import bootsteps
from celery.worker import state

from memtail.settings import Settings
from services.common.broker import Broker

log = structlog.get_logger()


class Watchdog:
    """Checks periodically whether the consumer receives the messages in its queue.

    Args:
        broker: the queue.
        seconds: interval between checks; a consumer counts as stalled after two in a row.
        rest: idle time in seconds after which the worker ends.
        is_surplus: whether the worker ends, although it may get further shards, because another experiment lacks workers.
    """

    def __init__(self, broker: Broker, seconds: float, rest: float, is_surplus: Callable[[], bool]) -> None:
        self._broker, self._seconds, self._rest, self._is_surplus = broker, seconds, rest, is_surplus
        self._stalled_checks = 0
        self._last_busy = time.monotonic()

    def step(self) -> type[bootsteps.StartStopStep]:
        """Create the bootstep for Celery's consumer."""
        watchdog = self

        class Step(bootsteps.StartStopStep):  # type: ignore[misc]
            requires = ("celery.worker.consumer.tasks:Tasks",)
            _timer: Any = None  # Celery also stops steps that have not started

            def start(self, parent: Any) -> None:
                watchdog._stalled_checks = 0
                with suppress(redis.RedisError):
                    watchdog._register()
                self._timer = parent.timer.call_repeatedly(watchdog._seconds, watchdog.check)

            def stop(self, parent: Any) -> None:
                if self._timer:
                    self._timer.cancel()

        return Step

    def _register(self) -> None:
        self._broker.register_worker(Settings().node, socket.gethostname())

    def check(self) -> None:
        """Check once. Raises: redis.ConnectionError: the consumer is stalled; Celery reconnects it."""
        try:
            self._register()
            waiting = self._broker.waiting()
        except redis.RedisError:
            return
        idle = not state.reserved_requests and not state.should_stop
        if waiting or not idle:
            self._last_busy = time.monotonic()
        elif time.monotonic() - self._last_busy > self._rest or self._is_surplus():
            log.info("worker idle, ending")
            state.should_stop = 0  # exit code
        self._stalled_checks = self._stalled_checks + 1 if waiting and idle else 0
        if self._stalled_checks >= 2:
            self._stalled_checks = 0
            log.warning("consumer stalled, reconnecting", waiting=waiting)
            raise redis.ConnectionError("the consumer is stalled")
