"""Comparison of two trainings of a shard, and its record."""

from dataclasses import replace

import numpy as np
import pytest

from memtail.errors import UnreachableError
from memtail.experiment_store import ExperimentStore
from memtail.experiment_store.replicas import compare, unverified
from memtail.storage import keys
from memtail.storage.local import LocalStore
from memtail.trials import Provenance, Shard, TrialBatch, TrialMetrics
from tests.support.batches import random_batch

BATCH = random_batch(margins=True)[0]
HERE = Provenance("f", torch="2.15.0", host="a", device="NVIDIA H100", cpu="x, AVX512", started="2026-11-27T06:00:00+00:00")


@pytest.fixture
def experiment_store(tmp_path):
    return ExperimentStore(LocalStore(tmp_path), "e")


def changed(name: str, row: int) -> TrialBatch:
    """Change the first byte or number of one trial in an array of the batch."""
    array = getattr(BATCH, name).copy()
    array[row, 0] = ~array[row, 0] if array.dtype == np.uint8 else array[row, 0] + 1
    return replace(BATCH, **{name: array, "train_mistakes": None})


def test_equal_batches_of_different_machines_are_equal():
    replica = compare(replace(BATCH, provenance=HERE), replace(BATCH, provenance=replace(HERE, host="b", started="later")))
    assert (replica.differs, replica.trials, replica.bits, replica.margins) == (False, 0, 0, 0)
    assert replica.alike


def test_margins_that_are_not_a_number_are_equal():
    batch = replace(BATCH, train_margin=np.full_like(BATCH.train_margin, np.nan))
    assert not compare(batch, batch).differs


@pytest.mark.parametrize(
    ("name", "bits", "margins"),
    [("membership", 8, 0), ("train_correct", 8, 0), ("test_correct", 8, 0), ("test_margin", 0, 1), ("test_score", 0, 1)],
)
def test_different_bits_and_margins_are_counted(name, bits, margins):
    replica = compare(replace(BATCH, train_mistakes=None), changed(name, row=1))
    assert (replica.differs, replica.trials, replica.bits, replica.margins) == (True, 1, bits, margins)


def test_outcomes_of_the_epochs_that_both_have_are_compared():
    epochs, correct = np.array([1, 3], np.int32), np.stack([np.roll(BATCH.membership, 1), BATCH.membership])
    committed = replace(BATCH, snapshot_epochs=epochs, snapshot_correct=correct)
    assert not compare(committed, committed).differs
    assert not compare(committed, BATCH).differs
    other = replace(BATCH, snapshot_epochs=np.array([2, 3], np.int32), snapshot_correct=correct)
    assert not compare(committed, other).differs
    wrong = correct.copy()
    wrong[1, 2, 0] ^= 3
    replica = compare(committed, replace(other, snapshot_correct=wrong))
    assert (replica.trials, replica.bits) == (1, 2)


def test_other_predicted_classes_are_a_difference():
    mistakes = BATCH.train_mistakes.copy()
    mistakes[0] += 1
    replica = compare(BATCH, replace(BATCH, train_mistakes=mistakes))
    assert (replica.trials, replica.bits) == (1, 0)


def test_a_diverged_trial_has_no_predicted_classes():
    metrics = [TrialMetrics(trial, trial == 11, 0.5, 1.0, None, 0.75) for trial in (10, 11, 12)]
    of_trial = np.repeat([10, 11, 12], BATCH.misclassified().sum(1))
    batch = replace(BATCH, metrics=metrics, train_mistakes=BATCH.train_mistakes[of_trial != 11])
    assert not compare(batch, batch).differs
    assert compare(BATCH, batch).trials == 1


@pytest.mark.parametrize("change", [{"device": "NVIDIA A100"}, {"cpu": "x, AVX2"}, {"torch": "2.14.0"}])
def test_devices_of_another_kind_and_other_versions_of_torch_are_not_alike(change):
    assert not compare(replace(BATCH, provenance=HERE), replace(BATCH, provenance=replace(HERE, **change))).alike


def test_a_share_of_the_shards_is_chosen_by_the_fingerprint_and_a_larger_share_adds_to_it():
    committed = [Shard(first, first + 3) for first in range(0, 40_000, 4)]
    few, more = (unverified("f", share, committed, {}) for share in (0.01, 0.1))
    assert set(few) < set(more)
    assert 70 < len(few) < 130
    assert 900 < len(more) < 1100
    assert unverified("f", 0.01, committed, {few[0]: True}) == few[1:]
    assert unverified("another", 0.01, committed, {}) != few
    assert not unverified("f", 0.0, committed, {})
    assert unverified("f", 1.0, committed, {}) == committed


def test_a_difference_stays_on_record_beside_equal_trainings_until_the_batch_is_discarded(experiment_store):
    shard = Shard(10, 12)
    committed, other = replace(BATCH, provenance=HERE), replace(changed("test_correct", 0), provenance=replace(HERE, host="b"))
    experiment_store.commit(committed, "f")
    experiment_store.record_replica(compare(committed, committed))
    assert experiment_store.trained_twice() == {shard: False}
    experiment_store.record_replica(compare(committed, other))
    experiment_store.record_replica(compare(committed, committed))
    assert experiment_store.trained_twice() == {shard: True}
    line = experiment_store.difference(shard)
    assert line.startswith("trials 10-12: two trainings differ in 1 trials, 8 bits: on a (NVIDIA H100, x, AVX512, torch 2.15.0")
    assert "and b (NVIDIA H100" in line
    experiment_store.store.put(keys.replica("e", 10, 12, "different"), b"{")
    assert "cannot be read" in experiment_store.difference(shard)
    experiment_store.discard(shard, "its machine is broken")
    assert not experiment_store.trained_twice()


def test_no_comparison_with_a_discarded_batch_is_left_if_the_command_is_interrupted(experiment_store, monkeypatch):
    shard = Shard(10, 12)
    experiment_store.commit(BATCH, "f")
    experiment_store.record_replica(compare(BATCH, changed("test_correct", 0)))
    delete = type(experiment_store.store).delete

    def interrupted(store, key):
        delete(store, key)
        if "/trials/" in key:
            raise UnreachableError("store: no answer")

    with monkeypatch.context() as patch:
        patch.setattr(type(experiment_store.store), "delete", interrupted)
        with pytest.raises(UnreachableError):
            experiment_store.discard(shard, "its machine is broken")
    assert not experiment_store.committed()
    assert not experiment_store.trained_twice()
