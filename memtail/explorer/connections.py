"""Connections of clients to the explorer: bounded in number and memory, and closed if their client neither sends nor takes anything."""

import asyncio
import resource

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

#: Timeout of a request from its connection, or from the previous answer, to its last byte, in seconds.
REQUEST_SECONDS = 10.0
#: Seconds in which a client has to take a part of an answer that waits for it.
ANSWER_SECONDS = 60.0
#: Bytes of all answers that wait for their clients, beside the newest.
MOST_UNSENT = 256 << 20
# Most connections, where the process may have four times as many file descriptors.
_MOST_CONNECTIONS = 512


def most_connections() -> int:
    """Return the number of connections that may be open at a time.

    The other file descriptors are for everything else, and for new connections, of which a burst is accepted before the first is closed.
    """
    return min(_MOST_CONNECTIONS, max(4, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))


class Connection(H11Protocol):
    """A connection that a client cannot hold without a request, nor without taking the answer.

    uvicorn limits the time between requests only, and answers 503 above its limit of connections, which silent ones then use up. Here a new
    connection, or a large answer, takes the place of the one that has waited longest for its client.
    """

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as the base class
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._wait()
        if len(self.connections) > most_connections():
            _first(self._waiting())._abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Stop waiting once a request is whole."""
        super().data_received(data)
        if not self._is_waiting:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request, unless the body of the answered one is outstanding."""
        super().on_response_complete()
        if self._is_waiting and self._timer is None:
            self._wait()

    def pause_writing(self) -> None:
        """Begin to wait until the client takes the answer."""
        super().pause_writing()
        self._stop_waiting()
        self._wait()
        unsent = [each for each in self._waiting() if each._unsent and each is not self]
        if sum(each._unsent for each in unsent) > MOST_UNSENT:
            _first(unsent)._abort()

    def resume_writing(self) -> None:
        """Stop waiting for the client to take the answer."""
        super().resume_writing()
        self._stop_waiting()
        if self._is_waiting:
            self._wait()

    @property
    def _is_waiting(self) -> bool:
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY) or self.flow.write_paused

    @property
    def _unsent(self) -> int:
        return self.transport.get_write_buffer_size()

    def _waiting(self) -> "list[Connection]":
        return [each for each in self.connections if isinstance(each, Connection) and each._timer is not None]

    def _wait(self) -> None:
        self._seen = self._unsent
        self._deadline = self.loop.time() + (ANSWER_SECONDS if self._seen else REQUEST_SECONDS)
        self._timer = self.loop.call_at(self._deadline, self._expire)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        if self._unsent < self._seen:  # the client takes the answer
            self._wait()
        else:
            self._abort()

    def _abort(self) -> None:
        self.connections.discard(self)  # at once: the transport closes in the next round of the event loop
        self.transport.abort()


def _first(waiting: list[Connection]) -> Connection:
    return min(waiting, key=lambda each: each._deadline)
