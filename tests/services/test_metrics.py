"""What the services show and log, compared with what happened: real services, scraped as Prometheus does it."""

import io
import time
from datetime import datetime
from pathlib import Path

import pandas as pd
import pytest
import urllib3
from prometheus_client.parser import text_string_to_metric_families

from memtail.archive import Control
from memtail.scores.publish import latest_version
from memtail.storage import keys
from memtail.subsets import membership
from services.worker.training import Outcome
from tests.services.cluster import Service
from tests.services.conftest import PER_SHARD, TRIALS
from tests.services.test_faults import faulty

SHARDS = TRIALS // PER_SHARD


class Scrape:
    """One scrape of a service."""

    def __init__(self, text: str) -> None:
        self._samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def values(self, name: str, **labels: str) -> list[float]:
        """The values of the series with these labels, and perhaps others."""
        return [sample.value for sample in self._samples if sample.name == name and labels.items() <= sample.labels.items()]

    def value(self, name: str, **labels: str) -> float | None:
        """The sum of those; None if there are none."""
        found = self.values(name, **labels)
        return sum(found) if found else None

    def experiments(self) -> set[str]:
        """All that have series."""
        return {sample.labels["experiment"] for sample in self._samples if "experiment" in sample.labels}


def scrape(service: Service) -> Scrape:
    until_up = urllib3.Retry(connect=200, backoff_factor=0.1, backoff_max=0.3)
    answer = urllib3.PoolManager(retries=until_up).request("GET", f"http://127.0.0.1:{service.port}/metrics", timeout=10)
    assert answer.status == 200
    return Scrape(answer.data.decode())


def states(scraped: Scrape, experiment: str) -> dict[str, float]:
    return {
        state: count
        for state in ("waiting", "queued", "training", "committed", "dead")
        if (count := scraped.value("memtail_trials", experiment=experiment, state=state))
    }


def test_each_service_shows_what_was_done(cluster, experiment, digits):
    archive = cluster.submit(experiment, digits)
    dispatcher, worker, aggregator = (cluster.start(name) for name in ("dispatcher", "worker", "aggregator"))
    cluster.until_published(archive, TRIALS)

    cluster.until(lambda: scrape(dispatcher).value("memtail_experiments", state="finished") == 1)
    seen = scrape(dispatcher)
    assert states(seen, "digits") == {"committed": TRIALS}
    assert seen.value("memtail_shards_outstanding", experiment="digits") == 0
    assert seen.value("memtail_shards_sent_total", experiment="digits") == SHARDS + seen.value("memtail_redeliveries_total")
    assert seen.value("memtail_leases_expired_total", experiment="digits") == 0
    assert seen.value("memtail_completion_timestamp_seconds") is None
    assert seen.value("memtail_dispatcher_leader") == 1 and seen.value("memtail_broker_queued_messages") == 0
    assert seen.value("memtail_broker_memory_bytes") > 100_000 and seen.value("memtail_broker_clients") >= 2
    assert seen.value("memtail_passes_total", outcome="completed") > 1 and seen.value("memtail_passes_total", outcome="given up") == 0
    assert seen.value("memtail_pass_seconds_count") == seen.value("memtail_passes_total")

    # on a slow machine a shard may be sent twice
    cluster.until(lambda: scrape(worker).value("memtail_shard_attempts_total") == len(list(cluster.events(worker, "shard ended"))))
    seen = scrape(worker)
    attempts = {outcome: seen.value("memtail_shard_attempts_total", outcome=outcome) for outcome in Outcome}
    assert attempts.pop(Outcome.COMMITTED) == SHARDS
    assert not attempts[Outcome.FAILED] and not attempts[Outcome.HANDED_BACK] and not attempts[Outcome.LOST_RACE]
    assert len(seen.values("memtail_shard_attempts_total", experiment="digits")) == len(Outcome) + 1
    assert seen.value("memtail_trials_trained_total", experiment="digits") == TRIALS
    members = membership(experiment.subsets, digits.train_labels, range(TRIALS))
    assert seen.value("memtail_examples_trained_total") == members.sum() * experiment.training.epochs
    provenance = [archive.batch(shard, archive.record()).provenance for shard in archive.committed()]
    assert seen.value("memtail_trial_seconds_count") == TRIALS
    assert seen.value("memtail_trial_seconds_sum") == pytest.approx(sum(each["seconds"] for each in provenance))
    (measured,) = (each["phases"] for each in provenance if "phases" in each)
    for phase, seconds in measured.items():
        assert seen.value("memtail_trial_phase_seconds_count", phase=phase) == PER_SHARD
        assert seen.value("memtail_trial_phase_seconds_sum", phase=phase) == pytest.approx(seconds)
    assert seen.value("memtail_shard_queue_seconds_count") == seen.value("memtail_shard_attempts_total")
    assert seen.value("memtail_shard_queue_seconds_sum") > 0
    assert seen.value("memtail_worker_devices") == 1 and seen.value("memtail_worker_devices_busy") == 0
    batches = sum(len(cluster.store.get(key)) for key in cluster.store.list(keys.trials("digits")))
    assert seen.value("memtail_store_bytes_total", direction="written") > batches
    assert seen.value("memtail_store_requests_total", operation="put", outcome="ok") >= SHARDS
    assert "libtorch" not in Path(f"/proc/{worker.process.pid}/maps").read_text()

    pointer = latest_version(cluster.store, "digits")
    cluster.until(lambda: scrape(aggregator).value("memtail_trials_folded") == TRIALS)
    seen, summary = scrape(aggregator), pointer["summary"]
    assert seen.value("memtail_trials_diverged") == seen.value("memtail_trials_needed") == seen.value("memtail_batches_refused") == 0
    for examples in ("in_subset", "held_out", "test"):
        assert seen.value("memtail_accuracy_ratio", examples=examples) == pytest.approx(summary[f"{examples}_accuracy"])
    for quantile, error in summary["mem_se_quantiles"].items():
        assert seen.value("memtail_memorization_standard_error", quantile=quantile) == pytest.approx(error)
    assert seen.value("memtail_memorization_standard_error_bound") == pytest.approx((1 / 0.7 + 1 / 0.3) ** 0.5 / 2 / TRIALS**0.5)
    mem = pd.read_csv(io.BytesIO(cluster.scores("digits")["memorization.csv"]))["mem"]
    for threshold in summary["mem_share_at_least"]:
        assert seen.value("memtail_memorized_examples", threshold=threshold) == (mem >= float(threshold)).sum()
    assert seen.value("memtail_memorization_examples") == mem.notna().sum()
    assert seen.value("memtail_memorization_examples", bin="0.95") == (mem >= 0.95).sum()
    assert seen.value("memtail_high_influence_pairs") == summary["pairs"]["count"]
    assert seen.value("memtail_scores_published_trials") == TRIALS
    assert seen.value("memtail_scores_published_timestamp_seconds") == datetime.fromisoformat(pointer["published"]).timestamp()
    assert seen.value("memtail_fold_seconds_count") == SHARDS and seen.value("memtail_publish_seconds_count") >= 1
    for service in (dispatcher, worker, aggregator):
        assert scrape(service).value("memtail_build_info") == 1
        assert scrape(service).value("memtail_store_requests_total", operation="get", outcome="ok") > 0


def test_a_new_aggregator_shows_what_is_published_before_it_has_folded_anything(cluster, experiment, digits):
    archive = cluster.submit(experiment, digits)
    others = [cluster.start(name) for name in ("dispatcher", "worker", "aggregator")]
    cluster.until_published(archive, TRIALS)
    for service in others:
        service.stop()
    for key in list(cluster.store.list(keys.trials("digits"))):
        cluster.store.delete(key)
    aggregator = cluster.start("aggregator")
    cluster.until(lambda: cluster.serves(aggregator))
    seen, pointer = scrape(aggregator), latest_version(cluster.store, "digits")
    assert seen.value("memtail_trials_folded") == 0 and seen.value("memtail_scores_published_trials") == TRIALS
    assert seen.value("memtail_scores_published_timestamp_seconds") == datetime.fromisoformat(pointer["published"]).timestamp()
    assert seen.value("memtail_high_influence_pairs") == pointer["summary"]["pairs"]["count"]


def test_a_process_that_dies_is_counted_and_the_worker_goes_on_to_show_metrics(cluster, declare, digits, tmp_path):
    archive = cluster.submit(faulty(declare, "segfault"), digits)
    dispatcher, worker = cluster.start("dispatcher"), cluster.start("worker", FAULT_FOLDER=str(tmp_path))
    cluster.until(lambda: len(archive.committed()) == SHARDS)
    cluster.until(lambda: scrape(worker).value("memtail_shard_attempts_total", outcome="committed") == SHARDS)
    assert scrape(worker).value("memtail_shard_attempts_total", outcome="died") == 1
    assert scrape(worker).value("memtail_trials_trained_total") == TRIALS
    assert scrape(dispatcher).value("memtail_redeliveries_total") >= 1


def test_dead_shards_are_shown(cluster, declare, digits, tmp_path):
    archive = cluster.submit(faulty(declare, "raise", always=True), digits)
    dispatcher, worker = cluster.start("dispatcher"), cluster.start("worker", FAULT_FOLDER=str(tmp_path))
    cluster.until(lambda: sorted(archive.attempts().values()) == [3, 3])
    cluster.until(lambda: states(scrape(dispatcher), archive.name) == {"dead": TRIALS})
    assert scrape(dispatcher).value("memtail_experiments", state="finished") == 1
    assert scrape(dispatcher).value("memtail_shards_outstanding") == 0
    cluster.until(lambda: scrape(worker).value("memtail_shard_attempts_total", outcome="failed") == 6)


def test_a_worker_that_vanishes_leaves_a_lease_that_expires(cluster, declare, digits):
    execution = {"trials_per_shard": TRIALS, "device": "cpu"}
    archive = cluster.submit(declare(TRIALS, training={"epochs": 20_000}, execution=execution), digits)
    dispatcher, worker = cluster.start("dispatcher"), cluster.start("worker")
    cluster.until(lambda: states(scrape(dispatcher), "digits") == {"training": TRIALS})
    cluster.until(lambda: scrape(worker).value("memtail_worker_devices_busy") == 1)
    worker.kill()
    cluster.until(lambda: scrape(dispatcher).value("memtail_leases_expired_total", experiment="digits") == 1)
    cluster.until(lambda: states(scrape(dispatcher), "digits") == {"queued": TRIALS})
    assert scrape(dispatcher).value("memtail_redeliveries_total") == 1
    archive.set_control(Control("paused"))
    cluster.until(lambda: states(scrape(dispatcher), "digits") == {"waiting": TRIALS})
    assert scrape(dispatcher).value("memtail_experiments", state="paused") == 1


def test_the_time_of_completion_is_shown_while_trials_come_and_a_dispatcher_that_waits_shows_none(cluster, declare, digits):
    execution = {"trials_per_shard": 1, "device": "cpu"}
    cluster.submit(declare(500, training={"epochs": 20}, execution=execution), digits)
    dispatcher, _ = cluster.start("dispatcher"), cluster.start("worker")
    cluster.until(lambda: (scrape(dispatcher).value("memtail_completion_timestamp_seconds") or 0) > time.time())
    second = cluster.start("dispatcher")
    cluster.until(lambda: cluster.serves(second))
    assert scrape(second).value("memtail_dispatcher_leader") == 0 and not scrape(second).experiments()
    assert scrape(second).value("memtail_experiments") is None
    dispatcher.stop()
    cluster.until(lambda: scrape(second).value("memtail_dispatcher_leader") == 1 and scrape(second).experiments() == {"digits"})


def test_an_experiment_that_is_removed_from_the_bucket_goes_from_the_metrics(cluster, declare, digits):
    for name in ("stays", "goes"):
        cluster.submit(declare(TRIALS, name=name), digits)
    services = [cluster.start(name) for name in ("dispatcher", "aggregator")]
    for service in services:
        cluster.until(lambda service=service: cluster.serves(service) and scrape(service).experiments() == {"stays", "goes"})
    cluster.store.delete(keys.experiment("goes"))
    for service in services:
        cluster.until(lambda service=service: scrape(service).experiments() == {"stays"})


def test_two_services_with_one_port_say_so(cluster):
    first = cluster.start("aggregator")
    cluster.until(lambda: cluster.serves(first))
    for name in ("aggregator", "dispatcher", "worker"):
        second = cluster.start(name, MEMTAIL_PORT=first.port)
        assert second.process.wait(90) == 2
        line = (
            f"memtail: MEMTAIL_PORT is {first.port}, which cannot be had (Address already in use): give each service here a port of its own"
        )
        assert second.log.read_text().splitlines() == [line]
