"""Passes of the dispatcher on a store in a folder, without Redis."""

import time

import pytest

from memtail.execution.declare import declare as declare_record
from memtail.experiment_store import ExperimentStore, record
from memtail.storage.local import LocalStore
from services.common.settings import ServiceSettings
from services.dispatcher.dispatcher import Dispatcher


class Broker:
    """One queue, from which a test takes messages as a worker does; no lease."""

    def __init__(self):
        self.messages = []

    def queues(self):
        return {"shards"} if self.messages else set()

    def queued(self, queue):
        return iter(self.messages)

    def leased(self):
        return set()

    def starts(self):
        return {}

    def send(self, assignments):
        self.messages += assignments


def test_a_message_taken_between_two_passes_is_sent_again_only_after_a_while(declare, digits, tmp_path):
    experiment = declare(8, execution={"trials_per_shard": 4, "device": "cpu"}, subsets={"design": "balanced"})
    store, broker = LocalStore(tmp_path), Broker()
    ExperimentStore(store, experiment.name).register(declare_record(experiment, digits, 4))
    dispatcher = Dispatcher(store, broker, ServiceSettings(store="-", lease_seconds=8.0))
    assert len(dispatcher.reconcile().send) == 2
    broker.messages.clear()
    assert not dispatcher.reconcile().send
    time.sleep(2.1)  # a quarter of the lease's duration
    assert len(dispatcher.reconcile().send) == 2


class Fleet:
    """Keeps the demands of the last pass."""

    def reconcile(self, demands, unreadable):
        self.outstanding = [demand.outstanding for demand in demands]


@pytest.mark.parametrize("image", [None, "registry/worker:old"])
def test_no_workers_are_started_for_what_this_version_does_not_train(declare, digits, tmp_path, monkeypatch, image):
    workers = {"workers": {"image": image}} if image else {}
    experiment = declare(8, execution={"trials_per_shard": 4, "device": "cpu", **workers}, subsets={"design": "balanced"})
    store, fleet = LocalStore(tmp_path), Fleet()
    experiment_store = ExperimentStore(store, experiment.name)
    experiment_store.register(declare_record(experiment, digits, 4))

    def outstanding():  # of a dispatcher that has just started
        assert Dispatcher(store, Broker(), ServiceSettings(store="-"), fleet).reconcile().send  # for workers that run
        return fleet.outstanding

    assert outstanding() == [2]
    monkeypatch.setattr(record, "RECIPE_VERSION", 3)
    assert outstanding() == ([2] if image else [0])
    lines = [line for notice in experiment_store.notices().values() for line in notice.lines]
    assert len(lines) == (0 if image else 1)
    assert all("this release does not train it: it has recipe 2, and memtail" in line for line in lines)
    monkeypatch.undo()
    assert outstanding() == [2]
    assert not experiment_store.notices()
