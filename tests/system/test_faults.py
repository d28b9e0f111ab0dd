"""Faults on real servers: at the end every trial is counted once, and the scores have the bits of an undisturbed run.

`pytest -s` prints the recovery time: from the end of the fault to the next committed shard, and to the scores of all trials.
"""

import os
import signal
import socket
import time
from contextlib import ExitStack, contextmanager

import pytest
import urllib3

from memtail.execution.progress import progress_of
from memtail.experiment_store import ExperimentStore
from memtail.storage import keys
from memtail.trials import Shard
from services.common.broker import Assignment, Broker
from services.worker.app import WORKER_AT_FAULT
from tests.support.batches import commit
from tests.support.cluster import LivingCluster, RedisServer
from tests.support.experiments import PER_SHARD, SHARDS, TRIALS, faulty, gated
from tests.support.metrics import scrape
from tests.support.servers import LossyProxy, debian_program


def trained(experiment_store, count=1):
    return lambda: len(experiment_store.committed()) >= count


@contextmanager
def recovery(cluster, experiment_store, experiment, expected, what, shards=SHARDS):
    """Inject a fault in the body; then wait for all trials, and check that each is counted once and that the scores are as expected."""
    yield
    done = len(experiment_store.committed())
    resumed = cluster.until(lambda: len(experiment_store.committed()) > done or done == shards, 120)
    finished = resumed + cluster.until_published(experiment_store, TRIALS, 180)
    print(f"\n{what}: the next shard committed after {resumed:.1f} s, all published after {finished:.1f} s")
    assert cluster.scores(experiment.name) == expected(experiment)
    trials = [trial for shard in experiment_store.committed() for trial in shard.trials]
    assert sorted(trials) == list(range(TRIALS))


def half_done(cluster, experiment, dataset, workers=2):
    """Submit an experiment, and wait until one shard is committed and every worker trains another."""
    experiment_store = cluster.submit(experiment, dataset)
    cluster.gate.admit(1)
    cluster.until(trained(experiment_store))
    cluster.until(lambda: len(cluster.broker().leased()) == workers)
    return experiment_store


def test_redis_is_killed_and_restarted(living, slow, digits, expected):
    experiment_store = half_done(living, slow, digits)
    with recovery(living, experiment_store, slow, expected, "redis killed"):
        living.redis.kill()
        time.sleep(0.5)
        living.redis.start()
        living.gate.open()


def test_redis_is_flushed(living, slow, digits, expected):
    experiment_store = half_done(living, slow, digits)
    with recovery(living, experiment_store, slow, expected, "redis flushed"):
        living.redis.client().flushall()
        living.gate.open()


def test_the_store_is_down_at_start_and_at_commits(tmp_path_factory, own_minio, slow, digits, expected):
    with LivingCluster(tmp_path_factory.mktemp("cluster"), own_minio) as cluster:
        experiment_store = cluster.submit(slow, digits)
        own_minio.stop()
        for name in ("dispatcher", "worker", "worker", "aggregator"):
            cluster.start(name)
        cluster.until(lambda: all("store fails, trying again" in service.log.read_text() for service in cluster.services))
        own_minio.start()
        cluster.gate.admit(1)
        with recovery(cluster, experiment_store, slow, expected, "store down"):
            cluster.until(trained(experiment_store))
            cluster.until(lambda: len(cluster.broker().leased()) == cluster.gate.waiting == 2)
            own_minio.stop()
            cluster.gate.open()
            for worker in cluster.kinds("worker"):  # all reach a commit
                cluster.until(
                    lambda worker=worker: keys.experiment(slow.name) in "".join(cluster.events(worker, "store fails, trying again"))
                )
            own_minio.start()
        assert not experiment_store.attempts()


def test_a_training_process_is_killed(living, slow, digits, expected):
    experiment_store = half_done(living, slow, digits)
    worker = living.kinds("worker")[0]
    with recovery(living, experiment_store, slow, expected, "training process killed"):
        for child in worker.children():
            os.kill(child, signal.SIGKILL)
        living.until(experiment_store.attempts)
        living.gate.open()
    assert sum(experiment_store.attempts().values()) == 1
    assert worker.process.poll() is None


def test_a_worker_is_killed(living, slow, digits, expected):
    experiment_store = half_done(living, slow, digits)
    with recovery(living, experiment_store, slow, expected, "worker killed"):
        living.kinds("worker")[0].kill()
        living.gate.open()
    assert not experiment_store.attempts()


def test_the_dispatcher_is_killed(living, slow, digits, expected):
    experiment_store = half_done(living, slow, digits)
    with recovery(living, experiment_store, slow, expected, "dispatcher killed"):
        living.end(*living.kinds("dispatcher"))
        living.redis.client().delete(f"{living.broker().prefix}shards")  # so that its successor must send shards
        living.start("dispatcher")
        living.gate.open()


def test_a_second_dispatcher_waits_and_takes_over(living, slow, digits, expected):
    experiment_store = half_done(living, slow, digits)
    (dispatcher,) = living.kinds("dispatcher")
    with recovery(living, experiment_store, slow, expected, "dispatcher stopped"):
        second = living.start("dispatcher")
        living.until(lambda: living.serves(second))
        assert not list(living.events(second, "sent"))
        dispatcher.stop()
        living.gate.open()
        shard = experiment_store.committed()[0]

        def sends():
            # a missing batch makes the second dispatcher send a shard, even if the first had sent all others
            living.store.delete(keys.trial_batch(slow.name, shard.first, shard.last))
            experiment_store.reopen("it may have ended")
            return list(living.events(second, "sent"))

        living.until(sends)
        living.until(lambda: shard in experiment_store.committed())


def test_the_aggregator_is_killed_during_publications(living, slow, digits, expected):
    aggregator = living.replace("aggregator", MEMTAIL_PUBLISH_TRIALS="1")
    experiment_store = living.submit(slow, digits)
    with recovery(living, experiment_store, slow, expected, "aggregator killed three times"):
        for count in (1, 2, 3):
            living.gate.admit(1)
            living.until(trained(experiment_store, count))
            living.until(lambda: any("scores" in key for key in living.store.list(f"experiments/{slow.name}/scores/0")))
            aggregator.kill()
            aggregator.start()
        living.gate.open()


def test_one_message_is_delivered_five_times_concurrently(living, slow, digits, expected):
    living.end(*living.kinds("dispatcher"), *living.kinds("aggregator"), *living.kinds("worker"))
    experiment_store = living.submit(slow, digits)
    fingerprint = experiment_store.read_record().fingerprint
    assignment = Assignment(experiment=slow.name, fingerprint=fingerprint, first=0, last=PER_SHARD - 1)
    living.broker().send([assignment] * 5)
    living.gate.open()
    workers = [living.start("worker") for _ in range(3)]
    living.until(lambda: sum(len(list(living.events(worker, "shard ended"))) for worker in workers) == 5)
    outcomes = "".join("".join(living.events(worker, "shard ended")) for worker in workers)
    assert outcomes.count('"outcome": "committed"') == 1
    assert experiment_store.committed() == [assignment.shard]
    with recovery(living, experiment_store, slow, expected, "message delivered five times"):
        living.start("dispatcher")
        living.start("aggregator")


def test_two_workers_that_train_one_shard_differently_are_shown(living, slow, digits):
    """Each has its own Redis, so that no lease keeps them apart."""
    living.end(*living.kinds("dispatcher"), *living.kinds("worker"))
    experiment_store = living.submit(slow, digits)
    shard = Shard(0, PER_SHARD - 1)
    fingerprint = experiment_store.read_record().fingerprint
    assignment = Assignment(experiment=slow.name, fingerprint=fingerprint, first=shard.first, last=shard.last)
    other = RedisServer()
    other.start()
    workers = [living.start("worker"), living.start("worker", MEMTAIL_BROKER=other.url, DEVIATION="0.1")]
    try:
        living.broker().send([assignment])
        Broker(living.settings(broker=other.url)).send([assignment])
        living.until(lambda: living.gate.waiting == 2)
        living.gate.open()
        living.until(experiment_store.trained_twice)
        assert experiment_store.trained_twice() == {shard: True}
        counted = {"name": "memtail_replicas_differ_total", "experiment": slow.name, "kinds": "equal"}
        living.until(lambda: sum(scrape(worker).value(**counted) or 0 for worker in workers) == 1)
        (logged,) = [line for worker in workers for line in living.events(worker, "two trainings differ")]
        progress = progress_of(living.store, slow.name)
        assert progress.different == [shard]
        (line,) = progress.lines
        assert line.startswith("trials 0-3: two trainings differ in ")
        assert line in logged
        assert not experiment_store.attempts()
    finally:
        workers[1].kill()
        living.services.remove(workers[1])
        other.stop()


@pytest.mark.parametrize("how", [pytest.param("segfault", marks=pytest.mark.slow), "memory", "raise", "killed"])
def test_a_shard_fails_once(how, living, declare, digits, expected):
    experiment = faulty(declare, how, name=f"once-{how}")
    with recovery(living, living.submit(experiment, digits), experiment, expected, f"shard that fails: {how}"):
        experiment_store = ExperimentStore(living.store, experiment.name)
        living.until(experiment_store.attempts)
    assert sum(experiment_store.attempts().values()) == 1
    assert all(worker.process.poll() is None for worker in living.kinds("worker"))


@pytest.mark.parametrize("how", [pytest.param("segfault", marks=pytest.mark.slow), "raise"])
def test_a_shard_that_always_fails_is_given_up_and_retried_after_its_failures_are_cleared(how, living, declare, digits, expected):
    living.replace("worker")
    experiment = faulty(declare, how, always=True, name=f"always-{how}")
    experiment_store = living.submit(experiment, digits)
    living.until(lambda: sorted(experiment_store.attempts().values()) == [3, 3], 120)
    living.until(lambda: not living.broker().leased() and not living.broker().waiting())
    attempts = experiment_store.attempts()
    passes = scrape(living.kinds("dispatcher")[0]).value("memtail_passes_total")
    living.until(lambda: scrape(living.kinds("dispatcher")[0]).value("memtail_passes_total") >= passes + 5)
    assert experiment_store.attempts() == attempts
    assert set(attempts.values()) == {3}
    assert not experiment_store.committed()
    with recovery(living, experiment_store, experiment, expected, f"given up ({how}), then retried"):
        (living.faults / "fixed").touch()
        experiment_store.clear_failures()


@pytest.mark.parametrize("limit", ["MEMTAIL_SILENCE_SECONDS", pytest.param("MEMTAIL_SHARD_SECONDS", marks=pytest.mark.slow)])
def test_a_shard_hangs(living, declare, digits, expected, limit):
    living.replace("worker", **{limit: "20"})
    experiment = faulty(declare, "hang", name=f"hangs-{limit[8:15].lower()}")
    experiment_store = living.submit(experiment, digits)
    with recovery(living, experiment_store, experiment, expected, "shard that hangs"):
        living.until(experiment_store.attempts)
    assert sum(experiment_store.attempts().values()) == 1


def test_a_committed_trial_batch_is_deleted(living, slow, digits, expected):
    experiment_store = half_done(living, slow, digits)
    with recovery(living, experiment_store, slow, expected, "committed object deleted"):
        shard = experiment_store.committed()[0]
        living.store.delete(keys.trial_batch(slow.name, shard.first, shard.last))
        living.gate.open()
        again = living.until(lambda: shard in experiment_store.committed())
        print(f"\ncommitted again after {again:.1f} s")


def test_a_damaged_and_a_foreign_batch_are_refused_and_reported(living, experiment, declare, digits, expected):
    experiment_store = living.submit(experiment, digits)
    parts = {"execution": {"trials_per_shard": PER_SHARD, "device": "cpu"}}
    other = declare(TRIALS, name="other", training={"epochs": 3}, **parts)
    others = living.submit(other, digits)
    living.until_published(others, TRIALS)
    living.until_published(experiment_store, TRIALS)
    damaged, foreign = Shard(0, 3), Shard(4, 7)
    data = living.store.get(keys.trial_batch(experiment.name, 0, 3))
    third = declare(TRIALS, name="third", training={"epochs": 4}, **parts)
    thirds = ExperimentStore(living.store, "third")
    living.store.put(keys.trial_batch("third", 0, 3), data[: len(data) // 2])
    living.store.put(keys.trial_batch("third", 4, 7), living.store.get(keys.trial_batch("other", 4, 7)))
    living.submit(third, digits)
    living.until_published(thirds, TRIALS - 2 * PER_SHARD)
    reasons = {failure.shard: failure.error for failure in thirds.failures()}
    assert reasons.keys() == {damaged, foreign}
    assert "truncated or corrupt" in reasons[damaged]
    assert "belongs to another experiment" in reasons[foreign]
    with recovery(living, thirds, third, expected, "damaged and foreign batches, then removed"):
        for shard in (damaged, foreign):
            living.store.delete(keys.trial_batch("third", shard.first, shard.last))


def test_leases_and_counts_are_forged(living, slow, digits, expected):
    experiment_store = half_done(living, slow, digits)
    redis, prefix = living.redis.client(), living.broker().prefix
    with recovery(living, experiment_store, slow, expected, "redis forged"):
        for turn in range(60):
            for first in range(0, TRIALS, PER_SHARD):
                id_ = f"{slow.name}/{first}-{first + PER_SHARD - 1}"
                redis.hset("memtail2:starts", id_, 99)
                redis.hset(f"{prefix}starts", id_, 99)
                redis.hset(f"{prefix}leases", id_, (f"1 forged/{turn}", "999999999999999 forged", "forged")[turn % 3])
            time.sleep(0.05)
        living.gate.open()
    assert not experiment_store.attempts()


def test_responses_to_writes_are_lost(living, slow, digits, expected):
    living.end(*living.kinds("dispatcher"), *living.kinds("worker"))
    experiment_store = living.submit(slow, digits)
    living.gate.open()
    with LossyProxy(living.minio) as proxy, recovery(living, experiment_store, slow, expected, "answers to writes lost"):
        path = f"PUT /{living.bucket}/{keys.trials(slow.name)}".encode()
        proxy.cuts += [(path, 0)] * 3
        # the endpoint is in the prefix of the keys in Redis
        _, worker = [living.start(name, MEMTAIL_S3_ENDPOINT=proxy.endpoint) for name in ("dispatcher", "worker")]
        living.until(lambda: not proxy.cuts)
        living.until(trained(experiment_store, SHARDS))
        assert '"outcome": "lost race"' not in worker.log.read_text()


def test_a_worker_with_a_full_disk_hands_its_shards_back(living, slow, digits, expected):
    # a limit that the images of the dataset exceed, but not the log of a few seconds
    full = living.replace("worker", prefix=("prlimit", "--fsize=80000"), MEMTAIL_CACHE=str(living.folder / "full"))
    experiment_store = living.submit(slow, digits)
    living.gate.open()
    with recovery(living, experiment_store, slow, expected, "disk full"):
        living.until(lambda: any(living.events(full, "worker at fault, shard handed back")))
        living.start("worker")
        living.until(lambda: full.process.poll() == WORKER_AT_FAULT)
    assert not experiment_store.attempts()


@pytest.mark.parametrize("broken", [{"MEMTAIL_DEVICES": "cuda:31"}, {"MEMTAIL_CACHE": "/dev/null/x"}], ids=["device", "cache"])
def test_a_worker_without_its_device_or_cache_kills_no_shard(living, slow, digits, expected, broken):
    """It takes every message first, since the healthy worker trains until the gate opens."""
    experiment_store = half_done(living, slow, digits)
    with recovery(living, experiment_store, slow, expected, f"a worker without {next(iter(broken))}"):
        living.end(living.kinds("worker")[0])
        faulty = living.start("worker", **broken)
        living.until(lambda: faulty.process.poll() == WORKER_AT_FAULT)
        assert "Traceback" not in faulty.log.read_text()
        living.gate.open()
    assert not experiment_store.attempts()


def test_the_next_attempt_at_a_shard_is_made_on_another_node(living, declare, digits, expected):
    """One node fails every shard it takes, with an error that says nothing about the node."""
    living.end(*living.kinds("worker"))
    living.start("worker", MEMTAIL_NODE="bad")
    living.start("worker", MEMTAIL_NODE="good", FAULT_FOLDER="")
    living.until(lambda: len(living.broker().workers()) == 2)
    experiment = faulty(declare, "raise", always=True, name="black-hole", execution={"trials_per_shard": 1, "device": "cpu"})
    experiment_store = living.submit(experiment, digits)
    with recovery(living, experiment_store, experiment, expected, "a node that fails every shard", shards=TRIALS):
        living.until(experiment_store.attempts)
    assert {failure.origin.node for failure in experiment_store.failures()} == {"bad"}
    assert set(experiment_store.attempts().values()) == {1}


def test_a_shard_is_given_up_after_it_failed_on_two_nodes(living, declare, digits):
    living.end(*living.kinds("worker"))
    for node in ("one", "two"):
        living.start("worker", MEMTAIL_NODE=node)
    living.until(lambda: len(living.broker().workers()) == 2)
    experiment_store = living.submit(faulty(declare, "raise", always=True, name="always-two-nodes"), digits)
    living.until(lambda: sorted(experiment_store.attempts().values()) == [3, 3], 120)
    for shard in experiment_store.attempts():
        assert {failure.origin.node for failure in experiment_store.failures(shard)} == {"one", "two"}


def test_an_experiment_whose_first_shards_fail_alike_is_paused_and_runs_again_after_a_retry(living, declare, digits, expected):
    experiment = faulty(declare, "raise", always=True, name="broken", execution={"trials_per_shard": 1, "device": "cpu"})
    experiment_store = living.submit(experiment, digits)
    living.until(lambda: experiment_store.control().state == "paused")
    living.until(lambda: not living.broker().leased() and not living.broker().waiting())
    assert max(experiment_store.attempts().values()) < 3
    (line,) = experiment_store.notices()["dispatcher"].lines
    assert "ValueError: this network cannot be built" in line
    assert "memtail retry broken" in line
    (living.faults / "fixed").touch()
    experiment_store.retry()
    living.until_published(experiment_store, TRIALS)
    assert living.scores("broken") == expected(experiment)
    assert "dispatcher" not in experiment_store.notices()


def test_health_checks_and_metrics_answer_beside_silent_connections(living):
    living.until(lambda: all(living.serves(service) for service in living.services))
    logged = {service.log: len(service.log.read_text()) for service in living.services}
    for service in living.services:
        with ExitStack() as silent:
            for _ in range(20):
                silent.enter_context(socket.create_connection(("127.0.0.1", int(service.port))))
            assert living.serves(service)
            assert scrape(service).value("memtail_build_info") == 1
    assert all("Traceback" not in log.read_text()[length:] for log, length in logged.items())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_store_that_never_answers_ends_no_service_and_loses_no_lease(tmp_path_factory, own_minio, declare, digits, expected):
    default = dict.fromkeys(("MEMTAIL_LEASE_SECONDS", "MEMTAIL_RECONCILE_SECONDS", "MEMTAIL_RESYNC_SECONDS", "MEMTAIL_PUBLISH_SECONDS"), "")
    with LossyProxy(own_minio) as proxy, LivingCluster(tmp_path_factory.mktemp("cluster"), own_minio) as cluster:
        cluster.environment |= default | {"MEMTAIL_S3_ENDPOINT": proxy.endpoint}
        experiments = [gated(declare, name=f"silent-{number}") for number in range(20)]
        stores = [cluster.submit(experiment, digits) for experiment in experiments]
        for name in ("dispatcher", "worker", "aggregator"):
            cluster.start(name)
        cluster.gate.admit(1)
        cluster.until(lambda: any(store.committed() for store in stores))
        cluster.until(lambda: cluster.gate.waiting == 1)
        cluster.until(lambda: all(cluster.serves(service) for service in cluster.services))
        proxy.silent = True
        until = time.monotonic() + 180
        http = urllib3.PoolManager(retries=False)
        while time.monotonic() < until:
            for service in cluster.services:  # as a liveness probe does
                assert http.request("GET", f"http://127.0.0.1:{service.port}/healthz", timeout=5).status == 200, service.name
            time.sleep(5)
        assert cluster.broker().leased()  # of the shard in training
        proxy.silent = False
        cluster.gate.open()
        resumed = cluster.until(lambda: sum(len(store.committed()) for store in stores) > 1, 150)
        finished = resumed + sum(cluster.until_published(store, TRIALS, 240) for store in stores)
        print(f"\nsilent store: the next shard committed after {resumed:.1f} s, all published after {finished:.1f} s")
        assert cluster.scores("silent-0") == expected(experiments[0])
        assert not any(store.attempts() for store in stores)
        (dispatcher,) = cluster.kinds("dispatcher")
        expired = [scrape(dispatcher).value("memtail_leases_expired_total", experiment=each.name) for each in experiments]
        assert not any(expired)


def test_workers_are_stopped_one_after_another(living, slow, digits, expected):
    experiment_store = half_done(living, slow, digits)
    with recovery(living, experiment_store, slow, expected, "SIGTERM to every worker in turn"):
        for worker in living.kinds("worker"):
            living.until(lambda: len(living.broker().leased()) >= 1)
            began = time.monotonic()
            worker.stop()
            print(f"\nstopped within {time.monotonic() - began:.1f} s")
            assert time.monotonic() - began < 25
            worker.start()
        living.gate.open()
    assert not experiment_store.attempts()


def test_a_worker_with_a_wrong_clock_ends_and_names_the_fix(living, slow, digits, expected):
    off = living.replace("worker", prefix=(debian_program("faketime"), "-f", "+1h"))
    experiment_store = living.submit(slow, digits)
    living.gate.open()
    with recovery(living, experiment_store, slow, expected, "clock of a worker off by an hour"):
        living.until(lambda: off.process.poll() is not None)
        assert "set the clock of this machine" in off.log.read_text()
        assert "Traceback" not in off.log.read_text()
        living.start("worker")
    assert not experiment_store.attempts()


def test_the_aggregator_is_killed_after_many_batches_and_reads_only_the_new_ones(cluster, declare, digits):
    experiment = declare(100, name="many", execution={"trials_per_shard": 1, "device": "cpu"})
    experiment_store = cluster.submit(experiment, digits)
    shards = [Shard(trial, trial) for trial in range(100)]
    commit(experiment_store, *shards[:90])
    aggregator = cluster.start("aggregator")
    cluster.until(lambda: cluster.store.exists(keys.snapshot("many")))
    aggregator.kill()
    commit(experiment_store, *shards[90:])
    aggregator.start()
    cluster.until_published(experiment_store, 100)
    read = scrape(aggregator).value("memtail_fold_seconds_count")
    assert 10 <= read <= 36  # at least 64 batches are in the snapshot
    restarted = cluster.scores("many")

    aggregator.kill()
    cluster.store.delete(keys.snapshot("many"))
    for key in list(cluster.store.list(keys.all_scores("many"))):
        cluster.store.delete(key)
    aggregator.start()
    cluster.until_published(experiment_store, 100)
    assert scrape(aggregator).value("memtail_fold_seconds_count") == 100
    assert cluster.scores("many") == restarted
