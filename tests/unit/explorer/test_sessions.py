"""Sessions and the limit on failed logins take bounded memory."""

from memtail.explorer import sessions
from memtail.explorer.sessions import MOST_OF_ADDRESS, SESSION_SECONDS, WINDOW_SECONDS, LoginLimit, Sessions


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_oldest_session_makes_room_and_expired_ones_are_forgotten(monkeypatch):
    monkeypatch.setattr(sessions, "_MOST_SESSIONS", 3)
    clock = Clock()
    kept = Sessions(clock)
    first, *others = [kept.open() for _ in range(4)]
    assert not kept.is_open(first)
    assert all(map(kept.is_open, others))
    clock.now = SESSION_SECONDS
    assert not any(map(kept.is_open, others))
    last = kept.open()
    assert list(kept._expiry) == [last]
    kept.close("none")
    kept.close(last)
    assert not kept.is_open(last)


def test_the_number_of_addresses_is_bounded(monkeypatch):
    monkeypatch.setattr(sessions, "_MOST_ADDRESSES", 3)
    clock = Clock()
    limit = LoginLimit(clock)
    for number in range(5):
        for _ in range(MOST_OF_ADDRESS):
            limit.count(f"192.0.2.{number}")
    assert [limit.wait(f"192.0.2.{number}") for number in range(6)] == [0, 0, *[WINDOW_SECONDS + 1] * 3, 0]
    clock.now = WINDOW_SECONDS / 2
    assert limit.wait("192.0.2.4") == WINDOW_SECONDS / 2 + 1
    clock.now = WINDOW_SECONDS
    assert limit.wait("192.0.2.4") == 0
    assert not limit._failed


def test_the_addresses_of_an_ipv6_network_are_one():
    limit = LoginLimit(Clock())
    for number in range(MOST_OF_ADDRESS):
        limit.count(f"2001:db8::{number}:1")
        limit.count("::ffff:192.0.2.1")
    waits = {
        address: limit.wait(address) > 0 for address in ("2001:db8::abcd", "2001:db8:0:1::1", "::ffff:192.0.2.1", "::ffff:192.0.2.2", "")
    }
    assert list(waits.values()) == [True, False, True, False, False]
