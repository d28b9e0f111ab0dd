"""Reports from training processes to their parent, which exports the metrics: lines of JSON in a pipe.

Writes of at most PIPE_BUF bytes are atomic, so no lock is needed that a killed process could hold. While the pipe is full, reports are
dropped: training never waits.
"""

import json
import os
import select
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from services.worker import metrics


class Reports:
    """A pipe, created before the training processes are forked."""

    def __init__(self) -> None:
        self._source, self._sink = os.pipe()
        os.set_blocking(self._sink, False)

    def send(self, kind: str, *values: Any) -> None:
        """Send a report, from any process and thread; dropped if the pipe is full or the report too long."""
        line = json.dumps([kind, *values]).encode() + b"\n"
        if len(line) <= select.PIPE_BUF:
            with suppress(BlockingIOError):
                os.write(self._sink, line)

    def follow(self, handlers: Mapping[str, Callable[..., None]], tick: Callable[[], None], seconds: float) -> None:
        """Handle reports in a background thread.

        Args:
            handlers: function for each kind of report.
            tick: called after reports were handled, and at least every `seconds`.
            seconds: maximum interval between calls of `tick`.
        """
        threading.Thread(target=self._follow, args=(handlers, tick, seconds), daemon=True).start()

    def _follow(self, handlers: Mapping[str, Callable[..., None]], tick: Callable[[], None], seconds: float) -> None:
        rest = b""
        while True:
            self._call(tick)
            if not select.select([self._source], [], [], seconds)[0]:
                continue
            *lines, rest = (rest + os.read(self._source, 1 << 16)).split(b"\n")
            rest = rest[: select.PIPE_BUF]  # no report is longer
            for line in lines:
                self._call(partial(_handle, line, handlers))

    def _call(self, function: Callable[[], object]) -> None:
        """Call a function whose errors must not end the thread; they are counted, since threads of the parent do not log."""
        try:
            function()
        except Exception:  # user code can write to the pipe too
            metrics.UNREADABLE.inc()


def _handle(line: bytes, handlers: Mapping[str, Callable[..., None]]) -> None:
    kind, *values = json.loads(line)
    handlers[kind](*values)
