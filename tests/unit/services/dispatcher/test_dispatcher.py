"""Passes of the dispatcher on a store in a folder, without Redis."""

import time
from collections import Counter
from contextlib import nullcontext

import pytest
import structlog

from memtail.errors import UnreachableError
from memtail.execution.breaker import common_error
from memtail.execution.declare import declare as declare_record
from memtail.experiment_store import Control, ExperimentStore, Origin, record
from memtail.storage import keys
from memtail.storage.local import LocalStore
from memtail.trials import Shard
from services.common.broker import WorkerPlace, queue_name
from services.common.settings import ServiceSettings
from services.dispatcher.dispatcher import Dispatcher
from tests.support.restricted import RestrictedStore


class Broker:
    """One queue, from which a test takes messages as a worker does; no lease."""

    def __init__(self):
        self.messages, self.nodes, self.leader, self.room = [], ["a"], None, 1000

    def queues(self):
        return {"shards"} if self.messages else set()

    def queued(self, queue):
        return iter(self.messages)

    def lead(self, holder):
        return self.leader in (None, holder)

    def leased(self):
        return {}

    def take_expired(self):
        return {}

    def send(self, assignments):
        sent = assignments[: self.room]
        self.messages += sent
        return sent

    def clear(self, queue):
        self.messages.clear()

    def workers(self, experiment):
        return [WorkerPlace("shards", node, node) for node in self.nodes]


@pytest.fixture
def broker():
    return Broker()


@pytest.fixture
def dispatcher(experiment_store, broker, tmp_path):
    return Dispatcher(RestrictedStore(tmp_path, "dispatcher"), broker, ServiceSettings(store="-", lease_seconds=8.0))


def test_a_message_taken_between_two_passes_is_sent_again_only_after_a_while(dispatcher, broker):
    assert len(dispatcher.reconcile().send) == 6
    broker.messages.clear()
    assert not dispatcher.reconcile().send
    time.sleep(2.1)  # a quarter of the lease's duration
    assert len(dispatcher.reconcile().send) == 6


def test_shards_for_which_redis_has_no_memory_are_sent_when_it_has(dispatcher, broker):
    with structlog.testing.capture_logs() as logs:
        for room, sent in ((2, 2), (0, 0), (1, 1), (0, 0), (1000, 3), (0, 0)):
            broker.room = room
            assert len(dispatcher.reconcile().send) == sent
    assert len(broker.messages) == len({assignment.id for assignment in broker.messages}) == 6
    assert [line["shards"] for line in logs if "nearly full" in line["event"]] == [4]


def test_a_failed_shard_is_sent_again_after_pauses_that_grow(dispatcher, broker, experiment_store, monkeypatch):
    now = 1000.0
    monkeypatch.setattr("services.dispatcher.dispatcher.time.monotonic", lambda: now)
    shard = Shard(0, 3)

    def sent():
        broker.messages.clear()
        return shard in [assignment.shard for assignment in dispatcher.reconcile().send]

    assert sent()
    now += 2.1  # in transit no more
    for pause in (2, 8):  # a quarter of the lease's duration, then four times as much
        experiment_store.record_failure(shard, "boom")
        assert not sent()
        now += pause - 0.1
        assert not sent()
        now += 0.2
        assert sent()
        now += 2.1


def test_a_store_that_stops_responding_ends_the_pass_at_the_first_experiment(declare, digits, tmp_path, broker):
    class Silent(LocalStore):
        requests = 0

        def get(self, key, limit=None):
            self.requests += 1
            raise UnreachableError("does not respond")  # after two minutes each

    store = Silent(tmp_path)
    record = declare_record(declare(8, execution={"trials_per_shard": 4, "device": "cpu"}, subsets={"design": "balanced"}), digits, 4)
    for number in range(20):
        ExperimentStore(LocalStore(tmp_path), f"e-{number}").register(record)
    with pytest.raises(UnreachableError):
        Dispatcher(store, broker, ServiceSettings(store="-")).reconcile()
    assert store.requests == 1


@pytest.mark.parametrize("error", [UnreachableError("SlowDown"), OSError("odd")])
def test_a_listing_that_fails_begins_again(experiment_store, broker, tmp_path, error):
    class Flaky(LocalStore):
        fails = False

        def list(self, prefix):
            for key in super().list(prefix):
                yield key
                if self.fails and "/trials/" in prefix:
                    self.fails = False
                    raise error

    store = Flaky(tmp_path)
    for first in range(0, 20, 4):
        store.put(keys.trial_batch("digits", first, first + 3), b"")
    dispatcher = Dispatcher(store, broker, ServiceSettings(store="-", resync_seconds=0.0))
    assert dispatcher.reconcile().outstanding == {"digits": 1}
    store.fails = True
    with pytest.raises(UnreachableError) if isinstance(error, UnreachableError) else nullcontext():
        assert dispatcher.reconcile().outstanding == {}
    assert dispatcher.reconcile().outstanding == {"digits": 1}


def test_an_experiment_that_stays_unreadable_is_logged_once(experiment_store, dispatcher, monkeypatch):
    monkeypatch.setenv("MEMTAIL_MAX_TRIALS", "1")
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            dispatcher.reconcile()
    assert [line["event"] for line in logs].count("experiment passed over") == 1


def fail(experiment_store, shards, error="KeyError: {}", node="a"):
    for first in range(0, 4 * shards, 4):
        experiment_store.record_failure(Shard(first, first + 3), error.format(first), origin=Origin(node, node))


def test_an_experiment_whose_first_five_shards_failed_alike_is_paused_once(dispatcher, broker, experiment_store):
    fail(experiment_store, 4)
    dispatcher.reconcile()
    assert experiment_store.control() == Control()
    fail(experiment_store, 5)
    broker.messages.clear()
    assert not dispatcher.reconcile().send
    assert experiment_store.control() == Control("paused", tripped=True)
    (line,) = experiment_store.notices()["dispatcher"].lines
    assert "KeyError: " in line
    experiment_store.set_control(Control(tripped=True))  # resumed by its owner
    dispatcher.reconcile()
    assert experiment_store.control().state == "running"
    assert "dispatcher" not in experiment_store.notices()
    experiment_store.retry()
    dispatcher.reconcile()
    fail(experiment_store, 5)
    dispatcher.reconcile()
    assert experiment_store.control() == Control("paused", tripped=True)


def test_an_experiment_whose_owner_pauses_it_meanwhile_keeps_its_priority(dispatcher, experiment_store, monkeypatch):
    fail(experiment_store, 5)

    def interrupted(*arguments):
        experiment_store.set_control(Control("cancelled", priority=7))
        return common_error(*arguments)

    monkeypatch.setattr("services.dispatcher.tracked_experiment.common_error", interrupted)
    dispatcher.reconcile()
    assert experiment_store.control() == Control("cancelled", priority=7)


def test_an_experiment_is_not_paused_if_its_shards_failed_on_one_of_several_nodes_only(dispatcher, broker, experiment_store):
    broker.nodes.append("b")
    fail(experiment_store, 6)
    dispatcher.reconcile()
    assert experiment_store.control().state == "running"
    fail(experiment_store, 1, node="b")
    dispatcher.reconcile()
    assert experiment_store.control().state == "paused"


def test_an_experiment_is_not_paused_for_different_errors_or_lost_workers(dispatcher, experiment_store):
    fail(experiment_store, 3)
    fail(experiment_store, 6, "10 workers were lost", node="")
    dispatcher.reconcile()
    assert experiment_store.control().state == "running"


class Queues(Broker):
    """A queue for each experiment, as workers of a cluster have."""

    def queues(self):
        return {queue_name(FLEET, each.experiment) for each in self.messages}

    def queued(self, queue):
        return (each for each in self.messages if queue_name(FLEET, each.experiment) == queue)


FLEET = ServiceSettings(store="-", fleet="fleet.yaml", max_queued=12)


def test_only_experiments_with_something_to_train_share_the_queues(declare, digits, tmp_path):
    store = LocalStore(tmp_path)
    for name in ("busy", "paused", "committed-1", "committed-2"):
        experiment = declare(48, name=name, execution={"trials_per_shard": 4, "device": "cpu"}, subsets={"design": "balanced"})
        ExperimentStore(store, name).register(declare_record(experiment, digits, 4))
        for first in range(0, 48, 4) if name.startswith("committed") else ():
            store.put(keys.trial_batch(name, first, first + 3), b"")
    ExperimentStore(store, "paused").set_control(Control("paused"))
    assert len(Dispatcher(RestrictedStore(tmp_path, "dispatcher"), Queues(), FLEET, Fleet()).reconcile().send) == 12
    ExperimentStore(store, "paused").set_control(Control())
    sent = Dispatcher(RestrictedStore(tmp_path, "dispatcher"), Queues(), FLEET, Fleet()).reconcile().send
    assert Counter(each.experiment for each in sent) == {"busy": 6, "paused": 6}


class Fleet:
    """Keeps the demands of the last pass."""

    def pods(self):
        return []

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
        restricted = RestrictedStore(tmp_path, "dispatcher")
        assert Dispatcher(restricted, Broker(), ServiceSettings(store="-"), fleet).reconcile().send  # for workers that run
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
