"""Metric updates: completion estimates, removal of series, and reports of processes that may be killed."""

import os
import signal
import time
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from memtail.execution.shard_task import ShardOutcome
from memtail.experiment_store import Control
from memtail.trials import Shard
from services.common.broker import Assignment, parse_id
from services.common.experiment_series import ExperimentSeries
from services.common.process import Heartbeat
from services.dispatcher.completion import WINDOW, Completion
from services.dispatcher.metric_updates import ExperimentMetrics, ExperimentStatus
from services.dispatcher.reconcile import View
from services.worker import metric_updates as worker
from services.worker.reports import Reports


def test_completion_is_extrapolated_from_the_rate_of_the_last_minutes():
    completion = Completion()
    assert completion.seconds_left(0, 100, 50) is None
    assert completion.seconds_left(10, 100, 50) is None
    assert completion.seconds_left(20, 110, 40) == pytest.approx(80)
    # only the window counts: 30 trials in 600 s
    assert completion.seconds_left(20 + WINDOW, 110, 40) is None
    assert completion.seconds_left(WINDOW + 620, 140, 10) == pytest.approx(10 * 600 / 30)
    assert completion.seconds_left(WINDOW + 630, 150, 0) is None


def test_completion_is_unknown_while_no_trials_are_committed():
    completion = Completion()
    completion.seconds_left(0, 100, 50)
    assert completion.seconds_left(10, 90, 60) is None
    assert completion.seconds_left(WINDOW + 5, 95, 55) == pytest.approx(55 * (WINDOW - 5) / 5)


@pytest.fixture
def series():
    registry = CollectorRegistry()
    gauge = Gauge("g", "", ["experiment"], registry=registry)
    counter = Counter("c", "", ["experiment", "outcome"], registry=registry)
    histogram = Histogram("h", "", ["experiment"], registry=registry)

    def there():
        return {sample.labels["experiment"] for metric in registry.collect() for sample in metric.samples}

    def fill(*names):
        for name in names:
            gauge.labels(name).set(1)
            counter.labels(name, "a").inc()
            counter.labels(name, "b").inc()
            histogram.labels(name).observe(1)

    return lambda linger: (ExperimentSeries((gauge, counter, histogram), linger), fill, there)


def test_series_of_an_experiment_are_removed_some_time_after_its_end(series):
    kept, fill, there = series(0.2)
    kept.update("going on")
    kept.update("ended", ended=True)
    fill("going on", "ended")
    kept.expire()
    assert there() == {"going on", "ended"} == kept.shown
    while "ended" in there():
        kept.update("going on")
        kept.update("ended", ended=True)
        kept.expire()
    assert there() == {"going on"} == kept.shown
    kept.update("ended", ended=True)
    assert kept.shown == {"going on"}
    kept.update("ended")
    assert kept.shown == {"going on", "ended"}


def test_series_of_a_deleted_experiment_are_removed_at_once(series):
    kept, fill, there = series(600)
    for name in ("a", "b"):
        kept.update(name)
    fill("a", "b")
    kept.keep_only({"b"})
    assert there() == {"b"} == kept.shown


def test_a_malformed_id_is_parsed_as_none():
    assignment = Assignment(experiment="a.b", fingerprint="0" * 64, first=4, last=7)
    assert parse_id(assignment.id) == ("a.b", Shard(4, 7))
    assert [parse_id(text) for text in ("", "a", "a/1", "a/x-y", "a/1-", "a/-1-2")] == [None] * 6


def shards(*firsts):
    return {Shard(first, first + 9): None for first in firsts}


def status(name, missing, dead=(), state="running", finished=False, trials=100):
    view = View(name, "0" * 64, missing, Control(state))
    return ExperimentStatus(view, trials, 10 * len(missing), len(missing) - len(dead), dead, finished)


def value(name, **labels):
    return REGISTRY.get_sample_value(name, labels)


def trials(name):
    return {
        state: value("memtail_trials", experiment=name, state=state) for state in ("committed", "training", "queued", "waiting", "dead")
    }


@pytest.fixture
def updates():
    experiment_metrics = ExperimentMetrics(linger=600)
    yield experiment_metrics
    experiment_metrics.clear()


def test_the_states_of_trials_sum_to_the_declared_number(updates):
    missing = shards(10, 20, 30, 40, 50)
    leased = ["a/10-19", "a/0-9", "other/20-29", "nonsense"]  # 0-9 is committed already
    updates.update([status("a", missing, [Shard(50, 59)])], (), leased, ["a/10-19", "a/20-29", "a/30-39", "a/50-59"])
    assert trials("a") == {"committed": 50, "training": 10, "queued": 20, "waiting": 10, "dead": 10}
    assert value("memtail_shards_outstanding", experiment="a") == 4


def test_experiments_are_counted_by_state_and_only_running_ones_have_outstanding_shards(updates):
    states = [status("p", shards(0), state="paused"), status("c", shards(0), state="cancelled"), status("f", shards(), finished=True)]
    updates.update([status("r", shards(0)), *states], {"u"}, (), ())
    counts = {state: value("memtail_experiments", state=state) for state in ("running", "paused", "cancelled", "finished", "unreadable")}
    assert set(counts.values()) == {1}
    assert [value("memtail_shards_outstanding", experiment=name) for name in "rpcf"] == [1, 0, 0, 0]
    updates.clear()
    assert value("memtail_experiments", state="running") is None
    assert value("memtail_shards_outstanding", experiment="r") is None


def test_a_shard_that_is_sent_again_counts_as_redelivered_unless_it_was_cleared(updates):
    def assignment(first):
        return Assignment(experiment="a", fingerprint="0" * 64, first=first, last=first + 9)

    updates.count_sent([assignment(0), assignment(10)])
    updates.count_sent([assignment(10)])
    updates.discount_cleared([assignment(0)])
    updates.count_sent([assignment(0)])
    updates.update([status("a", shards(0))], (), (), ())  # 10-19 is committed
    assert value("memtail_shards_sent_total", experiment="a") == 4
    assert value("memtail_redeliveries_total", experiment="a") == 1
    updates.count_sent([assignment(10)])  # its batch was deleted
    assert value("memtail_redeliveries_total", experiment="a") == 1
    updates.count_sent([assignment(0)])
    assert value("memtail_redeliveries_total", experiment="a") == 2


def test_the_second_fault_in_a_row_ends_a_worker_that_is_not_ready_after_the_first():
    health, ended = Heartbeat(60), []
    metrics = worker.WorkerMetrics(["cpu"], 60, health, lambda: ended.append(True))
    metrics.count_fault("the disk is full")
    assert health.fault == "the disk is full"
    metrics.count_trained("a", 1, True, 1, 1.0, {}, 1.5)
    assert health.fault == ""
    metrics.count_fault("no GPU")
    assert not ended
    metrics.count_fault("no GPU")
    assert ended


def test_a_worker_exports_an_experiment_during_its_training_and_some_time_after():
    reports = Reports()
    worker.WorkerMetrics(["cpu", "cpu"], 0.2, Heartbeat(60), lambda: None).follow(reports, lambda: None)
    for experiment in ("goes on", "ends"):
        reports.send("taken", experiment, None)
        reports.send("taken", experiment, None)
        reports.send("ended", experiment, ShardOutcome.COMMITTED)
    reports.send("ended", "ends", worker.DIED)
    end = time.monotonic() + 60
    while value("memtail_shard_attempts_total", experiment="ends", outcome=worker.DIED) != 1:
        assert time.monotonic() < end
    while value("memtail_shard_attempts_total", experiment="ends", outcome=worker.DIED) is not None:
        reports.send("store", "get", "ok", 0.1, 1)  # series expire even while reports keep arriving
        assert time.monotonic() < end
        time.sleep(0.01)
    assert value("memtail_shard_attempts_total", experiment="goes on", outcome=ShardOutcome.COMMITTED) == 1


def test_reports_of_forked_processes_arrive_although_one_is_killed_while_reporting():
    reports, children = Reports(), []
    for number in range(3):
        if not (child := os.fork()):
            while True:
                reports.send("a", number, "x" * 100)
                time.sleep(1e-3)
        children.append(child)
    received = []
    reports.follow({"a": lambda number, text: received.append((number, text))}, lambda: None, 60)

    def arrive(numbers: list[int]) -> None:
        before, end = len(received), time.monotonic() + 60
        while not all([number for number, _ in received[before:]].count(each) >= 100 for each in numbers):
            assert time.monotonic() < end
            time.sleep(0.01)

    try:
        arrive([0, 1, 2])
        os.kill(children[0], signal.SIGKILL)
        arrive([1, 2])
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert {text for _, text in received} == {"x" * 100}


def test_reports_are_dropped_if_the_pipe_is_full_or_they_are_too_long():
    reports = Reports()
    for _ in range(5000):
        reports.send("a", "x" * 100)
    received, end = [], time.monotonic() + 60
    reports.follow({"a": received.append}, lambda: None, 60)

    def until(text: str) -> None:
        while not received or received[-1] != text:
            reports.send("a", text)
            assert time.monotonic() < end
            time.sleep(0.01)

    until("y")
    assert 100 < received.count("x" * 100) < 5000
    reports.send("a", "x" * 10_000)
    until("z")
    assert "x" * 10_000 not in received


@given(
    junk=st.lists(
        st.binary(max_size=40) | st.sampled_from([b"[]", b"{}", b'["a"]', b'["unknown", 1]', b'["fails", 1]', b"x" * 9000]), max_size=5
    )
)
@settings(max_examples=30, deadline=None)
def test_lines_that_are_no_reports_do_not_end_the_reports(junk):
    """User code in a training process can write to the pipe."""
    reports, received, ticks = Reports(), [], []

    def fail(_):
        raise KeyError("x")

    def tick():
        ticks.append(1)
        raise ValueError("of a metric")

    before = value("memtail_worker_reports_unreadable_total")
    reports.follow({"a": received.append, "fails": fail}, tick, 60)
    for line in junk:
        os.write(reports._sink, line + b"\n")
    reports.send("a", "end")
    end = time.monotonic() + 30
    while not received or received[-1] != "end":
        assert time.monotonic() < end
        time.sleep(0.001)
    assert value("memtail_worker_reports_unreadable_total") >= before


def test_a_line_without_end_takes_no_memory():
    reports, received = Reports(), []
    reports.follow({"a": received.append}, lambda: None, 60)
    for _ in range(200):
        while True:
            with suppress(BlockingIOError):
                os.write(reports._sink, b"x" * 4096)
                break
            time.sleep(0.001)
    os.write(reports._sink, b"\n")
    reports.send("a", "end")
    end = time.monotonic() + 30
    while not received:
        assert time.monotonic() < end
        time.sleep(0.001)
    assert received == ["end"]
