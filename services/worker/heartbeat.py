"""A file that is touched as long as a worker's parent process comes round, for a health check to look at its age.

While Redis is away the consumer has no loop that could come round; then a thread touches the file, so that an outage of Redis does not have
workers killed that train on.
"""

import threading
from pathlib import Path
from typing import Any

from celery import bootsteps


class HeartbeatFile:
    """Touches a file.

    Args:
        path: of the file.
        seconds: between two beats.
    """

    def __init__(self, path: Path, seconds: float = 5.0) -> None:
        self._path, self._seconds = path, seconds
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

    def _beat(self) -> None:
        self._path.touch()

    def _stand_in(self) -> None:
        never = threading.Event()
        while not never.wait(self._seconds):
            if not self._connected:
                self._beat()
