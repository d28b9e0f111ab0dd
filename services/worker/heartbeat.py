"""Heartbeat of a worker's parent process.

The timer of Celery's consumer sends it while Redis is connected. During an outage of Redis the consumer's loop does not run; a thread then
sends the heartbeat, so that workers that still train are not killed.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

from celery import bootsteps


class ConsumerHeartbeat:
    """Sends heartbeats from the consumer, or from a thread while the consumer is disconnected.

    Args:
        send: records a heartbeat; called from both threads.
        seconds: interval between heartbeats.
    """

    def __init__(self, send: Callable[[], None], seconds: float = 5.0) -> None:
        self._send, self._seconds = send, seconds
        self._connected = False

    def step(self) -> type[bootsteps.StartStopStep]:
        """Create the bootstep for Celery's consumer, and start the thread."""
        heartbeat = self
        threading.Thread(target=self._send_while_disconnected, daemon=True).start()

        class Step(bootsteps.StartStopStep):  # type: ignore[misc]
            requires = ("celery.worker.consumer.tasks:Tasks",)
            _timer: Any = None  # Celery also stops steps that have not started

            def start(self, parent: Any) -> None:
                heartbeat._connected = True
                heartbeat._send()
                self._timer = parent.timer.call_repeatedly(heartbeat._seconds, heartbeat._send)

            def stop(self, parent: Any) -> None:
                if self._timer:
                    self._timer.cancel()
                heartbeat._connected = False

        return Step

    def _send_while_disconnected(self) -> None:
        while True:
            time.sleep(self._seconds)
            if not self._connected:
                self._send()
