"""The broker on a real Redis: leases, lost workers, leadership, and two releases on one server. Forged keys cost time only."""

import time
from dataclasses import replace

import pytest

from memtail.execution.declare import declare as declare_record
from memtail.experiment_store import ExperimentStore
from memtail.storage import keys
from memtail.storage.identity import make_identity, read_identity
from memtail.storage.local import LocalStore
from services.common.broker import Assignment, Broker
from services.common.settings import ServiceError, ServiceSettings
from services.dispatcher.dispatcher import Dispatcher

LEASE, MAX_STARTS, SHARDS = 0.4, 3, 6
SHARD = Assignment(experiment="e", fingerprint="0" * 64, first=0, last=3)


@pytest.fixture
def services(server):
    server.client().flushall()
    return ServiceSettings(store="s3://bucket", broker=server.url, lease_seconds=LEASE, max_starts=MAX_STARTS)


@pytest.fixture
def broker(services):
    return Broker(services)


@pytest.fixture
def experiment_store(declare, digits, tmp_path):
    experiment = declare(4 * SHARDS, name="e", execution={"trials_per_shard": 4, "device": "cpu"}, subsets={"design": "balanced"})
    made = ExperimentStore(LocalStore(tmp_path), "e")
    made.register(declare_record(experiment, digits, 4))
    return made


@pytest.fixture
def dispatcher(experiment_store, broker, services):
    return Dispatcher(experiment_store.store, broker, services)


def until_expired():
    time.sleep(LEASE + 0.05)


def test_a_lease_has_one_holder_until_it_is_released_or_expires(broker):
    assert broker.acquire(SHARD, "a/1")
    assert not broker.acquire(SHARD, "b/1")
    assert broker.renew(SHARD, "a/1")
    assert not broker.renew(SHARD, "b/1")
    broker.release(SHARD, "b")
    assert broker.leased() == {SHARD.id: "a/1"}
    broker.release(SHARD, "a")
    assert not broker.leased()
    assert not broker.take_expired()
    assert broker.acquire(SHARD, "b/1")
    until_expired()
    assert not broker.leased()
    assert broker.acquire(SHARD, "a/1")


def test_an_expired_lease_is_reported_once_and_can_be_renewed(broker):
    broker.acquire(SHARD, "a/1")
    until_expired()
    assert broker.take_expired() == {SHARD.id: "a/1"}
    assert not broker.take_expired()
    assert broker.renew(SHARD, "a/1")
    assert broker.leased() == {SHARD.id: "a/1"}


def test_a_forged_lease_without_end_holds_nobody_up(server, broker):
    for value in ("999999999999999 forged", "soon", ""):
        server.client().hset(f"{broker.prefix}leases", SHARD.id, value)
        assert not broker.leased()
        assert broker.acquire(SHARD, "a/1")
        broker.release(SHARD, "a/1")
        server.client().hset(f"{broker.prefix}leases", SHARD.id, value)
        assert not broker.take_expired()
        assert not server.client().exists(f"{broker.prefix}leases")


def test_a_forged_leader_without_end_is_replaced(server, broker):
    server.client().set(f"{broker.prefix}leader", "forged")
    assert broker.lead("a")
    assert not broker.lead("b")
    broker.step_down("b")
    assert not broker.lead("b")
    broker.step_down("a")
    assert broker.lead("b")


def test_workers_register_for_the_duration_of_a_lease_with_one_command(server, broker):
    server.client().zadd(f"{broker.prefix}workers", {'["shards", "forged", "forged"]': 1e15})
    before = server.client().info("commandstats")
    broker.register_worker("node", "host")
    broker.register_worker("node", "host")
    assert [worker.node for worker in broker.workers()] == ["node"]
    assert server.client().info("commandstats")["cmdstat_evalsha"]["calls"] - before.get("cmdstat_evalsha", {"calls": 0})["calls"] <= 3
    until_expired()
    assert not broker.workers()


@pytest.mark.parametrize(("policy", "refused"), [("noeviction", True), ("allkeys-lru", False)])
def test_messages_are_sent_as_long_as_redis_has_memory(server, broker, policy, refused):
    client = server.client()
    limit = client.info("memory")["used_memory"] + (3 << 20)
    client.config_set("maxmemory-policy", policy)
    client.config_set("maxmemory", limit)
    try:
        shards = [SHARD.model_copy(update={"first": first, "last": first}) for first in range(5000)]
        sent = broker.send(shards)
        assert sent == shards[: len(sent)]
        assert sent
        if refused:
            assert list(broker.queued("shards")) == sent[::-1]
            assert 0.8 * limit < client.info("memory")["used_memory"] < 0.9 * limit
            assert not broker.send(shards)
            broker.clear("shards")
            assert broker.send(shards[:5]) == shards[:5]
        else:
            assert sent == shards
    finally:
        client.config_set("maxmemory", 0)
        client.config_set("maxmemory-policy", "noeviction")


def lose(broker, dispatcher, assignment, holder, seen=True):
    """A worker is lost: it leases a shard, and neither renews nor releases it."""
    broker.acquire(assignment, holder)
    if seen:
        dispatcher.reconcile()
    until_expired()
    dispatcher.reconcile()


def test_a_shard_that_lost_many_workers_gets_a_failed_attempt(broker, dispatcher, experiment_store):
    (first, *_) = dispatcher.reconcile().send
    for number in range(MAX_STARTS):
        assert not experiment_store.attempts()
        lose(broker, dispatcher, first, f"worker/{number}")
    assert experiment_store.attempts() == {first.shard: 1}
    (failure,) = experiment_store.failures()
    assert failure.error.startswith("3 workers were lost while they trained the shard")
    dispatcher.reconcile()
    assert experiment_store.attempts() == {first.shard: 1}


def test_a_worker_that_comes_back_was_not_lost(broker, dispatcher, experiment_store):
    """As after an outage of the network between a worker and Redis that was longer than its lease."""
    (first, *_) = dispatcher.reconcile().send
    for _ in range(MAX_STARTS + 1):
        lose(broker, dispatcher, first, "worker/1")
        broker.renew(first, "worker/1")
        dispatcher.reconcile()
        broker.release(first, "worker/1")
    assert not experiment_store.attempts()


@pytest.mark.parametrize("forgery", ["counts", "expired", "released"])
def test_forged_losses_give_no_shard_up(server, broker, dispatcher, experiment_store, forgery):
    raw, sent = server.client(), dispatcher.reconcile().send
    for _ in range(5 * MAX_STARTS):
        for number, assignment in enumerate(sent):
            if forgery == "counts":
                raw.hset(f"{broker.prefix}starts", assignment.id, 99)
                raw.hset("memtail2:starts", assignment.id, 99)
            elif forgery == "expired":
                raw.hset(f"{broker.prefix}leases", assignment.id, f"1 forged/{number}")
            else:
                broker.acquire(assignment, f"forged/{time.monotonic()}")
        dispatcher.reconcile()
        if forgery == "released":
            raw.delete(f"{broker.prefix}leases")
    assert not experiment_store.attempts()
    assert dispatcher.reconcile().outstanding == {"e": SHARDS}


def test_a_flush_is_no_loss(server, broker, dispatcher, experiment_store):
    sent = dispatcher.reconcile().send
    for number in range(MAX_STARTS + 1):
        for assignment in sent:
            broker.acquire(assignment, f"worker/{number}")
        dispatcher.reconcile()
        server.client().flushall()
        dispatcher.reconcile()
    assert not experiment_store.attempts()


def test_two_releases_on_one_redis_do_not_touch_each_other(server, services, declare, digits, tmp_path):
    """Their experiments have the same name, and so have their buckets, on two servers."""
    releases = []
    for number in (1, 2):
        own = ServiceSettings(**{**vars(services), "identity": str(number).encode()})
        execution = {"trials_per_shard": 4, "device": "cpu"}
        experiment = declare(4 * SHARDS * number, name="e", execution=execution, subsets={"design": "balanced"})
        store = LocalStore(tmp_path / str(number))
        ExperimentStore(store, "e").register(declare_record(experiment, digits, 4))
        releases.append((Broker(own), Dispatcher(store, Broker(own), own)))
    for _ in range(3):
        for number, (broker, dispatcher) in enumerate(releases, 1):
            dispatcher._reconcile_if_leader()
            assert broker.waiting() == SHARDS * number
            assert len(set(broker.queued("shards"))) == SHARDS * number
            broker.register_worker("node", f"host-{number}")
            assert [worker.host for worker in broker.workers()] == [f"host-{number}"]
    (first, _), (second, _) = releases
    taken = next(first.queued("shards"))
    assert first.acquire(taken, "a/1")
    assert second.acquire(taken, "b/1")
    assert all(key.startswith((first.prefix, second.prefix)) for key in server.client().keys("*"))


def test_the_identity_of_a_store_is_written_back(services, experiment_store, monkeypatch):
    """Workers that start later would otherwise take messages from other keys than those of the dispatcher."""
    store = experiment_store.store
    own = replace(services, store=store.address, identity=make_identity(store), resync_seconds=1e-3)
    dispatcher = Dispatcher(store, Broker(own), own)
    dispatcher.reconcile()
    store.delete(keys.identity())
    monkeypatch.setattr("services.dispatcher.dispatcher.Throttle.due", True)
    dispatcher.reconcile()
    assert read_identity(store) == own.identity


def test_a_queue_of_an_experiment_that_is_gone_is_forgotten(server, broker, dispatcher, experiment_store):
    dispatcher.reconcile()
    assert broker.queues() == {"shards"}
    for key in list(experiment_store.store.list("")):
        experiment_store.store.delete(key)
    dispatcher.reconcile()
    assert not broker.queues()
    assert not broker.waiting()


def test_a_pass_uses_no_command_that_looks_at_all_keys(server, broker, dispatcher):
    server.client().config_resetstat()
    dispatcher.reconcile()
    broker.load()
    assert not server.client().info("commandstats").keys() & {"cmdstat_scan", "cmdstat_keys"}


def test_a_dispatcher_that_lost_the_leadership_in_a_pass_sends_nothing(broker, dispatcher, experiment_store, monkeypatch):
    """Its pass takes longer than its leadership lasts, and another dispatcher leads meanwhile."""
    read = ExperimentStore.read_record

    def slowly(self):
        until_expired()
        assert broker.lead("another")
        return read(self)

    dispatcher._reconcile_if_leader()
    broker.clear("shards")
    dispatcher._last_queued.clear()
    monkeypatch.setattr(ExperimentStore, "read_record", slowly)
    with pytest.raises(ServiceError, match="another dispatcher leads"):
        dispatcher._reconcile_if_leader()
    assert not broker.waiting()


def test_a_long_pass_keeps_the_leadership(broker, dispatcher, experiment_store, declare, digits, monkeypatch):
    for number in range(4):
        experiment = declare(8, name=f"e-{number}", execution={"trials_per_shard": 4, "device": "cpu"}, subsets={"design": "balanced"})
        ExperimentStore(experiment_store.store, experiment.name).register(declare_record(experiment, digits, 4))
    read, others = ExperimentStore.read_record, []

    def slowly(self):
        time.sleep(0.4 * LEASE)
        others.append(broker.lead("another"))
        return read(self)

    monkeypatch.setattr(ExperimentStore, "read_record", slowly)
    dispatcher._reconcile_if_leader()
    assert others == [False] * 5
    assert broker.waiting() == SHARDS + 8
