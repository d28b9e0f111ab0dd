"""Failures of shards whose worker was killed with its container, on a real Redis."""

import pytest

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


def pod(name, killed=True):
    return Pod(name, f"uid of {name}", "a-1", {}, "Failed", "failed: exit code 137, OOMKilled", "OOMKilled", "node", killed=killed)


def test_the_shards_of_a_killed_worker_fail_once_and_their_leases_end(broker, experiment_store, tmp_path):
    record = experiment_store.read_record()
    first, second, third = (
        Assignment(experiment=record.experiment.name, fingerprint=record.fingerprint, first=shard, last=shard + 3) for shard in (0, 4, 8)
    )
    for assignment, holder in ((first, "a-1-x/1/8/2"), (second, "a-1-x/1/9/3"), (third, "a-1-xy/1/8/4")):
        assert broker.acquire(assignment, holder)
    store = RestrictedStore(tmp_path, "dispatcher")
    killed_workers = KilledWorkers(store, broker)
    killed_workers.record([pod("a-1-x", killed=False)])
    assert not experiment_store.attempts()
    for each in (killed_workers, killed_workers, KilledWorkers(store, broker)):
        each.record([pod("a-1-x"), pod("a-1")])
    assert experiment_store.attempts() == {Shard(0, 3): 1, Shard(4, 7): 1}
    [failure] = experiment_store.failures(Shard(0, 3))
    assert failure.error.startswith("the container of the worker was killed (exit code 137, OOMKilled): give workers more memory")
    assert (failure.origin.node, failure.origin.host) == ("node", "a-1-x")
    assert broker.leased() == {third.id: "a-1-xy/1/8/4"}
