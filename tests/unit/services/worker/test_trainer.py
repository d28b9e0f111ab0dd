"""Decisions of a worker before it trains a shard, and its dataset; on a store in a folder and without Redis."""

import os
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
import torch

from memtail.datasets.staged_dataset import stage
from memtail.errors import TrainingStopped
from memtail.experiment_store import Origin
from memtail.trainers.images.images import device_images
from memtail.trials import Shard
from services.common.broker import Assignment, WorkerPlace
from services.worker.trainer import LEASED, LEFT, NOT_WANTED, Trainer
from tests.support.staged import CountingStore, prepare, size_of

SHARD = Shard(0, 3)
LEASE = 60.0


class Broker:
    """Names the workers, and leases no shard: an attempt that reaches the lease would be made."""

    def __init__(self, *places):
        self._places = [WorkerPlace("shards", node, host) for node, host in places]

    def time(self):
        return 0.0

    def workers(self):
        return self._places

    def acquire(self, *_):
        return False


@pytest.fixture
def outcome(experiment_store, monkeypatch):
    """Return the outcome of an assignment at a worker on a node, beside others."""
    monkeypatch.setattr("services.worker.trainer._LEFT_SECONDS", 0.0)

    def of(node, host, *places):
        monkeypatch.setenv("MEMTAIL_NODE", node)
        monkeypatch.setattr("socket.gethostname", lambda: host)
        broker = Broker((node, host), *places)
        trainer = Trainer(experiment_store.store, broker, "w", "cpu", LEASE, 300.0, lambda: False, lambda *_: None)
        fingerprint = experiment_store.read_record().fingerprint
        return trainer.train(Assignment(experiment=experiment_store.name, fingerprint=fingerprint, first=0, last=3))

    return of


def failed(experiment_store, node, host, ago=0.0):
    when = (datetime.now(UTC) - timedelta(seconds=ago)).isoformat()
    experiment_store.record_failure(SHARD, "boom", when=when, origin=Origin(node, host))


def test_a_shard_that_failed_here_is_left_to_a_worker_of_another_node_or_else_of_another_host(experiment_store, outcome):
    assert outcome("a", "a-1", ("b", "b-1")) == LEASED
    failed(experiment_store, "a", "a-1")
    assert outcome("a", "a-1") == LEASED
    assert outcome("a", "a-1", ("b", "b-1")) == LEFT
    assert outcome("a", "a-2", ("b", "b-1")) == LEFT
    assert outcome("b", "b-1", ("a", "a-1")) == LEASED
    assert outcome("a", "a-1", ("a", "a-2")) == LEFT
    assert outcome("a", "a-2", ("a", "a-1")) == LEASED
    failed(experiment_store, "b", "b-1")
    assert outcome("a", "a-1", ("b", "b-1")) == LEASED
    assert outcome("b", "b-1", ("a", "a-1"), ("c", "c-1")) == LEFT
    failed(experiment_store, "a", "a-1")
    assert outcome("c", "c-1") == NOT_WANTED


def test_a_shard_waits_for_another_worker_for_sixty_leases(experiment_store, outcome):
    failed(experiment_store, "a", "a-1", ago=61 * LEASE)
    assert outcome("a", "a-1", ("b", "b-1")) == LEASED


@pytest.mark.parametrize("when", ["", "yesterday", "2026-01-02T03:04:05"])
def test_a_damaged_time_of_a_failure_ends_no_worker(experiment_store, outcome, when):
    experiment_store.record_failure(SHARD, "boom", when=when, origin=Origin("a", "a-1"))
    assert outcome("a", "a-1", ("b", "b-1")) == LEFT


def test_failures_of_lost_workers_and_of_0_1_0_name_no_node_and_leave_the_shard_to_anyone(experiment_store, outcome):
    experiment_store.record_failure(SHARD, "10 workers were lost")
    assert outcome("a", "a-1", ("b", "b-1")) == LEASED


@pytest.fixture
def made(tmp_path):
    """Two small datasets."""
    return [prepare(tmp_path, shade) for shade in range(2)]


@pytest.fixture
def trainer(tmp_path, made, monkeypatch):
    """A trainer whose cache has room for one of the two datasets."""
    store = CountingStore(tmp_path / "store")
    for dataset in made:
        stage(dataset, store)
    monkeypatch.setenv("MEMTAIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MEMTAIL_CACHE_LIMIT", str((size_of(made[0]) + 100) / 2**30))
    return Trainer(store, Broker(), "w", "cpu", LEASE, 300.0, lambda: False, lambda *_: None)


def record_of(dataset):
    return SimpleNamespace(canonical={"dataset": {"fingerprint": dataset.fingerprint}})


def test_the_dataset_of_the_last_experiment_makes_room_for_that_of_the_next(made, trainer):
    first, second = map(record_of, made)
    device_images(trainer._dataset_of(first, lambda: False), torch.device("cpu"))  # as training keeps them
    assert trainer._dataset_of(second, lambda: False).fingerprint == made[1].fingerprint


def test_each_shard_is_a_use_of_its_dataset(made, trainer):
    record = record_of(made[0])
    folder = trainer._dataset_of(record, lambda: False).folder
    os.utime(folder, (1, 1))
    trainer._dataset_of(record, lambda: False)
    assert folder.stat().st_mtime > 1


def test_a_worker_that_is_to_stop_interrupts_a_download_which_the_next_one_continues(made, trainer):
    record, downloads = record_of(made[0]), lambda: trainer._store.noted("downloads")
    with pytest.raises(TrainingStopped):
        trainer._dataset_of(record, lambda: True)
    assert len(downloads()) == 1
    trainer._dataset_of(record, lambda: False)
    assert len(downloads()) == len(set(downloads())) > 1
