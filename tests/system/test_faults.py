"""Faults, each with real servers: at the end every trial is counted once, and the scores are those of an undisturbed run to the bit.

The time to recover is printed (`pytest -s`): from the end of the fault to the next committed shard, and to the scores of all trials.
"""

import os
import signal
import time
from contextlib import contextmanager

import pytest

from memtail.experiment_store import ExperimentStore
from memtail.storage import keys
from memtail.trials import Shard
from services.common.broker import Assignment, Broker
from services.common.settings import ServiceSettings
from tests.support.cluster import Cluster
from tests.support.servers import LossyProxy, MinioServer, debian_program
from tests.system.conftest import PER_SHARD, TRIALS

SHARDS = TRIALS // PER_SHARD


@pytest.fixture
def slow(declare):
    """An experiment whose shards take about two seconds each, so that a fault finds one in training."""
    model = {"name": "mlp", "hidden": [64]}
    return declare(TRIALS, model=model, training={"epochs": 400}, execution={"trials_per_shard": PER_SHARD, "device": "cpu"})


@pytest.fixture
def own_minio(tmp_path_factory):
    with MinioServer(tmp_path_factory.mktemp("minio")) as server:
        yield server


def trained(experiment_store, count=1):
    return lambda: len(experiment_store.committed()) >= count


@contextmanager
def recovery(cluster, experiment_store, experiment, expected, what):
    """The fault is the body; what must hold afterwards is checked here."""
    yield
    done = len(experiment_store.committed())
    resumed = cluster.until(lambda: len(experiment_store.committed()) > done or done == SHARDS, 120)
    finished = resumed + cluster.until_published(experiment_store, TRIALS, 180)
    print(f"\n{what}: the next shard committed after {resumed:.1f} s, all published after {finished:.1f} s")
    assert cluster.scores(experiment.name) == expected(experiment)
    trials = [trial for shard in experiment_store.committed() for trial in shard.trials]
    assert sorted(trials) == list(range(TRIALS))


def started(cluster, experiment, dataset, workers=2):
    experiment_store = cluster.submit(experiment, dataset)
    dispatcher = cluster.start("dispatcher")
    others = [cluster.start("worker") for _ in range(workers)]
    aggregator = cluster.start("aggregator")
    return experiment_store, dispatcher, others, aggregator


def test_redis_killed_and_started_again(cluster, slow, digits, expected):
    experiment_store, *_ = started(cluster, slow, digits)
    with recovery(cluster, experiment_store, slow, expected, "redis killed"):
        cluster.until(trained(experiment_store))
        cluster.redis.kill()
        time.sleep(1)
        cluster.redis.start()


def test_redis_flushed(cluster, slow, digits, expected):
    experiment_store, *_ = started(cluster, slow, digits)
    with recovery(cluster, experiment_store, slow, expected, "redis flushed"):
        cluster.until(trained(experiment_store))
        cluster.redis.client().flushall()


def test_the_store_is_down_at_start_in_the_middle_and_at_a_commit(tmp_path_factory, own_minio, slow, digits, expected):
    with Cluster(tmp_path_factory.mktemp("cluster"), own_minio) as cluster:
        experiment_store = cluster.submit(slow, digits)
        own_minio.stop()
        for name in ("dispatcher", "worker", "worker", "aggregator"):
            cluster.start(name)
        time.sleep(5)
        own_minio.start()
        with recovery(cluster, experiment_store, slow, expected, "store down"):
            cluster.until(trained(experiment_store))
            own_minio.stop()
            time.sleep(6)  # longer than a shard takes: what is in training comes to its commit meanwhile
            own_minio.start()
        assert not experiment_store.attempts()


def test_a_workers_child_killed(cluster, slow, digits, expected):
    experiment_store, _, (worker,), _ = started(cluster, slow, digits, workers=1)
    with recovery(cluster, experiment_store, slow, expected, "worker's child killed"):
        cluster.until(trained(experiment_store))
        for child in worker.children():
            os.kill(child, signal.SIGKILL)
    assert sum(experiment_store.attempts().values()) == 1
    assert worker.process.poll() is None


def test_a_worker_killed(cluster, slow, digits, expected):
    experiment_store, _, (worker, _), _ = started(cluster, slow, digits)
    with recovery(cluster, experiment_store, slow, expected, "worker killed"):
        cluster.until(trained(experiment_store))
        worker.kill()
    assert not experiment_store.attempts()


def test_the_dispatcher_killed(cluster, slow, digits, expected):
    experiment_store, dispatcher, *_ = started(cluster, slow, digits)
    with recovery(cluster, experiment_store, slow, expected, "dispatcher killed"):
        cluster.until(trained(experiment_store))
        dispatcher.kill()
        cluster.redis.client().delete("memtail:shards")  # so that there is something for the next one to do
        cluster.start("dispatcher")


def test_a_second_dispatcher_waits_and_takes_over(cluster, slow, digits, expected):
    experiment_store, dispatcher, *_ = started(cluster, slow, digits)
    with recovery(cluster, experiment_store, slow, expected, "dispatcher stopped"):
        cluster.until(trained(experiment_store))
        second = cluster.start("dispatcher")
        cluster.until(lambda: cluster.serves(second))
        assert not list(cluster.events(second, "sent"))
        dispatcher.stop()
        shard = experiment_store.committed()[0]

        def sends():
            # so that there is something to do for the second, however far the workers are, and whatever the first had still sent
            cluster.store.delete(keys.trial_batch(slow.name, shard.first, shard.last))
            return list(cluster.events(second, "sent"))

        cluster.until(sends)
        cluster.until(lambda: shard in experiment_store.committed())


def test_the_aggregator_killed_while_it_publishes(cluster, slow, digits, expected):
    experiment_store = cluster.submit(slow, digits)
    cluster.start("dispatcher")
    cluster.start("worker")
    aggregator = cluster.start("aggregator", MEMTAIL_PUBLISH_TRIALS="1")
    with recovery(cluster, experiment_store, slow, expected, "aggregator killed three times"):
        for count in (1, 2, 3):
            cluster.until(trained(experiment_store, count))
            cluster.until(lambda: any("scores" in key for key in cluster.store.list(f"experiments/{slow.name}/scores/0")))
            aggregator.kill()
            aggregator.start()


def test_one_message_delivered_five_times_at_once(cluster, slow, digits, expected):
    experiment_store = cluster.submit(slow, digits)
    fingerprint = experiment_store.read_record().fingerprint
    settings = ServiceSettings(store="-", broker=cluster.redis.url)
    assignment = Assignment(experiment=slow.name, fingerprint=fingerprint, first=0, last=PER_SHARD - 1)
    Broker(settings).send([assignment] * 5)
    workers = [cluster.start("worker") for _ in range(3)]
    cluster.until(lambda: sum(len(list(cluster.events(worker, "shard ended"))) for worker in workers) == 5)
    outcomes = "".join("".join(cluster.events(worker, "shard ended")) for worker in workers)
    assert outcomes.count('"outcome": "committed"') == 1
    assert experiment_store.committed() == [assignment.shard]
    with recovery(cluster, experiment_store, slow, expected, "message delivered five times"):
        cluster.start("dispatcher")
        cluster.start("aggregator")


@pytest.mark.parametrize("how", ["segfault", "memory", "raise", "killed"])
def test_a_task_that_goes_wrong_once(how, cluster, declare, digits, expected, tmp_path):
    experiment = faulty(declare, how)
    experiment_store = cluster.submit(experiment, digits)
    cluster.start("dispatcher")
    cluster.start("aggregator")
    with recovery(cluster, experiment_store, experiment, expected, f"task that goes wrong: {how}"):
        worker = cluster.start("worker", FAULT_FOLDER=str(tmp_path))
        cluster.until(experiment_store.attempts)
    assert sum(experiment_store.attempts().values()) == 1
    assert worker.process.poll() is None


@pytest.mark.parametrize("how", ["segfault", "raise"])
def test_a_task_that_always_goes_wrong_is_given_up_and_tried_again_when_asked(how, cluster, declare, digits, expected, tmp_path):
    experiment = faulty(declare, how, always=True)
    experiment_store = cluster.submit(experiment, digits)
    cluster.start("dispatcher")
    worker = cluster.start("worker", FAULT_FOLDER=str(tmp_path))
    cluster.until(lambda: sorted(experiment_store.attempts().values()) == [3, 3], 120)
    time.sleep(2)
    assert set(experiment_store.attempts().values()) == {3}
    assert not experiment_store.committed()
    worker.stop()
    with recovery(cluster, experiment_store, experiment, expected, f"given up ({how}), then mended"):
        cluster.start("worker")
        cluster.start("aggregator")
        experiment_store.clear_failures()


def test_a_task_that_hangs_past_its_time_limit(tmp_path_factory, minio, declare, digits, expected, tmp_path):
    experiment = faulty(declare, "hang")
    with Cluster(tmp_path_factory.mktemp("cluster"), minio, MEMTAIL_SHARD_SECONDS="30") as cluster:
        experiment_store = cluster.submit(experiment, digits)
        with recovery(cluster, experiment_store, experiment, expected, "task that hangs"):
            cluster.start("dispatcher")
            cluster.start("aggregator")
            cluster.start("worker", FAULT_FOLDER=str(tmp_path))
            cluster.until(experiment_store.attempts)
        assert sum(experiment_store.attempts().values()) == 1


def test_a_committed_object_deleted(cluster, slow, digits, expected):
    experiment_store, *_ = started(cluster, slow, digits)
    with recovery(cluster, experiment_store, slow, expected, "committed object deleted"):
        cluster.until(trained(experiment_store, 2))
        shard = experiment_store.committed()[0]
        cluster.store.delete(keys.trial_batch(slow.name, shard.first, shard.last))
        again = cluster.until(lambda: shard in experiment_store.committed())
        print(f"\ncommitted again after {again:.1f} s")


def test_a_damaged_and_a_foreign_batch_are_refused_and_reported(cluster, experiment, declare, digits, expected):
    experiment_store = cluster.submit(experiment, digits)
    other = declare(TRIALS, name="other", training={"epochs": 3}, execution={"trials_per_shard": PER_SHARD, "device": "cpu"})
    others = cluster.submit(other, digits)
    for name in ("dispatcher", "worker", "aggregator"):
        cluster.start(name)
    cluster.until_published(others, TRIALS)
    cluster.until_published(experiment_store, TRIALS)
    damaged, foreign = Shard(0, 3), Shard(4, 7)
    data = cluster.store.get(keys.trial_batch("digits", 0, 3))
    third = declare(TRIALS, name="third", training={"epochs": 4}, execution={"trials_per_shard": PER_SHARD, "device": "cpu"})
    thirds = ExperimentStore(cluster.store, "third")
    cluster.store.put(keys.trial_batch("third", 0, 3), data[: len(data) // 2])
    cluster.store.put(keys.trial_batch("third", 4, 7), cluster.store.get(keys.trial_batch("other", 4, 7)))
    cluster.submit(third, digits)
    cluster.until_published(thirds, TRIALS - 2 * PER_SHARD)
    reasons = {failure.shard: failure.error for failure in thirds.failures()}
    assert reasons.keys() == {damaged, foreign}
    assert "truncated or corrupt" in reasons[damaged]
    assert "belongs to another experiment" in reasons[foreign]
    with recovery(cluster, thirds, third, expected, "damaged and foreign batches, then removed"):
        for shard in (damaged, foreign):
            cluster.store.delete(keys.trial_batch("third", shard.first, shard.last))


def test_the_answer_to_a_write_is_lost(cluster, slow, digits, expected):
    experiment_store = cluster.submit(slow, digits)
    cluster.start("dispatcher")
    cluster.start("aggregator")
    with LossyProxy(cluster.minio) as proxy, recovery(cluster, experiment_store, slow, expected, "answers to writes lost"):
        path = f"PUT /{cluster.bucket}/{keys.trials(slow.name)}".encode()
        proxy.cuts += [(path, 0)] * 3
        worker = cluster.start("worker", MEMTAIL_S3_ENDPOINT=proxy.endpoint)
        cluster.until(lambda: not proxy.cuts)
        cluster.until(trained(experiment_store, SHARDS))
        assert '"outcome": "lost race"' not in worker.log.read_text()


def test_a_worker_whose_disk_is_full_leaves_the_work_to_others(cluster, slow, digits, expected):
    experiment_store = cluster.submit(slow, digits)
    cluster.start("dispatcher")
    cluster.start("aggregator")
    full = cluster.start("worker", prefix=("prlimit", "--fsize=20000"), MEMTAIL_CACHE=str(cluster.folder / "full"))
    with recovery(cluster, experiment_store, slow, expected, "disk full"):
        cluster.until(lambda: any(cluster.events(full, "shard handed back")))
        cluster.start("worker")
    assert not experiment_store.attempts()


def test_every_worker_in_turn_is_told_to_stop(cluster, slow, digits, expected):
    experiment_store, _, workers, _ = started(cluster, slow, digits)
    with recovery(cluster, experiment_store, slow, expected, "SIGTERM to every worker in turn"):
        for worker in workers:
            cluster.until(lambda: len(Broker(ServiceSettings(store="-", broker=cluster.redis.url)).leased()) >= 1)
            began = time.monotonic()
            worker.stop()
            print(f"\nstopped within {time.monotonic() - began:.1f} s")
            assert time.monotonic() - began < 25
            worker.start()
    assert not experiment_store.attempts()


def test_a_worker_whose_clock_is_off_by_an_hour_leaves_the_work_to_others(cluster, slow, digits, expected):
    experiment_store = cluster.submit(slow, digits)
    cluster.start("dispatcher")
    cluster.start("aggregator")
    off = cluster.start("worker", prefix=(debian_program("faketime"), "-f", "+1h"))
    with recovery(cluster, experiment_store, slow, expected, "clock of a worker off by an hour"):
        cluster.until(lambda: off.process.poll() is not None)
        assert "set the clock of this machine" in off.log.read_text()
        assert "Traceback" not in off.log.read_text()
        cluster.start("worker")
    assert not experiment_store.attempts()


def faulty(declare, how, always=False):
    model = {"name": "tests.support.faulty_models:faulty", "options": {"how": how, "always": always}}
    # what always fails is in few shards, each of which is tried three times
    execution = {"trials_per_shard": TRIALS // 2 if always else PER_SHARD, "device": "cpu"}
    return declare(TRIALS, name=f"{how}-always" if always else how, model=model, execution=execution)
