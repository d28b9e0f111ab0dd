"""Sessions and the limit on failed logins take bounded memory."""

from memtail.explorer import sessions
from memtail.explorer.sessions import MOST_OF_ADDRESS, MOST_OF_ALL, SESSION_SECONDS, WINDOW_SECONDS, LoginLimit, Sessions


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


def test_addresses_are_bounded_by_the_limit_over_all():
    clock = Clock()
    limit = LoginLimit(clock)
    for number in range(10 * MOST_OF_ALL):
        if not limit.wait(f"host-{number}"):
            limit.count(f"host-{number}")
    assert len(limit._failed) == MOST_OF_ALL
    clock.now = WINDOW_SECONDS / 2
    assert limit.wait("another") == WINDOW_SECONDS / 2 + 1
    clock.now = WINDOW_SECONDS
    assert limit.wait("another") == 0
    assert not limit._failed
    for _ in range(MOST_OF_ADDRESS):
        limit.count("one")
    assert limit.wait("one") == WINDOW_SECONDS + 1
    assert limit.wait("another") == 0
