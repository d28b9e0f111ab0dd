"""Output of a trainer process, of which the log and failure records hold a bounded part, however much there is."""

import os
import select
import threading
from collections import deque

import structlog

log = structlog.get_logger()

# Bytes of output that a failure record holds, lines per shard that the log holds, and characters of a line in it.
_KEPT_BYTES, _MOST_LINES, _LONGEST_LINE = 64 << 10, 1000, 1000
# Seconds between two looks at whether to end, and to wait for the rest.
_POLL_SECONDS, _REST_SECONDS = 0.1, 1.0


class Output:
    """Reads what the process prints: the log gets the first lines of a shard, a failure record the last ones.

    Args:
        stream: file descriptor of a pipe, which it closes in the end.
    """

    def __init__(self, stream: int) -> None:
        self._stream, self._ended = stream, False
        self._kept: deque[bytes] = deque()
        self._size = self._lines = 0
        self._changing = threading.Lock()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """Begin with the output of another shard."""
        with self._changing:
            self._kept.clear()
            self._size = self._lines = 0

    def text(self) -> str:
        """Return the end of the output."""
        with self._changing:
            return b"".join(self._kept)[-_KEPT_BYTES:].decode("utf-8", "replace")

    def close(self) -> None:
        """Read the rest; a process that was not found may hold the stream open, and go on to print."""
        self._ended = True
        self._thread.join(_REST_SECONDS)

    def _read(self) -> None:
        rest = b""
        with os.fdopen(self._stream, "rb", buffering=0) as stream:
            while True:
                if not select.select([stream], [], [], _POLL_SECONDS)[0]:
                    if self._ended:
                        return
                    continue
                chunk = stream.read(1 << 16)
                if not chunk:
                    break
                self._keep(chunk)
                if self._lines > _MOST_LINES:
                    continue
                *lines, rest = (rest + chunk).split(b"\n")
                rest = rest[:_LONGEST_LINE]
                for line in lines:
                    self._log(line)
        if rest:
            self._log(rest)

    def _keep(self, chunk: bytes) -> None:
        with self._changing:
            self._kept.append(chunk)
            self._size += len(chunk)
            while self._size - len(self._kept[0]) >= _KEPT_BYTES:
                self._size -= len(self._kept.popleft())

    def _log(self, line: bytes) -> None:
        self._lines += 1
        if self._lines <= _MOST_LINES:
            log.info("trainer", output=line[:_LONGEST_LINE].decode("utf-8", "replace"))
        elif self._lines == _MOST_LINES + 1:
            log.warning("trainer prints too much, the rest is left out", lines=_MOST_LINES)
