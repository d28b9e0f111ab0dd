"""Failures of shards whose worker was killed with its container, on a real Redis."""

import pytest

from memtail.execution.declare import declare as declare_record
from memtail.experiment_store import ExperimentStore
from memtail.trials import Shard
from services.common.broker import Assignment, Broker
from services.common.settings import ServiceSettings
from services.dispatcher.killed_workers import KilledWorkers
from services.dispatcher.kubernetes_objects import Pod
from tests.support.cluster import RedisServer
from tests.support.restricted import RestrictedStore


@pytest.fixture
def broker():
    server = RedisServer()
    server.start()
    yield Broker(ServiceSettings(store="-", broker=server.url))
    server.stop()


def pod(name, killed=True, devices=2):
    labels = {"memtail/experiment": "digits"}
    reason = ("failed: exit code 137, OOMKilled", "OOMKilled", "node")
    return Pod(name, f"uid of {name}", "a-1", labels, "Failed", *reason, killed=killed, devices=devices)


def watched(broker):
    return dict.fromkeys(broker.leased().items(), 0.0)


def test_the_shards_of_a_killed_worker_fail_once_and_their_leases_end(broker, experiment_store, tmp_path):
    record = experiment_store.read_record()
    first, second, third = (
        Assignment(experiment=record.experiment.name, fingerprint=record.fingerprint, first=shard, last=shard + 3) for shard in (0, 4, 8)
    )
    for assignment, holder in ((first, "a-1-x/1/8/2"), (second, "a-1-x/1/9/3"), (third, "a-1-xy/1/8/4")):
        assert broker.acquire(assignment, holder)
    store = RestrictedStore(tmp_path, "dispatcher")
    killed_workers = KilledWorkers(store, broker)
    before = watched(broker)
    killed_workers.record([pod("a-1-x", killed=False)], before)
    assert not experiment_store.attempts()
    for each in (killed_workers, killed_workers, KilledWorkers(store, broker)):
        each.record([pod("a-1-x"), pod("a-1")], before)
    assert experiment_store.attempts() == {Shard(0, 3): 1, Shard(4, 7): 1}
    [failure] = experiment_store.failures(Shard(0, 3))
    assert failure.error.startswith("the container of the worker was killed (exit code 137, OOMKilled): give workers more memory")
    assert (failure.origin.node, failure.origin.host) == ("node", "a-1-x")
    assert broker.leased() == {third.id: "a-1-xy/1/8/4"}


def test_forged_leases_of_a_killed_worker_give_up_no_shards_but_as_many_as_it_can_hold(broker, experiment_store, declare, digits, tmp_path):
    victim = ExperimentStore(experiment_store.store, "victim")
    victim.register(declare_record(declare(24, name="victim", execution={"device": "cpu"}, subsets={"design": "balanced"}), digits, 4))

    def forge(pod, *spans, experiment="digits"):
        for first, last in spans:
            assert broker.acquire(Assignment(experiment=experiment, fingerprint="0" * 64, first=first, last=last), f"{pod}/forged")

    killed_workers = KilledWorkers(RestrictedStore(tmp_path, "dispatcher"), broker)
    forge("a-1-x", *((first, first + 3) for first in range(0, 24, 4)), experiment="victim")
    forge("a-1-x", (1000, 1003), (0, 23))
    seen = watched(broker)
    forge("a-1-x", (8, 11))  # after the last pass in which the pod ran
    killed_workers.record([pod("a-1-x")], seen)
    assert not victim.attempts()
    assert not experiment_store.attempts()
    forge("a-1-y", *((first, first + 3) for first in range(12, 24, 4)))
    for _ in range(3):
        killed_workers.record([pod("a-1-y")], watched(broker))
    assert experiment_store.attempts().total() == 2
