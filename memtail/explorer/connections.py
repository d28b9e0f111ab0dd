"""Connections of clients to the explorer: bounded in number, and closed if no whole request arrives in time."""

import asyncio
import resource

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

#: Timeout of a request from its connection, or from the previous answer, to its last byte, in seconds.
REQUEST_SECONDS = 10.0
# Most connections, where the process may have four times as many file descriptors.
_MOST_CONNECTIONS = 512


def most_connections() -> int:
    """Return the number of connections that may be open at a time.

    The other file descriptors are for everything else, and for new connections, of which a burst is accepted before the first is closed.
    """
    return min(_MOST_CONNECTIONS, max(4, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))


class Connection(H11Protocol):
    """A connection that a client cannot hold without a request.

    uvicorn limits the time between requests only, and answers 503 above its limit of connections, which silent ones then use up. Here a new
    connection takes the place of the one that has waited longest for a request.
    """

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as the base class
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._await_request()
        if len(self.connections) > most_connections():
            waiting = [each for each in self.connections if isinstance(each, Connection) and each._awaits_request]
            min(waiting, key=lambda each: each._deadline)._abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Stop waiting once a request is whole."""
        super().data_received(data)
        if not self._awaits_request:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request, unless the body of the answered one is outstanding."""
        super().on_response_complete()
        if self._awaits_request and self._timer is None:
            self._await_request()

    @property
    def _awaits_request(self) -> bool:
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

    def _await_request(self) -> None:
        self._deadline = self.loop.time() + REQUEST_SECONDS
        self._timer = self.loop.call_at(self._deadline, self._abort)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _abort(self) -> None:
        self.connections.discard(self)  # at once: the transport closes in the next round of the event loop
        self.transport.abort()
