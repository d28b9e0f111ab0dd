"""Snapshots of statistics: an aggregation that begins with one publishes the bits of one that reads every batch."""

import io
import json

import numpy as np
import pytest

from memtail.errors import StoreError
from memtail.execution import aggregation as module
from memtail.execution.aggregation import Aggregation, Pace
from memtail.execution.declare import declare as declare_record
from memtail.experiment_store import ExperimentStore
from memtail.scores.pointer import latest_version
from memtail.storage import keys
from memtail.storage.local import LocalStore
from memtail.trials import Provenance, Shard, TrialBatch, TrialMetrics, pack

AT_ONCE = Pace(trials=1, seconds=1, first_at_once=True)
SHARDS = [Shard(first, first + 3) for first in range(0, 32, 4)]
KEY = keys.snapshot("digits")


class Experiment:
    """An experiment in a folder whose batches have margins, misclassifications, scores and a diverged trial."""

    def __init__(self, folder, declare, digits):
        experiment = declare(32, execution={"trials_per_shard": 4, "device": "cpu"}, subsets={"design": "balanced"})
        self.store, self.digits = LocalStore(folder), digits
        self.experiment_store = ExperimentStore(self.store, "digits")
        self.record = self.experiment_store.register(declare_record(experiment, digits, 4))

    def commit(self, *shards, seed=0, diverged=False):
        n, q = self.record.n_train, self.record.n_test
        for shard in shards:
            rng = np.random.default_rng([seed, shard.first])
            M, C, T = (rng.random((4, size)) < share for size, share in ((n, 0.7), (n, 0.6), (q, 0.6)))
            lost = [diverged or k == 9 for k in shard.trials]
            metrics = [
                TrialMetrics(k, ends, None if ends else 0.1 * k, rng.random(), None if k == 3 else rng.random(), rng.random())
                for k, ends in zip(shard.trials, lost, strict=True)
            ]
            predicted = rng.integers(0, 10, (~C & ~np.array(lost)[:, None]).sum()).astype(np.uint16)
            margins = [rng.normal(size=(4, size)).astype(np.float16) for size in (n, q)]
            trial, provenance = np.array(shard.trials, np.int32), Provenance(self.record.fingerprint, device=f"cpu {shard.first % 8}")
            scores = [rng.integers(0, 256, (4, size), np.uint8) for size in (n, q)]
            by_epoch = np.stack([pack(rng.random((4, n)) < share) for share in (0.3, 0.5)])
            epochs = np.array([1, 2], np.int32)
            further = {"train_score": scores[0], "test_score": scores[1], "snapshot_epochs": epochs, "snapshot_correct": by_epoch}
            batch = TrialBatch(
                trial, pack(M), pack(C), pack(T), n, q, metrics, provenance, margins[0], margins[1], predicted, **further
            )  # fmt: skip
            assert self.experiment_store.commit(batch, self.record.fingerprint)

    def aggregation(self):
        return Aggregation(self.experiment_store, self.record, self.digits, AT_ONCE)

    def restarted(self):
        """Return a new aggregation that has caught up, and the shards whose batches it has read."""
        aggregation = self.aggregation()
        return aggregation, list(aggregation.accumulate_each(aggregation.new_shards()))

    def saved(self):
        """Save a snapshot of everything that is committed."""
        aggregation, _ = self.restarted()
        aggregation.save_snapshot()
        return aggregation

    def without_snapshot(self):
        """Return an aggregation that has read every batch."""
        held = self.store.get(KEY)
        self.store.delete(KEY)
        aggregation, read = self.restarted()
        assert read == self.experiment_store.committed()
        self.store.put(KEY, held)
        return aggregation

    def published(self, aggregation):
        """Publish, and return the score files by name, and their version."""
        for key in list(self.store.list(keys.all_scores("digits"))):
            self.store.delete(key)
        aggregation.publish()
        pointer = latest_version(self.store, "digits")
        return pointer.version, {file: self.store.get(keys.scores("digits", pointer.version) + file) for file in pointer.files}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Save a snapshot whenever there is a new batch."""
    monkeypatch.setattr(module, "_SNAPSHOT_BATCHES", 1)
    monkeypatch.setattr(module, "_SNAPSHOT_REST", 0)


@pytest.fixture
def experiment(tmp_path, declare, digits):
    return Experiment(tmp_path / "store", declare, digits)


def rewritten(data, **arrays):
    """Replace arrays of a snapshot."""
    buffer = io.BytesIO()
    np.savez(buffer, **{**np.load(io.BytesIO(data)), **arrays})
    return buffer.getvalue()


def test_after_a_restart_only_new_batches_are_read_and_scores_have_the_same_bits(experiment):
    experiment.commit(*SHARDS[:5])
    experiment.saved()
    experiment.commit(*SHARDS[5:])
    restarted, read = experiment.restarted()
    assert read == SHARDS[5:]
    whole = experiment.without_snapshot()
    assert restarted.statistics.digest() == whole.statistics.digest()
    assert restarted.statistics.metrics == whole.statistics.metrics
    version, files = experiment.published(restarted)
    assert (version, files) == experiment.published(whole)
    assert "snapshots.parquet" in files


def test_scores_survive_a_snapshot_without_a_trial_that_counts(experiment):
    experiment.commit(SHARDS[0], diverged=True)
    experiment.saved()
    experiment.commit(*SHARDS[1:])
    restarted, read = experiment.restarted()
    assert read == SHARDS[1:]
    assert restarted.statistics.soft is not None
    assert experiment.published(restarted) == experiment.published(experiment.without_snapshot())


def test_a_run_on_the_store_begins_with_the_snapshot_too(experiment, monkeypatch):
    experiment.commit(*SHARDS)
    experiment.saved()
    monkeypatch.setattr(ExperimentStore, "tagged_batch", lambda *arguments: pytest.fail("a batch was read"))
    aggregation = experiment.aggregation()
    aggregation.accumulate_new()
    assert aggregation.complete


@pytest.mark.parametrize("change", ["discarded", "removed", "replaced"])
def test_a_snapshot_of_a_batch_that_changed_is_of_no_use(experiment, change):
    experiment.commit(*SHARDS)
    experiment.saved()
    if change == "discarded":
        experiment.experiment_store.discard(SHARDS[2], "the memory of the GPU was damaged")
    else:
        experiment.store.delete(keys.trial_batch("digits", SHARDS[2].first, SHARDS[2].last))
    if change == "replaced":
        experiment.commit(SHARDS[2], seed=1)
    restarted, read = experiment.restarted()
    assert read == [shard for shard in SHARDS if shard != SHARDS[2] or change == "replaced"]
    whole = experiment.without_snapshot()
    assert experiment.published(restarted) == experiment.published(whole)
    restarted.save_snapshot()
    assert experiment.restarted()[1] == []


def test_a_snapshot_is_newer_than_the_bucket(experiment):
    experiment.commit(*SHARDS)
    experiment.saved()
    for shard in SHARDS[4:]:  # a backup was restored
        experiment.store.delete(keys.trial_batch("digits", shard.first, shard.last))
    restarted, read = experiment.restarted()
    assert read == SHARDS[:4]
    assert restarted.trials == 16


def test_a_lost_snapshot_costs_time_only(experiment):
    experiment.commit(*SHARDS)
    saved = experiment.saved()
    experiment.store.delete(KEY)
    restarted, read = experiment.restarted()
    assert read == SHARDS
    assert experiment.published(restarted) == experiment.published(saved)


@pytest.mark.parametrize("damage", ["cut", "bit", "text", "schema", "fingerprint", "size", "type", "counts", "missing"])
def test_a_snapshot_that_is_damaged_or_foreign_is_ignored_and_replaced(experiment, damage, capsys):
    experiment.commit(*SHARDS)
    experiment.saved()
    data = experiment.store.get(KEY)
    header = json.loads(str(np.load(io.BytesIO(data))["header"]))
    middle = len(data) // 2
    damaged = {
        "cut": data[:middle],
        "bit": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "text": b"no archive",
        "schema": rewritten(data, header=json.dumps({**header, "schema": 2})),
        "fingerprint": rewritten(data, header=json.dumps({**header, "fingerprint": "f" * 64})),
        "size": rewritten(data, membership=np.zeros((1, 7), np.uint64)),
        "type": rewritten(data, membership=np.zeros((1, experiment.record.n_train))),
        "counts": rewritten(data, counted=np.zeros(1, np.uint64)),
        "missing": rewritten(data, tag=np.array([], np.bytes_)),
    }
    experiment.store.put(KEY, damaged[damage])
    restarted, read = experiment.restarted()
    assert read == SHARDS
    assert "snapshot ignored" in capsys.readouterr().out
    restarted.save_snapshot()
    assert experiment.restarted()[1] == []


def test_a_writer_that_dies_leaves_the_earlier_snapshot(experiment, monkeypatch):
    experiment.commit(*SHARDS[:4])
    experiment.saved()
    experiment.commit(*SHARDS[4:])
    aggregation, _ = experiment.restarted()

    def die(*arguments):
        raise StoreError("killed")

    with monkeypatch.context() as patched:
        patched.setattr("memtail.storage.local.os.fsync", die)
        with pytest.raises(StoreError):
            aggregation.save_snapshot()
    assert experiment.restarted()[1] == SHARDS[4:]


def test_of_two_aggregators_at_once_either_snapshot_will_do(experiment):
    experiment.commit(*SHARDS[:4])
    slower, _ = experiment.restarted()
    experiment.commit(*SHARDS[4:])
    faster, _ = experiment.restarted()
    faster.save_snapshot()
    assert experiment.restarted()[1] == []
    slower.save_snapshot()
    restarted, read = experiment.restarted()
    assert read == SHARDS[4:]
    slower.accumulate_new()
    assert experiment.published(restarted) == experiment.published(faster) == experiment.published(slower)


def test_a_batch_that_was_in_no_listing_is_in_a_snapshot_with_the_tag_of_its_read(experiment):
    experiment.commit(*SHARDS[:4])
    aggregation, _ = experiment.restarted()
    experiment.commit(SHARDS[4])
    aggregation.accumulate(SHARDS[4])
    aggregation.save_snapshot()
    assert experiment.restarted()[1] == []


def test_snapshots_take_a_small_share_of_the_time_and_need_new_batches(experiment, monkeypatch):
    monkeypatch.setattr(module, "_SNAPSHOT_BATCHES", 2)
    monkeypatch.setattr(module, "_SNAPSHOT_REST", 19)
    now, uploads = [0.0], []

    def upload(store, key, path):
        now[0] += 10.0
        uploads.append(now[0])

    monkeypatch.setattr(LocalStore, "upload", upload)
    aggregation = Aggregation(experiment.experiment_store, experiment.record, experiment.digits, AT_ONCE, lambda: now[0])
    for shard in SHARDS:
        experiment.commit(shard)
        aggregation.accumulate_new()
        aggregation.save_snapshot()
        now[0] += 60.0
    assert uploads == [70.0, 320.0]  # of two batches, and of six: 190 s after the first was uploaded, and not of one more
