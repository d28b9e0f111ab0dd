"""Faults of Redis that users of Celery have reported, on a real server: no trial is lost or counted twice, and no worker falls silent."""

import sys
import time

import pytest
import redis

from memtail.storage.identity import make_identity
from services.common.broker import Assignment
from tests.support.cluster import Cluster
from tests.support.experiments import gated
from tests.support.faulty_models import Gate
from tests.system.test_faults import half_done, recovery, trained

# Runs a worker with a visibility timeout of a second, which is checked every ten seconds.
_SHORT_VISIBILITY = """
import runpy
from services.common import broker
made = broker.celery_app
def celery_app(settings):
    app = made(settings)
    short = {"visibility_timeout": 1, "unacked_restore_throttle": 1}
    app.conf.broker_transport_options = {**app.conf.broker_transport_options, **short}
    return app
broker.celery_app = celery_app
runpy.run_module("services.worker", run_name="__main__", alter_sys=True)
"""


def restart_often(server):
    for pause in (0.1, 0.5, 0.05, 1, 0.2):
        server.kill()
        server.start()
        time.sleep(pause)


def test_redis_is_restarted_five_times_while_workers_idle(living, slow, digits, expected):
    restart_often(living.redis)
    experiment_store = half_done(living, slow, digits)
    with recovery(living, experiment_store, slow, expected, "redis restarted five times, workers idle"):
        living.gate.open()
    assert not experiment_store.attempts()


def test_redis_is_restarted_five_times_while_workers_train(living, slow, digits, expected, declare):
    experiment_store = half_done(living, slow, digits)
    with recovery(living, experiment_store, slow, expected, "redis restarted five times, workers train"):
        restart_often(living.redis)
        living.gate.open()
    assert not experiment_store.attempts()
    living.gate.close()
    half_done(living, gated(declare, name=f"{slow.name}-next"), digits)  # no worker is silent


def test_a_mutex_that_never_expires_keeps_messages_of_a_killed_worker(living, slow, digits, expected):
    """Kombu then restores no message; the dispatcher sends the shard again when its lease has ended."""
    experiment_store = half_done(living, slow, digits)
    living.redis.client().set(f"{living.broker().prefix}unacked_mutex", "x")
    with recovery(living, experiment_store, slow, expected, "worker killed under a mutex"):
        living.end(living.kinds("worker")[0])
        living.start("worker")
        living.gate.open()
    assert living.redis.client().ttl(f"{living.broker().prefix}unacked_mutex") == -1
    living.redis.client().delete(f"{living.broker().prefix}unacked_mutex")
    assert not experiment_store.attempts()


@pytest.mark.slow
def test_a_message_that_is_redelivered_during_training_is_dropped(living, slow, digits, expected):
    living.end(*living.kinds("dispatcher"), *living.kinds("worker"))
    experiment_store = living.submit(slow, digits)
    fingerprint, shards = experiment_store.read_record().fingerprint, ((0, 3), (4, 7))
    broker = living.broker()
    broker.send([Assignment(experiment=slow.name, fingerprint=fingerprint, first=first, last=last) for first, last in shards])
    workers = [living.start("worker", prefix=(sys.executable, "-c", _SHORT_VISIBILITY)) for _ in shards]
    with recovery(living, experiment_store, slow, expected, "messages redelivered during training"):
        living.until(lambda: {assignment.id for assignment in broker.queued("shards")} == set(broker.leased()) != set())
        living.gate.admit(1)
        living.until(lambda: any('"outcome": "leased by another"' in line for w in workers for line in living.events(w, "shard ended")))
        living.start("dispatcher")
        living.gate.open()
    assert not experiment_store.attempts()


@pytest.fixture
def crowded(tmp_path_factory, minio, declare, digits):
    """A cluster and an experiment of 20,000 shards, whose messages need more memory than Redis has."""
    folder = tmp_path_factory.mktemp("crowded")
    gate = Gate(folder / "gate")
    with Cluster(folder, minio, GATE_FOLDER=str(folder / "gate"), MEMTAIL_MAX_QUEUED="4000") as cluster:
        cluster.redis.client().config_set("maxmemory", "3mb")
        experiment = gated(declare, name="crowded", subsets={"trials": 20_000}, execution={"trials_per_shard": 1, "device": "cpu"})
        yield cluster, gate, cluster.submit(experiment, digits)


def continues(cluster, gate, experiment_store):
    """Give Redis memory; then train some shards, each once."""
    cluster.redis.client().config_set("maxmemory", "0")
    done = len(experiment_store.committed())
    gate.admit(8)
    cluster.until(trained(experiment_store, done + 8))
    cluster.until(lambda: cluster.redis.client().llen(f"{cluster.broker().prefix}shards") > 3000)
    assert all(service.process.poll() is None for service in cluster.services), cluster.logs()
    assert not experiment_store.attempts()

    def ended():
        lines = (line for service in cluster.services for line in cluster.events(service, "shard ended"))
        return sum('"outcome": "committed"' in line for line in lines)

    cluster.until(lambda: ended() == len(experiment_store.committed()), 30)  # a commit is logged a moment later; workers go on meanwhile


def fill(cluster):
    """Fill what is free of Redis, as a neighbour may."""
    client, size = cluster.redis.client(), 1 << 16
    while size:
        try:
            client.append("of-a-neighbour", "x" * size)
        except redis.OutOfMemoryError:
            size //= 2


def test_redis_is_full_and_refuses_writes(crowded):
    cluster, gate, experiment_store = crowded
    make_identity(experiment_store.store)  # for which workers wait
    workers = [cluster.start("worker"), cluster.start("worker")]
    cluster.until(lambda: all(cluster.serves(worker) for worker in workers))
    dispatcher = cluster.start("dispatcher")
    cluster.until(lambda: cluster.broker().waiting() > 100)
    fill(cluster)
    cluster.until(lambda: any("maxmemory" in line for line in cluster.events(dispatcher, "pass given up")))
    gate.admit(2)
    cluster.until(trained(experiment_store, 2))
    cluster.redis.client().delete("of-a-neighbour")
    continues(cluster, gate, experiment_store)


def test_workers_begin_after_messages_have_filled_redis(crowded):
    cluster, gate, experiment_store = crowded
    dispatcher = cluster.start("dispatcher")
    cluster.until(lambda: cluster.broker().load().memory > 0.8 * (3 << 20))
    workers = [cluster.start("worker"), cluster.start("worker")]
    cluster.until(lambda: all(cluster.serves(worker) for worker in workers), seconds=30)
    gate.admit(2)
    cluster.until(trained(experiment_store, 2))
    assert len(list(cluster.events(dispatcher, "Redis is nearly full: shards wait outside the queue"))) == 1
    assert not any(cluster.events(dispatcher, "pass given up"))
    continues(cluster, gate, experiment_store)


@pytest.mark.slow
def test_redis_is_full_and_evicts_queues_and_leases(crowded):
    cluster, gate, experiment_store = crowded
    cluster.redis.client().config_set("maxmemory-policy", "allkeys-lru")
    for name in ("dispatcher", "worker", "worker"):
        cluster.start(name)
    cluster.until(lambda: cluster.redis.client().info("stats")["evicted_keys"] > 3)
    gate.admit(2)
    cluster.until(trained(experiment_store, 2))
    continues(cluster, gate, experiment_store)
