"""What metrics are made of: forecasts, series that go away, and reports of processes that may be killed."""

import os
import signal
import time

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from memtail.execution.shard_task import ShardOutcome
from memtail.experiment_store import Control
from memtail.trials import Shard
from services.common.broker import Assignment, parse_id
from services.common.experiment_series import ExperimentSeries
from services.dispatcher.completion import WINDOW, Completion
from services.dispatcher.metric_updates import Measures, Standing
from services.dispatcher.reconcile import View
from services.worker import metric_updates as worker
from services.worker.reports import Reports


def test_completion_follows_from_the_rate_of_the_last_minutes():
    completion = Completion()
    assert completion.after(0, 100, 50) is None
    assert completion.after(10, 100, 50) is None
    assert completion.after(20, 110, 40) == pytest.approx(80)
    # what was long ago does not count: 30 trials in the 600 s since
    assert completion.after(20 + WINDOW, 110, 40) is None
    assert completion.after(WINDOW + 620, 140, 10) == pytest.approx(10 * 600 / 30)
    assert completion.after(WINDOW + 630, 150, 0) is None


def test_there_is_no_completion_when_trials_are_lost_or_none_comes():
    completion = Completion()
    completion.after(0, 100, 50)
    assert completion.after(10, 90, 60) is None
    assert completion.after(WINDOW + 5, 95, 55) == pytest.approx(55 * (WINDOW - 5) / 5)


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


def test_the_series_of_an_experiment_go_away_some_time_after_its_end(series):
    kept, fill, there = series(0.2)
    kept.note("going on")
    kept.note("ended", ended=True)
    fill("going on", "ended")
    kept.expire()
    assert there() == {"going on", "ended"} == kept.shown
    while "ended" in there():
        kept.note("going on")
        kept.note("ended", ended=True)
        kept.expire()
    assert there() == {"going on"} == kept.shown
    kept.note("ended", ended=True)
    assert kept.shown == {"going on"}
    kept.note("ended")
    assert kept.shown == {"going on", "ended"}


def test_the_series_of_a_removed_experiment_go_away_at_once(series):
    kept, fill, there = series(600)
    for name in ("a", "b"):
        kept.note(name)
    fill("a", "b")
    kept.keep_only({"b"})
    assert there() == {"b"} == kept.shown


def test_an_id_that_is_none_is_none():
    assignment = Assignment(experiment="a.b", fingerprint="0" * 64, first=4, last=7)
    assert parse_id(assignment.id) == ("a.b", Shard(4, 7))
    assert [parse_id(text) for text in ("", "a", "a/1", "a/x-y", "a/1-", "a/-1-2")] == [None] * 6


def shards(*firsts):
    return {Shard(first, first + 9): None for first in firsts}


def standing(name, missing, dead=(), state="running", finished=False, wanted=100):
    view = View(name, "0" * 64, missing, Control(state))
    return Standing(view, wanted, 10 * len(missing), len(missing) - len(dead), dead, finished)


def value(name, **labels):
    return REGISTRY.get_sample_value(name, labels)


def trials(name):
    return {
        state: value("memtail_trials", experiment=name, state=state) for state in ("committed", "training", "queued", "waiting", "dead")
    }


@pytest.fixture
def measures():
    made = Measures(linger=600)
    yield made
    made.hide()


def test_the_trials_of_all_states_are_those_wanted(measures):
    missing = shards(10, 20, 30, 40, 50)
    leased = ["a/10-19", "a/0-9", "other/20-29", "nonsense"]  # 0-9 is committed already
    measures.show([standing("a", missing, [Shard(50, 59)])], (), leased, ["a/10-19", "a/20-29", "a/30-39", "a/50-59"])
    assert trials("a") == {"committed": 50, "training": 10, "queued": 20, "waiting": 10, "dead": 10}
    assert value("memtail_shards_outstanding", experiment="a") == 4


def test_experiments_are_counted_by_state_and_only_those_that_run_have_work(measures):
    states = [standing("p", shards(0), state="paused"), standing("c", shards(0), state="cancelled"), standing("f", shards(), finished=True)]
    measures.show([standing("r", shards(0)), *states], {"u"}, (), ())
    found = {state: value("memtail_experiments", state=state) for state in ("running", "paused", "cancelled", "finished", "unreadable")}
    assert set(found.values()) == {1}
    assert [value("memtail_shards_outstanding", experiment=name) for name in "rpcf"] == [1, 0, 0, 0]
    measures.hide()
    assert value("memtail_experiments", state="running") is None
    assert value("memtail_shards_outstanding", experiment="r") is None


def test_a_shard_is_redelivered_when_it_is_sent_again_though_nobody_took_it_back(measures):
    def assignment(first):
        return Assignment(experiment="a", fingerprint="0" * 64, first=first, last=first + 9)

    measures.sent([assignment(0), assignment(10)])
    measures.sent([assignment(10)])
    measures.taken_back([assignment(0)])
    measures.sent([assignment(0)])
    measures.show([standing("a", shards(0))], (), (), ())  # 10-19 is committed
    assert value("memtail_shards_sent_total", experiment="a") == 4
    assert value("memtail_redeliveries_total", experiment="a") == 1
    measures.sent([assignment(10)])  # its batch was deleted
    assert value("memtail_redeliveries_total", experiment="a") == 1
    measures.sent([assignment(0)])
    assert value("memtail_redeliveries_total", experiment="a") == 2


def test_a_worker_shows_an_experiment_while_it_trains_it_and_some_time_after():
    reports = Reports()
    worker.Measures(devices=2, linger=0.2).follow(reports)
    for experiment in ("goes on", "ends"):
        reports.send("taken", experiment, None)
        reports.send("taken", experiment, None)
        reports.send("ended", experiment, ShardOutcome.COMMITTED)
    reports.send("ended", "ends", worker.DIED)
    end = time.monotonic() + 60
    while value("memtail_shard_attempts_total", experiment="ends", outcome=worker.DIED) != 1:
        assert time.monotonic() < end
    while value("memtail_shard_attempts_total", experiment="ends", outcome=worker.DIED) is not None:
        reports.send("store", "get", "ok", 0.1, 1)  # it is looked for though there is always something to count
        assert time.monotonic() < end
        time.sleep(0.01)
    assert value("memtail_shard_attempts_total", experiment="goes on", outcome=ShardOutcome.COMMITTED) == 1


def test_reports_of_forked_processes_arrive_though_one_is_killed_while_it_reports():
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


def test_a_full_pipe_and_a_report_that_is_too_long_are_dropped():
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
