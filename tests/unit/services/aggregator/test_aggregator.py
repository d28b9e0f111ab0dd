"""`Aggregator` on a folder, without a server: turns, signs of life, and errors of one experiment."""

import math
import threading

import pytest
import structlog

from memtail.datasets.staged_dataset import stage
from memtail.errors import UnreachableError
from memtail.execution import retention
from memtail.execution.aggregation import Aggregation, Pace
from memtail.execution.declare import declare as declare_record
from memtail.experiment_store import Control, ExperimentStore
from memtail.report.publish import publish_report
from memtail.scores.files import write_scores
from memtail.scores.pointer import latest_version
from memtail.storage import keys
from memtail.storage.local import LocalStore
from memtail.trials import Shard
from services.aggregator import __main__ as service
from services.aggregator import aggregator as module
from services.aggregator.aggregator import Aggregator
from services.aggregator.metrics import PASSED_OVER, REPORT_FAILURES
from services.common import polling
from services.common.settings import ServiceSettings
from tests.support.batches import commit

PER_SHARD = 4


class FaultyStore(LocalStore):
    """A store that records the keys of reads, and raises an error for keys that contain a text."""

    def __init__(self, root):
        super().__init__(root)
        self.read, self.faulty, self.error = [], "", None

    def get(self, key, limit=None):
        self.note(key)
        return super().get(key, limit)

    def get_tagged(self, key, limit=None):
        self.note(key)
        return super().get_tagged(key, limit)

    def note(self, key):
        self.read.append(key)
        if self.error and self.faulty in key:
            raise self.error


@pytest.fixture(autouse=True)
def unhurried(monkeypatch):
    """Let each turn last until everything is accumulated, however slow the machine is."""
    monkeypatch.setattr(module, "_TURN", math.inf)


@pytest.fixture
def store(tmp_path):
    return FaultyStore(tmp_path / "store")


@pytest.fixture
def submit(store, declare, digits):
    """Register an experiment all of whose shards are committed."""

    def submitted(name, shards):
        execution = {"trials_per_shard": PER_SHARD, "device": "cpu"}
        experiment = declare(PER_SHARD * shards, name=name, execution=execution, subsets={"design": "balanced"})
        experiment_store = ExperimentStore(store, name)
        experiment_store.register(declare_record(experiment, digits, PER_SHARD))
        commit(experiment_store, *(Shard(first, first + PER_SHARD - 1) for first in range(0, PER_SHARD * shards, PER_SHARD)))
        return experiment_store

    stage(digits, store)
    return submitted


@pytest.fixture
def aggregator(store, monkeypatch):
    """An aggregator that draws no reports."""
    monkeypatch.setattr(module, "publish_report", lambda store, name: None)
    return Aggregator(store, ServiceSettings(store=store.address))


def trials(store, name):
    pointer = latest_version(store, name)
    return pointer.summary.accumulated_trials if pointer else 0


def test_scores_need_no_images(store, submit, aggregator, digits, tmp_path, monkeypatch):
    monkeypatch.setenv("MEMTAIL_CACHE", str(tmp_path / "cache"))
    experiment_store = submit("labels", 2)
    for split in ("train", "test"):
        store.delete(keys.dataset(digits.fingerprint, f"{split}_images.npy"))
    aggregator.catch_up()
    pointer = latest_version(store, "labels")
    whole = Aggregation(experiment_store, experiment_store.read_record(), digits, Pace(1, 1, first_at_once=True))
    whole.accumulate_new()
    write_scores(tmp_path, "labels", whole.record.fingerprint, whole.statistics, digits)
    for file in pointer.files:
        assert store.get(keys.scores("labels", pointer.version) + file) == (tmp_path / file).read_bytes()


def test_a_large_experiment_does_not_delay_the_scores_of_a_small_one(store, submit, aggregator, monkeypatch):
    monkeypatch.setattr(module, "_TURN", 0.0)  # one batch
    submit("a-large", 40)
    submit("z-small", 1)
    aggregator.catch_up()
    assert trials(store, "z-small") == PER_SHARD
    assert sum(keys.trials("a-large") in key for key in store.read) < 40
    for _ in range(40):
        aggregator.catch_up()
    assert trials(store, "a-large") == 40 * PER_SHARD
    assert sum(keys.trials("a-large") in key for key in store.read) < 40 * 10


def test_an_error_that_lasts_is_logged_once_and_counted_in_each_pass(store, submit, aggregator, monkeypatch):
    submit("large", 2)
    submit("small", 1)
    monkeypatch.setenv("MEMTAIL_MAX_TRIALS", str(PER_SHARD))
    before = PASSED_OVER._value.get()
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            aggregator.catch_up()
    assert [line["event"] for line in logs].count("experiment passed over") == 1
    assert PASSED_OVER._value.get() == before + 3


def test_each_batch_and_each_part_of_a_publication_is_progress(store, submit, digits):
    submit("live", 20)
    progress = []
    Aggregator(store, ServiceSettings(store=store.address), lambda: progress.append(None)).catch_up()
    assert trials(store, "live") == 20 * PER_SHARD
    assert len(progress) > 20 + len(digits.classes)


def test_the_service_is_ready_with_the_first_progress_of_its_first_pass(store, submit, monkeypatch):
    submit("live", 1)
    served = []
    monkeypatch.setattr(module, "publish_report", lambda store, name: None)
    monkeypatch.setattr(service, "serve", lambda port, heartbeat: served.append(heartbeat))
    monkeypatch.setattr(Aggregator, "run", lambda self, end_pass: self.catch_up())  # one pass, whose end is not recorded
    service._aggregate(ServiceSettings(store=store.address))
    assert served[0].ready


@pytest.mark.parametrize(
    ("faulty", "error"),
    [
        (keys.experiment("a-faulty"), KeyError("dataset")),
        (keys.trials("a-faulty"), MemoryError()),
        (keys.latest_scores("a-faulty"), OSError(28, "No space left on device")),
    ],
)
def test_an_unexpected_error_of_one_experiment_does_not_stop_another(store, submit, aggregator, monkeypatch, faulty, error):
    submit("a-faulty", 2)
    submit("z-sound", 2)
    store.faulty, store.error = faulty, error
    monkeypatch.setattr(polling, "_PAUSE_SHARE", 0)
    before = PASSED_OVER._value.get()
    for _ in range(2):
        aggregator.catch_up()
    assert trials(store, "z-sound") == 2 * PER_SHARD
    assert PASSED_OVER._value.get() == before + 2
    store.error = None
    aggregator.catch_up()
    assert trials(store, "a-faulty") == 2 * PER_SHARD


def test_scores_count_no_half_accumulated_batch(store, submit, aggregator, monkeypatch):
    monkeypatch.setattr(module, "_LISTING_REST", 0)
    submit("broken", 2)
    submit("whole", 2)

    def break_off(statistics, *arguments):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("memtail.statistics.accumulator.Statistics._place", break_off)
        aggregator.catch_up()
    aggregator.catch_up()
    first, second = (latest_version(store, name).summary for name in ("broken", "whole"))
    assert first.accumulated_trials == 2 * PER_SHARD
    assert first.mem_mean == second.mem_mean


def test_a_store_that_does_not_respond_ends_the_pass_and_the_next_begins_with_the_others(store, submit, aggregator):
    submit("a-unreachable", 1)
    for name in ("b", "c"):
        submit(name, 1)
    store.faulty, store.error = keys.experiment("a-unreachable"), UnreachableError("the store does not respond")
    store.read.clear()
    with pytest.raises(UnreachableError):
        aggregator.catch_up()
    assert not any(keys.experiment(name) in store.read for name in ("b", "c"))
    with pytest.raises(UnreachableError):
        aggregator.catch_up()
    assert trials(store, "b") == trials(store, "c") == PER_SHARD


def test_an_experiment_that_is_removed_while_its_report_is_drawn_is_no_error(store, submit, monkeypatch):
    experiment_store = submit("removed", 1)
    drawing, removed = threading.Event(), threading.Event()

    def slowly(store, name):
        drawing.set()
        assert removed.wait(60)
        return publish_report(store, name)

    monkeypatch.setattr(module, "publish_report", slowly)
    aggregator, failures = Aggregator(store, ServiceSettings(store=store.address)), REPORT_FAILURES._value.get()
    with structlog.testing.capture_logs() as logs:
        aggregator.catch_up()
        assert drawing.wait(60)
        experiment_store.set_control(Control("cancelled"))
        retention.remove(store, "removed", retention.planned_removal(store, "removed"))
        removed.set()
        aggregator._drawing.join()
    assert not list(store.list(keys.everything("removed")))
    assert not any("exc_info" in line for line in logs)
    assert REPORT_FAILURES._value.get() == failures
