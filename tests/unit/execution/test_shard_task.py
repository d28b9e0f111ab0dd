"""`run_shard` through both of its callers: a process of the embedded run's pool, and the trainer of a worker."""

import errno
import json
import queue
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import redis
import torch

from memtail.datasets.staged_dataset import stage
from memtail.errors import StoreError, TrainingStopped, UnsupportedError
from memtail.execution import pool
from memtail.execution.checkpoints import StoredCheckpoints
from memtail.execution.declare import declare as declare_record
from memtail.execution.progress import progress_of
from memtail.execution.shard_task import ShardOutcome, run_shard
from memtail.experiment_store import MAX_ATTEMPTS, Control, ExperimentStore, record
from memtail.storage import keys
from memtail.storage.local import LocalStore
from memtail.trainers.images import devices, train_shard
from memtail.trainers.images import shard as training
from memtail.trials import Shard
from services.common.broker import Assignment
from services.worker.lease import Lease
from services.worker.trainer import LEASED, NOT_WANTED, UNSUPPORTED, Trainer

SHARD = Shard(4, 7)


class FaultyStore(LocalStore):
    """A store that refuses writes below some prefixes, and counts them."""

    refused: tuple[str, ...] = ()
    writes = 0

    def put(self, key: str, data: bytes) -> None:
        self._refuse(key)
        super().put(key, data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self._refuse(key)
        return super().put_if_absent(key, data)

    def _refuse(self, key: str) -> None:
        if key.startswith(self.refused):
            self.writes += 1
            raise StoreError(f"'{key}' cannot be written")


class NoBroker:
    """An unreachable broker: training continues without a lease."""

    held: bool | None = None

    def acquire(self, *_: Any) -> bool:
        if self.held is None:
            raise redis.ConnectionError("no broker")
        return self.held

    def workers(self) -> list[Any]:
        raise redis.ConnectionError("no broker")

    def release(self, *_: Any) -> None: ...

    def renew(self, *_: Any) -> None: ...


@dataclass
class Caller:
    """One of the two callers on one experiment of two shards; `attempt` returns the outcome as text."""

    kind: str
    store: FaultyStore
    experiment_store: ExperimentStore
    record: Any
    dataset: Any
    monkeypatch: pytest.MonkeyPatch
    broker: NoBroker
    stopping: bool = False
    device: str = "cpu"
    reports: list[Any] = field(default_factory=list)

    def attempt(self) -> str:
        if self.kind == "embedded":
            task = pool.Task(self.record, self.dataset.folder, "the store", "cpu")
            self.monkeypatch.setattr(pool, "_store", lambda address: self.store)
            self.monkeypatch.setattr(pool, "_reports", queue.Queue())
            return pool._train(task, SHARD).outcome.value

        def report(*values: Any) -> None:
            self.reports.append(values)

        trainer = Trainer(self.store, self.broker, "worker", self.device, 60, 300, lambda: self.stopping, report)
        assignment = Assignment(
            experiment=self.record.experiment.name, fingerprint=self.record.fingerprint, first=SHARD.first, last=SHARD.last
        )
        outcome = trainer.train(assignment)
        assert self.reports[-1] == ("ended", self.record.experiment.name, outcome)
        return outcome


@pytest.fixture(params=["embedded", "services"])
def caller(request, declare, digits, tmp_path, monkeypatch):
    experiment = declare(8, execution={"trials_per_shard": 4, "device": "cpu"}, subsets={"design": "balanced"})
    store = FaultyStore(tmp_path / "store")
    experiment_store = ExperimentStore(store, experiment.name)
    held = experiment_store.register(declare_record(experiment, digits, 4))
    stage(digits, store)
    return Caller(request.param, store, experiment_store, held, digits, monkeypatch, NoBroker())


def change_execution(caller, **changes):
    execution = caller.record.experiment.execution.model_copy(update=changes)
    experiment = caller.record.experiment.model_copy(update={"execution": execution})
    caller.record = caller.experiment_store.register(replace(caller.record, experiment=experiment))


def test_a_chosen_shard_is_trained_a_second_time_once(caller):
    change_execution(caller, verify=1.0)
    assert [caller.attempt() for _ in range(3)] == ["committed", "verified", "done before"]
    assert caller.experiment_store.trained_twice() == {SHARD: False}
    assert progress_of(caller.store, "digits").to_json()["unverified"] == 0
    caller.experiment_store.discard(SHARD, "of a broken machine")
    assert [caller.attempt() for _ in range(2)] == ["committed", "verified"]


def test_a_second_training_that_fails_or_cannot_be_compared_counts_as_an_attempt(caller, monkeypatch):
    change_execution(caller, verify=1.0)
    assert caller.attempt() == "committed"
    assert progress_of(caller.store, "digits").unverified == [SHARD]
    with monkeypatch.context() as broken:
        broken.setattr(training, "membership", None)
        assert caller.attempt() == "failed"
    caller.store.put(keys.trial_batch("digits", 4, 7), b"damaged")
    assert caller.attempt() == "verified"
    assert [failure.attempt for failure in caller.experiment_store.failures()] == [1, 2]
    assert not caller.experiment_store.trained_twice()


def test_a_shard_is_trained_committed_and_then_skipped(caller):
    assert caller.attempt() == "committed"
    batch = caller.experiment_store.batch(SHARD, caller.record)
    assert batch.trial.tolist() == [4, 5, 6, 7]
    expected = train_shard(caller.record.experiment, caller.dataset, SHARD.trials, torch.device("cpu"))
    assert batch.train_correct.tobytes() == expected.train_correct.tobytes()
    caller.monkeypatch.setattr(training, "membership", None)  # nothing is trained again
    assert caller.attempt() == "done before"


@pytest.mark.parametrize("again", [False, True])
def test_a_shard_of_an_experiment_that_is_removed_while_it_trains_leaves_no_trials(caller, monkeypatch, again):
    membership = training.membership  # type: ignore[attr-defined]

    def removed(*arguments):
        caller.store.delete(keys.experiment("digits"))
        if again:  # another experiment of the name
            caller.experiment_store.register(replace(caller.record, fingerprint=64 * "0"))
        return membership(*arguments)

    monkeypatch.setattr(training, "membership", removed)
    assert caller.attempt() == "handed back"
    assert not caller.experiment_store.committed()


def test_the_first_of_two_commits_of_a_shard_counts(caller, monkeypatch):
    batch = train_shard(caller.record.experiment, caller.dataset, SHARD.trials, torch.device("cpu"))
    monkeypatch.setattr(ExperimentStore, "is_committed", lambda *_: False)
    assert caller.experiment_store.commit(batch, caller.record.fingerprint)
    held = caller.store.get(keys.trial_batch("digits", 4, 7))
    assert caller.attempt() == "lost race"
    assert caller.store.get(keys.trial_batch("digits", 4, 7)) == held
    assert caller.experiment_store.trained_twice() == {SHARD: False}


def test_a_second_training_with_other_bits_is_recorded_and_shown(caller, monkeypatch):
    batch = train_shard(caller.record.experiment, caller.dataset, SHARD.trials, torch.device("cpu"))
    test_correct = batch.test_correct.copy()
    test_correct[1, 0] ^= 0b101
    elsewhere = replace(batch, test_correct=test_correct, provenance=replace(batch.provenance, host="elsewhere"))
    monkeypatch.setattr(ExperimentStore, "is_committed", lambda *_: False)
    caller.experiment_store.commit(elsewhere, caller.record.fingerprint)
    assert caller.attempt() == "lost race"
    progress = progress_of(caller.store, "digits")
    assert progress.to_json()["different"] == ["4-7"]
    (line,) = progress.lines
    assert "trials 4-7: two trainings differ in 1 trials, 2 bits: on elsewhere (cpu" in line
    assert caller.reports.count(("differs", "digits", True)) == (caller.kind == "services")


def test_a_committed_batch_that_cannot_be_read_fails_no_second_training(caller, monkeypatch):
    caller.store.put(keys.trial_batch("digits", 4, 7), b"damaged")
    monkeypatch.setattr(ExperimentStore, "is_committed", lambda *_: False)
    assert caller.attempt() == "lost race"
    assert not caller.experiment_store.trained_twice()
    assert not list(caller.experiment_store.failures())


def test_a_failure_is_recorded_with_its_traceback(caller, monkeypatch):
    def broken(*_):
        raise MemoryError("of the model\nFor debugging consider more memory.")

    monkeypatch.setattr(training, "membership", broken)
    assert [caller.attempt(), caller.attempt()] == ["failed", "failed"]
    first, second = caller.experiment_store.failures()
    assert (first.attempt, second.attempt) == (1, 2)
    assert first.error == "MemoryError: of the model"
    assert "in broken" in first.traceback
    assert first.origin.host
    assert first.origin.device == "cpu"
    assert torch.__version__.startswith(first.origin.torch)


def test_a_full_disk_is_charged_to_no_shard(caller, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(training, "membership", full)
    assert caller.attempt() == "worker fault"
    assert not list(caller.experiment_store.failures())


def test_an_error_on_a_broken_device_is_charged_to_no_shard(caller, monkeypatch):
    def broken(*_):
        raise ValueError("of a model, because of the device")

    monkeypatch.setattr(training, "membership", broken)
    monkeypatch.setattr(devices, "_CHECK_SIZE", -1)  # no such matrix, so every check fails
    assert caller.attempt() == "worker fault"
    assert not list(caller.experiment_store.failures())


@pytest.mark.parametrize("caller", ["services"], indirect=True)
@pytest.mark.parametrize(("cache", "device"), [("/dev/null/x", "cpu"), (None, "cuda:5")])
def test_without_its_device_or_cache_a_worker_hands_every_shard_back(caller, monkeypatch, cache, device):
    if cache:
        monkeypatch.setenv("MEMTAIL_CACHE", cache)
    caller.device = device
    assert caller.attempt() == "worker fault"
    assert not list(caller.experiment_store.failures())


def test_a_store_that_refuses_checkpoints_does_not_end_training(caller, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(training, "_CHECKPOINT_SHARE", float("inf"))
    caller.store.refused = (keys.checkpoints("digits"),)
    assert caller.attempt() == "committed"
    assert caller.store.writes > 1
    assert not list(caller.experiment_store.failures())


def test_a_refused_commit_hands_the_shard_back_without_an_attempt(caller):
    caller.store.refused = (keys.trials("digits"),)
    assert caller.attempt() == "handed back"
    assert not list(caller.experiment_store.failures())
    caller.store.refused = ()
    assert caller.attempt() == "committed"


def test_a_refused_failure_record_hands_the_shard_back(caller, monkeypatch):
    monkeypatch.setattr(training, "membership", None)
    caller.store.refused = (keys.failures("digits"),)
    assert caller.attempt() == "handed back"


def test_the_checkpoint_is_resumed_and_removed_after_the_commit(caller, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(training, "_CHECKPOINT_SHARE", float("inf"))
    checkpoints = StoredCheckpoints(caller.experiment_store, caller.record.fingerprint, SHARD)

    def once(state):
        save(state)
        raise InterruptedError

    save, checkpoints.save = checkpoints.save, once
    with suppress(InterruptedError):
        train_shard(caller.record.experiment, caller.dataset, SHARD.trials, torch.device("cpu"), checkpoints=checkpoints)
    assert checkpoints.load()
    loads = []
    load = StoredCheckpoints.load
    monkeypatch.setattr(StoredCheckpoints, "load", lambda self: loads.append(load(self)) or loads[-1])
    assert caller.attempt() == "committed"
    assert len(loads) == 1
    assert loads[0]
    assert checkpoints.load() is None


def test_a_second_training_continues_from_its_own_checkpoint_only(caller):
    change_execution(caller, verify=1.0)
    assert caller.attempt() == "committed"
    first = StoredCheckpoints(caller.experiment_store, caller.record.fingerprint, SHARD)
    first.save(b"of a process that was killed after its commit")
    loads = []

    def stopped(checkpoints):
        loads.append(checkpoints.load())
        checkpoints.save(b"of the second training")
        raise TrainingStopped

    for _ in range(2):
        assert run_shard(caller.experiment_store, caller.record, SHARD, "cpu", stopped).outcome is ShardOutcome.STOPPED
    assert loads == [None, b"of the second training"]
    assert first.load() is None
    assert caller.attempt() == "verified"
    assert not list(caller.store.list(keys.checkpoints("digits")))


def test_stopped_training_leaves_a_checkpoint_and_no_attempt(caller):
    def stopped(checkpoints):
        checkpoints.save(b"state")
        raise TrainingStopped

    result = run_shard(caller.experiment_store, caller.record, SHARD, "cpu", stopped)
    assert result.outcome is ShardOutcome.STOPPED
    assert StoredCheckpoints(caller.experiment_store, caller.record.fingerprint, SHARD).load() == b"state"
    assert not list(caller.experiment_store.failures())


@pytest.mark.parametrize("caller", ["services"], indirect=True)
def test_a_worker_hands_back_a_stopped_shard_and_skips_leased_and_unwanted_ones(caller):
    caller.stopping = True
    assert caller.attempt() == "handed back"
    caller.broker.held = False
    assert caller.attempt() == LEASED
    caller.experiment_store.set_control(Control("paused"))
    assert caller.attempt() == NOT_WANTED
    assert not list(Path(caller.store.root, keys.trials("digits")).glob("*"))


@pytest.mark.parametrize("caller", ["services"], indirect=True)
def test_a_worker_leaves_what_another_version_must_train_and_says_so(caller, monkeypatch):
    monkeypatch.setattr(record, "RECIPE_VERSION", 3)
    monkeypatch.setattr(training, "membership", None)  # nothing is trained
    assert caller.attempt() == UNSUPPORTED
    assert not list(caller.experiment_store.failures())
    (line,) = caller.experiment_store.notices()["worker"].lines
    assert "do not train it: it has recipe 2, and memtail" in line
    monkeypatch.undo()
    assert caller.attempt() == "committed"
    assert not caller.experiment_store.notices()


@pytest.mark.parametrize("caller", ["services"], indirect=True)
@pytest.mark.parametrize("decided_by", ["the first worker", "a committed batch"])
def test_a_worker_of_another_kind_leaves_an_experiment_alone_that_requires_one_kind(caller, monkeypatch, decided_by):
    if decided_by == "a committed batch":
        batch = train_shard(caller.record.experiment, caller.dataset, range(4), torch.device("cpu"))
        caller.experiment_store.commit(batch, caller.record.fingerprint)
    change_execution(caller, require="same-device")
    here = devices.device_kind(torch.device("cpu"))
    monkeypatch.setattr(devices, "cpu_name", lambda: "another processor, AVX2")
    if decided_by == "the first worker":
        caller.experiment_store.check_device(caller.record, here)
    assert caller.attempt() == UNSUPPORTED
    assert not caller.experiment_store.is_committed(SHARD)
    assert not list(caller.experiment_store.failures())
    (line,) = caller.experiment_store.notices()["worker"].lines
    assert f"is trained on {here} only (execution.require: same-device), and this is cpu" in line
    assert "another processor, AVX2" in line
    monkeypatch.undo()
    assert caller.attempt() == "committed"
    assert caller.attempt() == "done before"


@pytest.mark.parametrize("caller", ["services"], indirect=True)
def test_the_kind_is_decided_before_training_and_batches_without_a_processor_allow_every_one(caller, monkeypatch):
    change_execution(caller, require="same-device")
    monkeypatch.setattr(training, "membership", None)
    assert caller.attempt() == "failed"
    assert json.loads(caller.store.get(keys.device("digits"))) == {"kind": devices.device_kind(torch.device("cpu"))}
    caller.store.put(keys.device("digits"), b'{"kind": "NVIDIA H100"}')
    caller.experiment_store.check_device(caller.record, "NVIDIA H100, x, AVX512")
    with pytest.raises(UnsupportedError, match="only"):
        caller.experiment_store.check_device(caller.record, "NVIDIA H100 NVL, x, AVX512")
    caller.store.put(keys.device("digits"), b"{")
    with pytest.raises(StoreError, match="remove it"):
        caller.experiment_store.check_device(caller.record, "x")


@pytest.mark.parametrize("caller", ["services"], indirect=True)
def test_a_worker_does_not_train_a_dead_shard(caller):
    for _ in range(MAX_ATTEMPTS):
        caller.experiment_store.record_failure(SHARD, "of a message delivered late")
    assert caller.attempt() == NOT_WANTED


@pytest.mark.parametrize("caller", ["services"], indirect=True)
def test_a_worker_whose_lease_was_taken_stops_and_leaves_the_shard_to_the_other(caller, monkeypatch):
    monkeypatch.setattr(Lease, "_renew", lambda self: setattr(self, "lost", True))
    assert caller.attempt() == LEASED
    assert not caller.experiment_store.committed()
    assert not list(caller.experiment_store.failures())
