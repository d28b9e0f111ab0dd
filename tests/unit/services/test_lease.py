"""A lease is renewed while training advances, whatever the store does."""

import os
import threading
import time

import pytest

from memtail.errors import StoreError
from memtail.experiment_store import Control
from services.worker.lease import HUNG, Lease


class Broker:
    """Counts renewals; `kept` is the answer to them."""

    def __init__(self):
        self.renewals, self.released, self.kept = 0, False, True

    def acquire(self, *_):
        return True

    def renew(self, *_):
        self.renewals += 1
        return self.kept

    def release(self, *_):
        self.released = True


class Store:
    """An experiment store whose control is read by `read`, and which is there if `registered`."""

    def __init__(self, read, registered):
        self.control, self.is_registered = read, lambda: registered


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def lease(broker, read=Control, silence=300.0, registered=True):
    return Lease(broker, None, "worker", 0.03, silence, Store(read, registered))


def test_a_store_that_does_not_respond_does_not_stop_renewals():
    broker, responds = Broker(), threading.Event()

    def read():
        responds.wait()
        return Control()

    with lease(broker, read):
        until(lambda: broker.renewals > 3)
    assert broker.released
    responds.set()


def test_a_store_that_fails_is_asked_again_until_the_experiment_is_cancelled():
    answers = iter([StoreError("unreachable"), Control(), Control("cancelled")])

    def read():
        answer = next(answers, Control("cancelled"))
        if isinstance(answer, StoreError):
            raise answer
        return answer

    with lease(Broker(), read) as held:
        until(lambda: held.cancelled)


def test_training_stops_when_the_experiment_is_removed():
    with lease(Broker(), registered=False) as held:
        until(lambda: held.cancelled)


def test_a_lease_taken_by_another_worker_is_lost():
    broker = Broker()
    with lease(broker) as held:
        until(lambda: broker.renewals > 1)
        assert not held.lost
        broker.kept = False
        until(lambda: held.lost)


@pytest.mark.parametrize("ended", [False, True])
def test_a_process_that_hangs_in_training_ends_and_one_that_has_trained_does_not(monkeypatch, ended):
    exits, broker = [], Broker()
    monkeypatch.setattr(os, "_exit", exits.append)
    with lease(broker, silence=0.1) as held:
        until(lambda: broker.renewals > 5)  # silence before training, as while a dataset is fetched, is no hang
        assert not exits
        held.progress()
        if ended:
            held.trained()
            until(lambda: broker.renewals > 15)
        else:
            until(lambda: exits)
    assert set(exits) == (set() if ended else {HUNG})
