"""Passes of the dispatcher on a store in a folder, without Redis."""

import time

from memtail.execution.declare import declare as declare_record
from memtail.experiment_store import ExperimentStore
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
