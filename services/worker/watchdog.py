"""A remedy for consumers that fall silent, and the end of those that have nothing left to do.

When a message cannot be acknowledged because Redis went away, Celery's consumer may come back without ever asking for another: it
believes that it still holds as many as it may. Idle processes beside a queue with messages are the sign, whatever the cause; then the
consumer is made to connect anew.
"""

import time
from typing import Any

import redis
import structlog
from celery import bootsteps
from celery.worker import state

from services.common.broker import Broker

log = structlog.get_logger()


class Watchdog:
    """Looks every few seconds whether the consumer takes what there is.

    Args:
        broker: the queue.
        seconds: between two looks; being idle at two in a row is one too many.
        rest: seconds of nothing to do after which the worker ends.
    """

    def __init__(self, broker: Broker, seconds: float, rest: float) -> None:
        self._broker, self._seconds, self._rest = broker, seconds, rest
        self._idle = 0
        self._busy_at = time.monotonic()

    def step(self) -> type[bootsteps.StartStopStep]:
        """The part of a Celery consumer that runs this watchdog."""
        watchdog = self

        class Step(bootsteps.StartStopStep):  # type: ignore[misc]
            requires = ("celery.worker.consumer.tasks:Tasks",)

            def start(self, parent: Any) -> None:
                watchdog._idle = 0
                self._timer = parent.timer.call_repeatedly(watchdog._seconds, watchdog.look)

            def stop(self, parent: Any) -> None:
                self._timer.cancel()

        return Step

    def look(self) -> None:
        """Raises: redis.ConnectionError, at which the consumer connects anew."""
        try:
            waiting = self._broker.waiting()
        except redis.RedisError:
            return
        idle = not state.reserved_requests and not state.should_stop
        if waiting or not idle:
            self._busy_at = time.monotonic()
        elif time.monotonic() - self._busy_at > self._rest:
            log.info("nothing left to do")
            state.should_stop = 0  # the exit code
        self._idle = self._idle + 1 if waiting and idle else 0
        if self._idle >= 2:
            self._idle = 0
            log.warning("consumer fell silent, connecting anew", waiting=waiting)
            raise redis.ConnectionError("the consumer fell silent")
