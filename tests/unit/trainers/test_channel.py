"""Messages between a process with credentials and its trainer process."""

import socket
import threading

import pytest

from memtail.trainers.channel import Channel


@pytest.fixture
def sides():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours, 10**7), theirs


def test_messages_arrive_with_their_bytes(sides):
    ours, theirs = sides
    other = Channel(theirs, 10**7)
    data = b"x" * (10**6 + 1)
    thread = threading.Thread(target=lambda: [other.send({"number": 1}, data), other.send({"number": 2})])
    thread.start()
    received = [ours.receive(5), ours.receive(5)]
    thread.join()
    assert received == [({"number": 1}, data), ({"number": 2}, b"")]


@pytest.mark.parametrize(
    "damaged",
    [
        b"\xff" * 16,
        (1 << 21).to_bytes(8, "big") + bytes(8),
        (2).to_bytes(8, "big") + (10**7 + 1).to_bytes(8, "big"),
        (2).to_bytes(8, "big") + bytes(8) + b"[]",
        (2).to_bytes(8, "big") + bytes(8) + b"{,",
        (2).to_bytes(8, "big") + bytes(8) + b"\xff\xff",
        (10**5).to_bytes(8, "big") + bytes(8) + b"[" * 10**5,
    ],
)
def test_what_is_no_message_is_refused(sides, damaged):
    ours, theirs = sides
    theirs.sendall(damaged)
    with pytest.raises(ValueError):  # noqa: PT011 - of any kind
        ours.receive(5)


def test_half_a_message_keeps_nobody_waiting(sides):
    ours, theirs = sides
    theirs.sendall((2).to_bytes(8, "big") + bytes(8) + b"{")
    assert ours.receive(0) is None
    theirs.sendall(b"}")
    assert ours.receive(5) == ({}, b"")


def test_the_end_of_the_other_side_is_noticed(sides):
    ours, theirs = sides
    theirs.close()
    with pytest.raises(EOFError):
        ours.receive(5)
    with pytest.raises(OSError, match="Broken pipe"):
        ours.send({})
