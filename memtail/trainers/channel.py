"""Channel between a process with credentials and its trainer process: messages in JSON, and bytes with them, over a socket.

Nothing is unpickled, and a message that is damaged, unfinished or too large blocks neither side's caller longer than it allows.
"""

import json
import select
import socket
import struct
import threading
from typing import Any

_HEADER = struct.Struct("!QQ")
# Largest message in bytes, and number of bytes that are read at once.
_LARGEST_MESSAGE, _READ = 1 << 20, 1 << 20


class Channel:
    """One side of the channel. Any thread may send, and one receives.

    Args:
        connection: a socket; with a timeout, `send` raises when the other side has not taken a message for so long.
        largest: largest number of bytes that are taken with a message.
    """

    def __init__(self, connection: socket.socket, largest: int) -> None:
        self._connection, self._largest = connection, largest
        self._sending = threading.Lock()
        self._received = bytearray()

    def send(self, message: dict[str, Any], data: bytes = b"") -> None:
        """Send a message, and bytes with it. Raises: OSError: the other side has ended, or takes nothing."""
        text = json.dumps(message).encode()
        with self._sending:
            self._connection.sendall(_HEADER.pack(len(text), len(data)) + text)
            if data:
                self._connection.sendall(data)

    def receive(self, timeout: float | None = None) -> tuple[dict[str, Any], bytes] | None:
        """Wait for a message; return it with its bytes, or None if none is complete after `timeout` seconds, or somewhat later.

        Raises:
            EOFError: the other side has ended.
            OSError: the connection is broken.
            ValueError: what was received is no message.
        """
        while (received := self._taken()) is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                return None
            chunk = self._connection.recv(_READ)
            if not chunk:
                raise EOFError
            self._received += chunk
        return received

    def close(self) -> None:
        """Close this side."""
        self._connection.close()

    def _taken(self) -> tuple[dict[str, Any], bytes] | None:
        if len(self._received) < _HEADER.size:
            return None
        text, data = _HEADER.unpack_from(self._received)
        if text > _LARGEST_MESSAGE or data > self._largest:
            raise ValueError(f"a message of {text} and {data} bytes")
        begin, end = _HEADER.size + text, _HEADER.size + text + data
        if len(self._received) < end:
            return None
        try:
            message = json.loads(self._received[_HEADER.size : begin])
        except RecursionError:
            raise ValueError("a message that is nested too deeply") from None
        if not isinstance(message, dict):
            raise ValueError("a message that is no object")
        taken = bytes(memoryview(self._received)[begin:end])
        del self._received[:end]
        return message, taken
