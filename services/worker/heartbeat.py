"""Signs of life of a worker: beats as long as its parent process comes round.

While Redis is away the consumer has no loop that could come round; then a thread beats, so that an outage of Redis does not have workers
killed that train on.
"""

import threading
from collections.abc import Callable
from typing import Any

from celery import bootsteps


class ConsumerHeartbeat:
    """Beats.

    Args:
        beat: called now and then, from either thread.
        seconds: between two beats.
    """

    def __init__(self, beat: Callable[[], None], seconds: float = 5.0) -> None:
        self._beat, self._seconds = beat, seconds
        self._connected = False

    def step(self) -> type[bootsteps.StartStopStep]:
        """The part of a Celery consumer that beats."""
        heartbeat = self
        threading.Thread(target=self._stand_in, daemon=True).start()

        class Step(bootsteps.StartStopStep):  # type: ignore[misc]
            requires = ("celery.worker.consumer.tasks:Tasks",)

            def start(self, parent: Any) -> None:
                heartbeat._connected = True
                heartbeat._beat()
                self._timer = parent.timer.call_repeatedly(heartbeat._seconds, heartbeat._beat)

            def stop(self, parent: Any) -> None:
                self._timer.cancel()
                heartbeat._connected = False

        return Step

    def _stand_in(self) -> None:
        never = threading.Event()
        while not never.wait(self._seconds):
            if not self._connected:
                self._beat()
