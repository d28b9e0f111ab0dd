"""What training processes report to their parent, which owns the metrics: lines of JSON in a pipe.

A line as short as these is written whole or not at all, so that there is no lock that a killed process could keep. Where the parent is
behind, a line is dropped: training never waits.
"""

import json
import os
import select
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any


class Reports:
    """A pipe, made before processes are forked."""

    def __init__(self) -> None:
        self._source, self._sink = os.pipe()
        os.set_blocking(self._sink, False)

    def send(self, kind: str, *values: Any) -> None:
        """Report something, from any process and thread; what does not fit is dropped."""
        line = json.dumps([kind, *values]).encode() + b"\n"
        if len(line) <= select.PIPE_BUF:
            with suppress(BlockingIOError):
                os.write(self._sink, line)

    def follow(self, take: Mapping[str, Callable[..., None]], tidy: Callable[[], None], seconds: float) -> None:
        """From a thread of its own, give each report to the function for its kind, and call `tidy` now and then.

        Args:
            take: the functions.
            tidy: called after reports came, and when none came for so many seconds.
            seconds: those.
        """
        threading.Thread(target=self._follow, args=(take, tidy, seconds), daemon=True).start()

    def _follow(self, take: Mapping[str, Callable[..., None]], tidy: Callable[[], None], seconds: float) -> None:
        rest = b""
        while True:
            tidy()
            if not select.select([self._source], [], [], seconds)[0]:
                continue
            *lines, rest = (rest + os.read(self._source, 1 << 16)).split(b"\n")
            for line in lines:
                kind, *values = json.loads(line)
                take[kind](*values)
