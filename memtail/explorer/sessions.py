"""Sessions of browsers, and the limit on failed logins. Both take bounded memory, and end with the process."""

import ipaddress
import secrets
import time
from collections import Counter
from collections.abc import Callable

#: Duration of a session, in seconds.
SESSION_SECONDS = 12 * 3600
#: Window of the limit, in seconds, and the failed logins in it of one client address.
WINDOW_SECONDS, MOST_OF_ADDRESS = 60, 10
_MOST_SESSIONS = 10_000
_MOST_ADDRESSES = 10_000


class Sessions:
    """Open sessions by their random ids. An id is known to one browser only, expires, and says nothing about the token.

    Args:
        clock: seconds of a clock that never goes back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._expiry: dict[str, float] = {}  # by id, the oldest first

    def open(self) -> str:
        """Open a session, in place of the oldest if there are too many, and return its id."""
        while self._expiry and (len(self._expiry) >= _MOST_SESSIONS or next(iter(self._expiry.values())) <= self._clock()):
            del self._expiry[next(iter(self._expiry))]
        session = secrets.token_urlsafe(32)
        self._expiry[session] = self._clock() + SESSION_SECONDS
        return session

    def is_open(self, session: str) -> bool:
        """Return whether an id is that of a session that is neither expired nor closed."""
        return self._expiry.get(session, 0.0) > self._clock()

    def close(self, session: str) -> None:
        """Close a session, if there is one with this id."""
        self._expiry.pop(session, None)


class LoginLimit:
    """Number of failed logins in a window of time, by client address. A limit over all addresses would let anybody keep all others out.

    Args:
        clock: seconds of a clock that never goes back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._began = clock, clock()
        self._failed: Counter[str] = Counter()  # the oldest address first

    def wait(self, address: str) -> int:
        """Return the seconds until a client may try a token again; 0: now."""
        left = self._began + WINDOW_SECONDS - self._clock()
        if left <= 0:
            self._began, self._failed = self._clock(), Counter()
        return int(left) + 1 if self._failed[_client(address)] >= MOST_OF_ADDRESS else 0

    def count(self, address: str) -> None:
        """Count a failed login, in place of those of the oldest address if there are too many."""
        client = _client(address)
        if client not in self._failed and len(self._failed) >= _MOST_ADDRESSES:
            del self._failed[next(iter(self._failed))]
        self._failed[client] += 1


def _client(address: str) -> str:
    """Return what one client has: an IPv4 address, or the /64 network of an IPv6 address."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address) or parsed.ipv4_mapped:
        return str(parsed)
    return str(ipaddress.IPv6Address(int(parsed) >> 64 << 64))
