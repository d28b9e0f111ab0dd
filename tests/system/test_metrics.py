"""Metrics and logs of real services, compared with their work."""

import io
import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pandas as pd
import pytest

from memtail.execution.shard_task import ShardOutcome
from memtail.experiment_store import Control
from memtail.scores.pointer import latest_version
from memtail.storage import keys
from memtail.subsets import membership
from memtail.trials import Shard
from services.common.broker import TASK, Assignment
from services.worker.metric_updates import OUTCOMES
from tests.support.cluster import PROJECT
from tests.support.experiments import PER_SHARD, SHARDS, TRIALS, faulty, gated
from tests.support.faulty_models import Gate
from tests.support.metrics import logged, scrape, states
from tests.support.servers import LossyProxy


def test_each_service_exports_metrics_of_its_work(cluster, experiment, digits):
    experiment_store, name = cluster.submit(experiment, digits), experiment.name
    dispatcher, worker, aggregator = (cluster.start(name) for name in ("dispatcher", "worker", "aggregator"))
    cluster.until_published(experiment_store, TRIALS)

    cluster.until(lambda: scrape(dispatcher).value("memtail_experiments", state="finished") == 1)
    seen = scrape(dispatcher)
    assert states(seen, name) == {"committed": TRIALS}
    assert seen.value("memtail_shards_outstanding", experiment=name) == 0
    assert seen.value("memtail_shards_sent_total", experiment=name) == SHARDS + seen.value("memtail_redeliveries_total")
    assert seen.value("memtail_leases_expired_total", experiment=name) == 0
    assert seen.value("memtail_completion_timestamp_seconds") is None
    assert seen.value("memtail_dispatcher_leader") == 1
    assert seen.value("memtail_broker_queued_messages") == 0
    assert seen.value("memtail_broker_memory_bytes") > 100_000
    assert seen.value("memtail_broker_clients") >= 2
    assert seen.value("memtail_passes_total", outcome="completed") > 1
    assert seen.value("memtail_passes_total", outcome="given up") == 0
    assert seen.value("memtail_pass_seconds_count") == seen.value("memtail_passes_total")

    # on a slow machine a shard may be sent twice
    cluster.until(lambda: scrape(worker).value("memtail_shard_attempts_total") == len(list(cluster.events(worker, "shard ended"))))
    seen = scrape(worker)
    attempts = {outcome: seen.value("memtail_shard_attempts_total", outcome=outcome) for outcome in OUTCOMES}
    assert attempts.pop(ShardOutcome.COMMITTED) == SHARDS
    assert not attempts[ShardOutcome.FAILED]
    assert not attempts[ShardOutcome.HANDED_BACK]
    assert not attempts[ShardOutcome.LOST_RACE]
    assert len(seen.values("memtail_shard_attempts_total", experiment=name)) == len(OUTCOMES)
    assert seen.value("memtail_trials_trained_total", experiment=name) == TRIALS
    members = membership(experiment.subsets, digits.train_labels, range(TRIALS))
    assert seen.value("memtail_examples_trained_total") == members.sum() * experiment.training.epochs
    provenance = [experiment_store.batch(shard, experiment_store.read_record()).provenance for shard in experiment_store.committed()]
    assert seen.value("memtail_trial_seconds_count") == TRIALS
    assert seen.value("memtail_trial_seconds_sum") == pytest.approx(sum(each.seconds for each in provenance))
    for phase in provenance[0].phases:
        assert seen.value("memtail_trial_phase_seconds_count", phase=phase) == TRIALS
        assert seen.value("memtail_trial_phase_seconds_sum", phase=phase) == pytest.approx(sum(each.phases[phase] for each in provenance))
    assert seen.value("memtail_shard_held_seconds_total") > seen.value("memtail_trial_seconds_sum")
    assert seen.value("memtail_shard_queue_seconds_count") == seen.value("memtail_shard_attempts_total")
    assert seen.value("memtail_shard_queue_seconds_sum") > 0
    assert seen.value("memtail_worker_devices") == 1
    assert seen.value("memtail_worker_devices_busy") == 0
    batches = sum(len(cluster.store.get(key)) for key in cluster.store.list(keys.trials(name)))
    assert seen.value("memtail_store_bytes_total", direction="written") > batches
    assert seen.value("memtail_store_requests_total", operation="put", outcome="ok") >= SHARDS
    assert "libtorch" not in Path(f"/proc/{worker.process.pid}/maps").read_text()

    pointer = latest_version(cluster.store, name)
    cluster.until(lambda: scrape(aggregator).value("memtail_trials_folded") == TRIALS)
    seen, summary = scrape(aggregator), pointer.summary
    assert seen.value("memtail_trials_diverged") == seen.value("memtail_trials_needed") == seen.value("memtail_batches_refused") == 0
    for examples in ("in_subset", "held_out", "test"):
        assert seen.value("memtail_accuracy_ratio", examples=examples) == pytest.approx(summary[f"{examples}_accuracy"])
    for quantile, error in summary["mem_se_quantiles"].items():
        assert seen.value("memtail_memorization_standard_error", quantile=quantile) == pytest.approx(error)
    assert seen.value("memtail_memorization_standard_error_bound") == pytest.approx((1 / 0.7 + 1 / 0.3) ** 0.5 / 2 / TRIALS**0.5)
    mem = pd.read_csv(io.BytesIO(cluster.scores(name)["memorization.csv"]))["mem"]
    for threshold in summary["mem_share_at_least"]:
        assert seen.value("memtail_memorized_examples", threshold=threshold) == (mem >= float(threshold)).sum()
    assert seen.value("memtail_memorization_examples") == mem.notna().sum()
    assert seen.value("memtail_memorization_examples", bin="0.95") == (mem >= 0.95).sum()
    assert seen.value("memtail_high_influence_pairs") == summary["pairs"]["count"]
    assert seen.value("memtail_selected_pairs") == summary["selected_pairs"]["count"]
    assert seen.value("memtail_scores_published_trials") == TRIALS
    assert seen.value("memtail_scores_published_timestamp_seconds") == datetime.fromisoformat(pointer.published).timestamp()
    assert seen.value("memtail_fold_seconds_count") == SHARDS
    assert seen.value("memtail_publish_seconds_count") >= 1
    for service in (dispatcher, worker, aggregator):
        assert scrape(service).value("memtail_build_info") == 1
        assert scrape(service).value("memtail_store_requests_total", operation="get", outcome="ok") > 0


def test_a_new_aggregator_exports_published_scores_before_it_accumulates_trials(living, experiment, digits):
    experiment_store = living.submit(experiment, digits)
    living.until_published(experiment_store, TRIALS)
    living.end(*living.services)
    for key in [keys.finished(experiment.name), *living.store.list(keys.trials(experiment.name))]:
        living.store.delete(key)
    aggregator = living.start("aggregator")
    living.until(lambda: living.serves(aggregator))
    seen, pointer = scrape(aggregator), latest_version(living.store, experiment.name)
    assert seen.value("memtail_trials_folded") == 0
    assert seen.value("memtail_scores_published_trials") == TRIALS
    assert seen.value("memtail_scores_published_timestamp_seconds") == datetime.fromisoformat(pointer.published).timestamp()
    assert seen.value("memtail_high_influence_pairs") == pointer.summary.pairs.count
    assert seen.value("memtail_selected_pairs") == pointer.summary.selected_pairs.count


def kill_training_processes(worker):
    for child in worker.children():
        os.kill(child, signal.SIGKILL)


def test_a_dead_training_process_is_counted_and_its_worker_still_exports_metrics(living, declare, digits):
    dispatcher, worker = living.kinds("dispatcher")[0], living.replace("worker")
    experiment_store = living.submit(gated(declare, name="dies"), digits)
    living.until(lambda: living.gate.waiting)
    kill_training_processes(worker)
    living.gate.open()
    living.until(lambda: len(experiment_store.committed()) == SHARDS)
    living.until(lambda: scrape(worker).value("memtail_shard_attempts_total", outcome="committed") == SHARDS)
    assert scrape(worker).value("memtail_shard_attempts_total", outcome="died") == 1
    assert scrape(worker).value("memtail_trials_trained_total") == TRIALS
    assert (scrape(dispatcher).value("memtail_redeliveries_total", experiment="dies") or 0) >= 1


def test_dead_shards_are_exported(living, declare, digits):
    (dispatcher,), worker = living.kinds("dispatcher"), living.replace("worker")
    experiment_store = living.submit(faulty(declare, "raise", always=True, name="dead"), digits)
    living.until(lambda: sorted(experiment_store.attempts().values()) == [3, 3])
    living.until(lambda: states(scrape(dispatcher), "dead") == {"dead": TRIALS})
    assert scrape(dispatcher).value("memtail_experiments", state="finished") == 1
    assert scrape(dispatcher).value("memtail_shards_outstanding") == 0
    failed = sum(experiment_store.attempts().values())
    living.until(lambda: scrape(worker).value("memtail_shard_attempts_total", outcome="failed") == failed)


def test_the_lease_of_a_lost_worker_counts_as_expired(living, declare, digits):
    dispatcher, worker = living.kinds("dispatcher")[0], living.replace("worker")
    execution = {"trials_per_shard": TRIALS, "device": "cpu"}
    experiment_store = living.submit(gated(declare, name="vanishes", execution=execution), digits)
    living.until(lambda: states(scrape(dispatcher), "vanishes") == {"training": TRIALS})
    living.until(lambda: scrape(worker).value("memtail_worker_devices_busy") == 1)
    worker.kill()
    living.until(lambda: scrape(dispatcher).value("memtail_leases_expired_total", experiment="vanishes") == 1)
    living.until(lambda: states(scrape(dispatcher), "vanishes") == {"queued": TRIALS})
    assert scrape(dispatcher).value("memtail_redeliveries_total", experiment="vanishes") == 1
    experiment_store.set_control(Control("paused"))
    living.until(lambda: states(scrape(dispatcher), "vanishes") == {"waiting": TRIALS})
    assert scrape(dispatcher).value("memtail_experiments", state="paused") == 1


def test_completion_is_estimated_during_training_and_a_standby_exports_no_experiments(living, declare, digits):
    execution = {"trials_per_shard": 1, "device": "cpu"}
    living.submit(declare(500, name="long", training={"epochs": 20}, execution=execution), digits)
    (dispatcher,) = living.kinds("dispatcher")
    living.until(lambda: (scrape(dispatcher).value("memtail_completion_timestamp_seconds") or 0) > time.time())
    second = living.start("dispatcher")
    living.until(lambda: living.serves(second))
    assert scrape(second).value("memtail_dispatcher_leader") == 0
    assert not scrape(second).experiments()
    assert scrape(second).value("memtail_experiments") is None
    dispatcher.stop()
    living.until(lambda: scrape(second).value("memtail_dispatcher_leader") == 1 and scrape(second).experiments() == {"long"})


def test_series_of_an_experiment_are_removed_after_its_deletion(living, declare, digits):
    for name in ("stays", "goes"):
        living.submit(gated(declare, name=name), digits)
    services = [*living.kinds("dispatcher"), *living.kinds("aggregator")]
    for service in services:
        living.until(lambda service=service: living.serves(service) and scrape(service).experiments() == {"stays", "goes"})
    living.store.delete(keys.experiment("goes"))
    for service in services:
        living.until(lambda service=service: scrape(service).experiments() == {"stays"})


def test_a_service_with_an_unavailable_port_ends_with_one_line(living):
    (first,) = living.kinds("aggregator")
    living.until(lambda: living.serves(first))
    for name in ("aggregator", "dispatcher", "worker"):
        second = living.start(name, MEMTAIL_PORT=first.port)
        assert second.process.wait(90) == 2
        text = f"MEMTAIL_PORT {first.port} is unavailable (Address already in use): give each service on this machine a different port"
        assert [(line["level"], line["event"]) for line in logged(second.log.read_text())] == [("critical", text)]


def test_series_of_an_experiment_are_removed_after_its_end_and_return_after_an_extension(cluster, declare, digits):
    def submit(name, trials):
        execution = {"trials_per_shard": PER_SHARD, "device": "cpu"}
        return cluster.submit(declare(trials, name=name, training={"epochs": 4}, execution=execution), digits)

    submit("goes-on", 10_000)
    experiment_store = submit("ends", TRIALS)
    experiment_store.set_control(Control(priority=1))
    services = [cluster.start(name, MEMTAIL_LINGER_SECONDS="2") for name in ("dispatcher", "worker", "aggregator")]
    cluster.until_published(experiment_store, TRIALS)
    for service in services:
        cluster.until(lambda service=service: scrape(service).experiments() == {"goes-on"})
    submit("ends", 10_000)
    for service in services:
        cluster.until(lambda service=service: "ends" in scrape(service).experiments())
    cluster.until(lambda: (scrape(services[2]).value("memtail_trials_folded", experiment="ends") or 0) > TRIALS)


def test_a_worker_logs_one_line_per_shard_and_names_experiment_and_shard_in_warnings(cluster, experiment, digits):
    experiment_store, name = cluster.submit(experiment, digits), experiment.name
    fingerprint = experiment_store.read_record().fingerprint

    def train(numbers):
        shards = [Shard(first, first + PER_SHARD - 1) for first in range(numbers.start * PER_SHARD, numbers.stop * PER_SHARD, PER_SHARD)]
        broker.send([Assignment(experiment=name, fingerprint=fingerprint, first=each.first, last=each.last) for each in shards])
        cluster.until(lambda: len(list(cluster.events(worker, "shard ended"))) == numbers.stop)
        return [str(shard) for shard in shards]

    with LossyProxy(cluster.minio) as proxy:
        broker = cluster.broker()
        worker = cluster.start("worker", MEMTAIL_S3_ENDPOINT=proxy.endpoint, MEMTAIL_LEASE_SECONDS="60")
        shards = train(range(SHARDS - 1))
        lines = logged(worker.log.read_text())
        assert [(line["level"], line["event"], line["experiment"], line["shard"]) for line in lines] == [
            ("info", "shard ended", name, shard) for shard in shards
        ]
        proxy.cuts += [(f"PUT /{cluster.bucket}/{keys.trials(name)}".encode(), 0)] * 2
        (last,) = train(range(SHARDS - 1, SHARDS))
        faults = logged(worker.log.read_text())[len(shards) : -1]
    assert faults
    for line in faults:
        assert (line["level"], line["event"], line["experiment"]) == ("warning", "store fails, trying again", name)
        assert line["shard"] == last
        assert line["key"].startswith(keys.trials(name))


def test_logs_are_json_and_contain_no_secrets(cluster, declare, digits, tmp_path):
    gate = Gate(tmp_path / "gate")
    experiment_store = cluster.submit(gated(declare), digits)
    services = [cluster.start(name, GATE_FOLDER=str(tmp_path / "gate")) for name in ("dispatcher", "worker", "aggregator")]
    cluster.until(lambda: gate.waiting)
    kill_training_processes(services[1])
    gate.open()
    cluster.until(experiment_store.attempts)
    cluster.redis.kill()
    cluster.until(lambda: scrape(services[0]).value("memtail_dispatcher_leader") == 0)
    cluster.redis.start()
    cluster.until(lambda: scrape(services[0]).value("memtail_dispatcher_leader") == 1)
    cluster.until_published(experiment_store, TRIALS)

    wrong = cluster.redis.url.replace(cluster.redis.password, "wrong-password")
    refused = [cluster.start(name, MEMTAIL_BROKER=wrong) for name in ("dispatcher", "worker")]
    for service in refused:
        cluster.until(lambda service=service: "password" in service.log.read_text())
    for service in (*services, *refused):
        service.process.terminate()
        assert service.process.wait(60) == 0
    for name in ("dispatcher", "worker"):
        malformed = cluster.start(name, MEMTAIL_BROKER=f"redis://:{cluster.redis.password}/more@127.0.0.1:{cluster.redis.port}/0")
        assert malformed.process.wait(90) == 2
        assert ["MEMTAIL_BROKER is not a Redis URL" in line["event"] for line in logged(malformed.log.read_text())] == [True]

    for service in cluster.services:
        log = service.log.read_text()
        assert all({"timestamp", "level", "event"} <= line.keys() for line in logged(log))
        for secret in (cluster.redis.password, "wrong-password", cluster.minio.settings().secret_key):
            assert secret not in log
    events = {line["event"] for line in logged(services[1].log.read_text())}
    assert {"shard ended", "training process died"} < events


def test_warnings_and_uncaught_exceptions_are_logged_as_json():
    code = """
import threading, warnings
from services.common.process import configure_logs
class Unraisable:
    def __del__(self):
        raise ValueError("in __del__")
configure_logs()
warnings.warn("a warning")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
Unraisable()
raise RuntimeError("at the end")
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert not ended.stdout
    warning, *rest = logged(ended.stderr)
    assert "a warning" in warning["event"]
    assert warning["level"] == "warning"
    for line, error in zip(rest, ("ZeroDivisionError", "in __del__", "at the end"), strict=True):
        assert error in line["exception"]


def test_malformed_messages_are_dropped_logged_and_counted(living, experiment, digits):
    living.end(*living.kinds("dispatcher"), *living.kinds("worker"))
    experiment_store = living.submit(experiment, digits)
    properties = '{"delivery_tag": "1", "delivery_info": {}, "body_encoding": "base64"}'
    entries = [
        "no JSON",
        b"\xff\xfe",
        "3",
        "[1]",
        "{}",
        '{"properties": [], "body": ""}',
        "[" * 100_000,
        f'{{"properties": {properties}, "headers": {{}}, "body": ""}}',
        f'{{"properties": {properties}, "headers": {{"task": "{TASK}", "id": "1"}}, "body": "x"}}',
    ]
    living.redis.client().lpush(f"{living.broker().prefix}shards", *entries)
    dispatcher = living.start("dispatcher")
    living.until(lambda: list(living.events(dispatcher, "sent")))
    worker = living.start("worker")
    living.until(lambda: scrape(worker).value("memtail_messages_dropped_total") == len(entries))
    dropped = [line for line in logged(worker.log.read_text()) if line["event"] == "message dropped: it cannot be read"]
    assert len(dropped) == len(entries)
    living.until(lambda: len(experiment_store.committed()) == SHARDS)
