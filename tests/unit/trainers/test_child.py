"""The trainer process's side of the channel."""

import socket

from structlog.testing import capture_logs

from memtail.trainers import child
from memtail.trainers.channel import Channel


def test_a_checkpoint_that_is_too_large_is_not_sent_and_training_continues(monkeypatch):
    monkeypatch.setattr(child, "LARGEST_STATE", 5)
    monkeypatch.setattr(child._Parent, "_receive", lambda self: None)
    ours, theirs = socket.socketpair()
    with ours, theirs, capture_logs() as events:
        parent = child._Parent(Channel(theirs, 100))
        parent.save(b"123456")
        parent.save(b"12345")
        assert Channel(ours, 100).receive(1.0) == ({"save": True}, b"12345")
    assert [event["bytes"] for event in events] == [6]
