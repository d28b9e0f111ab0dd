"""What training code may return, and what is made of it."""

import io
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
import torch

from memtail.datasets import DatasetLabels
from memtail.errors import ForeignObjectError, OutcomeError
from memtail.spec import RecordedOutcomes
from memtail.trainers.outcomes import check_outcome, looks_permuted, says_enough
from memtail.trainers.task import Outcome
from memtail.trainers.trial_batch import describe_training
from memtail.trainers.user_shard import make_batch
from memtail.trials import Provenance, TrialBatch, unpack

N, Q = 6, 3


@pytest.fixture
def dataset(tmp_path):
    names = np.array([f"a/{index}.png" for index in range(N)]).astype(bytes)
    return DatasetLabels(tmp_path, "0" * 64, ("a", "b"), np.arange(N) % 2, np.arange(Q) % 2, names, names[:Q])


def outcome(**changes):
    return Outcome(**{"train_correct": np.arange(N) % 2 == 0, "test_correct": [1, 0, 1], **changes})


@pytest.mark.parametrize(
    "correct",
    [
        [True, False, True, False, True, False],
        np.array([1, 0, 1, 0, 1, 0], np.uint8),
        np.array([1.0, 0.0, 1.0, 0.0, 1.0, 0.0]),
        torch.tensor([1, 0, 1, 0, 1, 0]).bool(),
        torch.tensor([1.0, 0, 1, 0, 1, 0], requires_grad=True),
    ],
    ids=["list", "integers", "floats", "tensor", "tensor with gradient"],
)
def test_array_likes_of_zeros_and_ones_are_accepted(dataset, correct):
    arrays, metrics = check_outcome(outcome(train_correct=correct, metrics={"loss": np.float32(2)}), dataset, RecordedOutcomes())
    assert arrays["train_correct"].tolist() == [True, False] * 3
    assert arrays["test_correct"].tolist() == [True, False, True]
    assert metrics == {"loss": 2.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_correct": np.ones(4)}, r"train_correct has shape \[4\], expected is \[6\]: .* not only for those of the subset"),
        ({"train_correct": np.ones((N, 1))}, r"train_correct has shape \[6, 1\]"),
        ({"test_correct": None}, "test_correct is missing: return one value for each of the 3 examples"),
        ({"train_correct": np.linspace(0, 1, N)}, "train_correct is float64 with other values than 0 and 1"),
        ({"train_correct": list("abcdef")}, "train_correct is <U1 with other values"),
        ({"metrics": {"loss": "low"}}, "metrics are not numbers by name"),
        ({"metrics": [1]}, "metrics are not numbers by name"),
        ({"train_labels": np.zeros(N)}, r"train_labels differs from the dataset at 3 of 6 examples, first at 1 \(0\.0, in the dataset 1\)"),
        ({"test_labels": [0, 1]}, r"test_labels has shape \[2\]"),
        ({"train_ids": [f"a/{index}.png" for index in reversed(range(N))]}, r"train_ids differs .* first at 0 \(a/5\.png"),
    ],
)
def test_a_fault_is_one_line_that_names_the_array(dataset, changes, message):
    with pytest.raises(OutcomeError, match=message):
        check_outcome(outcome(**changes), dataset, RecordedOutcomes())


def test_another_object_is_refused(dataset):
    with pytest.raises(OutcomeError, match=r"the trainer returned dict, not a memtail\.Outcome"):
        check_outcome({"train_correct": []}, dataset, RecordedOutcomes())


def test_equal_labels_and_ids_are_accepted(dataset):
    ids = [f"a/{index}.png" for index in range(N)]
    check_outcome(outcome(train_labels=[0, 1] * 3, test_labels=torch.tensor([0, 1, 0]), train_ids=ids), dataset, RecordedOutcomes())


def test_the_test_side_may_be_missing_without_a_test_set(dataset):
    none = replace(dataset, test_labels=np.empty(0, np.int64), test_files=np.empty(0, "S1"))
    for recorded in (False, True):
        record = RecordedOutcomes(margins=recorded, scores=recorded)
        arrays, _ = check_outcome(outcome(test_correct=None, train_margin=np.ones(N), train_score=np.ones(N)), none, record)
        names = {"test_correct", "test_margin", "test_score"} if recorded else {"test_correct"}
        assert {name: array.shape for name, array in arrays.items() if name.startswith("test")} == dict.fromkeys(names, (0,))
    assert check_outcome(outcome(test_correct=[]), none, RecordedOutcomes())[0]["test_correct"].dtype == np.bool_
    batch = make_batch(none, [0, 1], np.eye(2, N) > 0, [arrays, arrays], [{}, {}], Provenance())
    assert [entry.test_accuracy for entry in batch.metrics] == [None, None]
    assert TrialBatch.from_bytes(batch.to_bytes()).test_correct.shape == (2, 0)
    with pytest.raises(OutcomeError, match=r"test_correct has shape \[3\], expected is \[0\]"):
        check_outcome(outcome(), none, RecordedOutcomes())
    with pytest.raises(OutcomeError, match="test_correct is missing: return one value for each of the 3 examples"):
        check_outcome(outcome(test_correct=None), dataset, RecordedOutcomes())


def test_labels_are_compared_only_if_there_are_some(dataset):
    unlabelled = replace(dataset, classes=(), train_labels=np.zeros(N, np.int64), test_labels=np.zeros(Q, np.int64))
    check_outcome(outcome(train_ids=[f"a/{index}.png" for index in range(N)]), unlabelled, RecordedOutcomes())
    with pytest.raises(OutcomeError, match="train_labels was returned, but the dataset has none: return ids, if it has those, or neither"):
        check_outcome(outcome(train_labels=np.zeros(N)), unlabelled, RecordedOutcomes())


def test_margins_are_kept_where_the_experiment_records_them(dataset):
    returned = outcome(train_margin=np.array([1e9, -1e9, 0, 1, 2, 3]), test_margin=[0.5, 1, 2])
    assert "train_margin" not in check_outcome(returned, dataset, RecordedOutcomes())[0]
    arrays, _ = check_outcome(returned, dataset, RecordedOutcomes(margins=True))
    assert arrays["train_margin"].dtype == np.float16
    assert np.isfinite(arrays["train_margin"]).all()
    with pytest.raises(OutcomeError, match="train_margin is missing, and the experiment records margins"):
        check_outcome(outcome(), dataset, RecordedOutcomes(margins=True))


def test_scores_are_kept_where_the_experiment_records_them(dataset):
    record, members = RecordedOutcomes(scores=True), np.ones((1, N), bool)
    returned = outcome(train_score=torch.linspace(0, 1, N), test_score=[0.0, 0.5, True])
    batch = batch_of(dataset, [returned], members, record)
    assert batch.train_score.tolist() == [[0, 51, 102, 153, 204, 255]]
    assert batch.test_score.tolist() == [[0, 128, 255]]
    assert batch_of(dataset, [returned], members).train_score is None
    read = TrialBatch.from_bytes(batch.to_bytes())
    np.testing.assert_array_equal(read.train_score, batch.train_score)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_score": None}, "train_score is missing, and the experiment records scores: return it, or remove record.scores"),
        ({"test_score": [0.1, 1.5, 0]}, "test_score is 1.5 at 1: return scores from 0 to 1"),
        ({"train_score": -np.ones(N)}, "train_score is -1.0 at 0"),
        ({"train_score": list("abcdef")}, "train_score is <U1: return floats from 0 to 1"),
        ({"train_score": np.ones(4)}, r"train_score has shape \[4\]"),
    ],
)
def test_scores_outside_0_and_1_are_refused(dataset, changes, message):
    returned = {"train_score": np.ones(N), "test_score": np.ones(Q)} | changes
    with pytest.raises(OutcomeError, match=message):
        check_outcome(outcome(**returned), dataset, RecordedOutcomes(scores=True))


def batch_of(dataset, outcomes, members, record=RecordedOutcomes()):  # noqa: B008
    checked = [check_outcome(each, dataset, record) for each in outcomes]
    arrays, metrics = zip(*checked, strict=True)
    return make_batch(dataset, range(len(outcomes)), members, arrays, metrics, Provenance(fingerprint="f"))


def test_a_batch_holds_the_outcomes_and_survives_its_wire_format(dataset):
    members = np.array([[True] * 4 + [False] * 2, [False] * 2 + [True] * 4])
    batch = batch_of(dataset, [outcome(metrics={"loss": 0.5, "epochs": 3}), outcome(train_correct=np.ones(N))], members)
    read = TrialBatch.from_bytes(batch.to_bytes())
    np.testing.assert_array_equal(unpack(read.membership, N), members)
    np.testing.assert_array_equal(unpack(read.train_correct, N), [[True, False] * 3, [True] * N])
    first, second = read.metrics
    assert (first.loss, first.further, first.in_subset_accuracy, first.held_out_accuracy) == (0.5, {"epochs": 3.0}, 0.5, 0.5)
    assert (second.loss, second.further, second.in_subset_accuracy, second.test_accuracy) == (None, None, 1.0, 2 / 3)
    assert not any(each.diverged for each in read.metrics)


@pytest.mark.parametrize(
    "changes",
    [{"metrics": {"loss": float("nan")}}, {"train_margin": np.full(N, np.nan)}, {"test_score": [1, np.nan, 1]}],
    ids=["loss", "margins", "scores"],
)
def test_a_trial_without_finite_results_is_diverged_and_does_not_count(dataset, changes):
    members = np.ones((2, N), bool)
    full = {"train_margin": np.zeros(N), "test_margin": np.zeros(Q), "train_score": np.ones(N), "test_score": np.ones(Q)}
    batch = batch_of(dataset, [outcome(**full | changes), outcome(**full)], members, RecordedOutcomes(margins=True, scores=True))
    assert batch.train_score.sum(1).tolist() == [0, 255 * N]
    assert [each.diverged for each in batch.metrics] == [True, False]
    assert not unpack(batch.train_correct, N)[0].any()
    assert batch.metrics[1].held_out_accuracy is None


def test_batches_of_the_built_in_trainer_have_no_further_metrics(dataset):
    batch = batch_of(dataset, [outcome()], np.ones((1, N), bool))
    assert "further" not in str(np.load(io.BytesIO(batch.to_bytes()))["metrics"])


def test_outcomes_in_another_order_are_noticed():
    rng = np.random.default_rng(0)
    members = rng.random((3, 500)) < 0.7
    fits = np.where(members, rng.random((3, 500)) < 0.98, rng.random((3, 500)) < 0.8)
    assert not looks_permuted(members, fits)
    assert looks_permuted(members, rng.permuted(fits, axis=1))
    assert not looks_permuted(members, np.ones((3, 500), bool))
    assert not looks_permuted(np.ones((3, 500), bool), fits)


def test_the_provenance_names_software_and_hardware():
    provenance = describe_training("f", "a device", "a processor", datetime(2026, 1, 1, tzinfo=UTC), 1.23456)
    assert (provenance.kind, provenance.seconds, provenance.started) == ("a device, a processor", 1.235, "2026-01-01T00:00:00+00:00")
    assert provenance.torch
    assert provenance.memtail


ONLY = RecordedOutcomes(scores="only")


def test_without_correctness_a_batch_holds_scores_and_their_means(dataset):
    members = np.array([[True] * 4 + [False] * 2])
    batch = batch_of(dataset, [Outcome(train_score=[1, 1, 1, 0.2, 0, 0.4], test_score=[0, 0.5, 1])], members, ONLY)
    read = TrialBatch.from_bytes(batch.to_bytes())
    assert read.scores_only
    assert not {"train_correct", "test_correct"} & set(np.load(io.BytesIO(batch.to_bytes())).files)
    assert read.train_score.tolist() == [[255, 255, 255, 51, 0, 102]]
    (trial,) = read.metrics
    assert (trial.in_subset_accuracy, trial.held_out_accuracy) == pytest.approx((0.8, 0.2))
    assert trial.test_accuracy == pytest.approx(0.5, abs=1e-2)
    with pytest.raises(ForeignObjectError, match=r"trials 0-0 have scores only, and correctness is needed: .* record: \{scores: true\}"):
        read.correctness()
    with pytest.raises(ForeignObjectError, match="it has neither correctness nor scores"):
        replace(read, test_score=None)


@pytest.mark.parametrize(
    ("returned", "record", "message"),
    [
        (
            {"train_correct": None, "test_correct": None, "train_score": None},
            ONLY,
            "train_score is missing, and the experiment records scores only: return it, or return correctness and remove record.scores",
        ),
        ({}, ONLY, "train_correct was returned, and the experiment records scores only: remove it, or declare"),
        ({"train_correct": None}, ONLY, "test_correct was returned, and the experiment records scores only: remove it, or declare"),
        ({"train_correct": None}, RecordedOutcomes(), r"train_correct is missing: return one .* record: \{scores: only\}"),
    ],
)
def test_correctness_is_either_recorded_or_not(dataset, returned, record, message):
    with pytest.raises(OutcomeError, match=message):
        check_outcome(outcome(**{"train_score": np.ones(N), "test_score": np.ones(Q)} | returned), dataset, record)


def test_scores_in_another_order_are_noticed():
    rng = np.random.default_rng(0)
    members = rng.random((3, 500)) < 0.7
    scores = rng.random((3, 500)) * np.where(members, 0.5, 0.3)
    assert not looks_permuted(members, scores)
    assert looks_permuted(members, rng.permuted(scores, axis=1))
    assert not looks_permuted(members, np.ones((3, 500)))


def test_examples_of_different_difficulty_do_not_hide_a_small_memorization():
    rng = np.random.default_rng(0)
    warned = []
    for _ in range(100):
        members = rng.random((4, 400)) < 0.7
        scores = 0.9 * rng.beta(2, 1, 400) + 0.02 * members + rng.normal(0, 0.01, (4, 400))
        warned.append((looks_permuted(members, scores), looks_permuted(members, scores[:, rng.permutation(400)])))
    honest, permuted = np.sum(warned, axis=0)
    assert honest == 0
    assert permuted >= 90  # 97.7 on average: the rest look better by two standard errors by chance


def test_a_single_trial_that_says_too_little_is_no_reason_for_a_warning():
    rng = np.random.default_rng(0)
    warned = []
    for _ in range(50):
        for size, accuracy, gap in ((300, 0.97, 0.005), (1437, 0.95, 0.02), (1437, 0.7, 0.05), (10_000, 0.97, 0.005), (10_000, 0.5, 0.2)):
            members = rng.random((1, size)) < 0.7
            correct = rng.random((1, size)) < accuracy + gap * members
            permuted = correct[:, rng.permutation(size)]
            warned.append([looks_permuted(members, each) and says_enough(members, each) for each in (correct, permuted)])
    honest, found = np.array(warned).reshape(50, 5, 2).sum(0).T
    assert honest.sum() == 0
    assert found[-1] >= 45  # large gaps of large datasets show
