"""Shards of training code of the user's own: what it is given, and what of it survives an interruption."""

import os
from pathlib import Path

import numpy as np
import pytest
import structlog

from memtail.errors import OutcomeError, TrainingStopped
from memtail.spec import Experiment, RecordedOutcomes
from memtail.subsets import membership
from memtail.trainers.task import Outcome
from memtail.trainers.user_shard import train_user_shard
from memtail.trials import unpack


class Caller:
    """Records what a shard tells; stops it after a number of finished trials."""

    def __init__(self, stop_after=None):
        self.fractions, self.trials, self.states, self.warnings, self._stop_after = [], [], [], [], stop_after

    def progress(self, fraction):
        self.fractions.append(fraction)

    def finished(self, trial):
        self.trials.append(trial)

    def save(self, state):
        self.states.append(state)

    def warn(self, message, trials):
        self.warnings.append(message)

    def should_stop(self):
        return self._stop_after is not None and len(self.trials) >= self._stop_after


class Code:
    """Training code that is called with the tasks."""

    def __init__(self, call, many=False):
        self.takes_many, self._call = many, call

    def __call__(self, tasks):
        return self._call(tasks)


class Train:
    """Training code that is right about its subset, and about every other example if the seed is even."""

    def __init__(self, many=False, act=lambda task: None):
        self.takes_many, self.tasks, self._act = many, [], act

    def __call__(self, tasks):
        outcomes = []
        for task in tasks:
            self.tasks.append(task)
            self._act(task)
            correct = np.full(task.dataset.n_train, task.seed % 2 == 0)
            correct[task.subset] = True
            outcomes.append(Outcome(correct, np.ones(task.dataset.n_test), metrics={"loss": 1.0}))
        return outcomes


@pytest.fixture
def experiment():
    trainer = {"function": "a:b", "options": {"lr": 1}}
    return Experiment.parse({"name": "e", "dataset": {"name": "digits"}, "subsets": {"trials": 12}, "trainer": trainer})


@pytest.fixture
def shard(experiment, digits):
    def run(train, caller, trials=range(4), checkpoint=None):
        return train_user_shard(experiment, "f" * 64, digits, trials, "cpu", train, caller, checkpoint)

    return run


@pytest.mark.parametrize("many", [False, True])
def test_a_task_has_the_subset_of_its_trial_a_seed_and_folders(shard, experiment, digits, many):
    caller, seen = Caller(), []

    def look(task):
        seen.append((task.workdir.is_dir(), task.checkpoint.is_dir(), list(task.checkpoint.iterdir()), Path.cwd() == task.workdir))

    train, before = Train(many, look), Path.cwd()
    batch = shard(train, caller, range(3, 6))
    members = membership(experiment.subsets, digits.train_labels, range(3, 6))
    for task, row, trial in zip(train.tasks, members, range(3, 6), strict=True):
        assert (task.trial, task.device, task.options) == (trial, "cpu", {"lr": 1})
        assert task.subset.dtype == np.int64
        np.testing.assert_array_equal(task.subset, np.flatnonzero(row))
        assert 0 <= task.seed < 2**63
        assert not any(task.workdir.iterdir())
    assert len({task.seed for task in train.tasks}) == 3
    assert [each[:3] for each in seen] == [(True, True, [])] * 3
    assert [each[3] for each in seen] == [True, not many, not many]
    assert Path.cwd() == before
    assert caller.trials == [3, 4, 5]
    np.testing.assert_array_equal(unpack(batch.membership, digits.n_train), members)
    assert batch.trial.tolist() == [3, 4, 5]
    assert unpack(batch.train_correct, digits.n_train)[members].all()
    assert batch.fingerprint == "f" * 64


def test_equal_trials_have_equal_seeds_in_any_shard(shard):
    whole, parts = Train(), Train()
    shard(whole, Caller(), range(6))
    for first in (0, 3):
        shard(parts, Caller(), range(first, first + 3))
    assert [task.seed for task in whole.tasks] == [task.seed for task in parts.tasks]


@pytest.mark.parametrize("many", [False, True])
def test_progress_is_that_of_the_shard(shard, many):
    caller = Caller()
    shard(Train(many, lambda task: task.report(0.5, loss=1.0)), caller)
    expected = [0.125, 0.25, 0.375, 0.5, 1.0] if many else [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0]
    assert caller.fractions == expected


def test_finished_trials_and_saved_files_survive_an_interruption(shard):
    def stop_in_the_third(task):
        if task.trial == 2:
            (task.checkpoint / "deep").mkdir()
            (task.checkpoint / "deep/weights").write_bytes(b"\0\1")
            task.save()
            raise TrainingStopped

    caller = Caller()
    with pytest.raises(TrainingStopped):
        shard(Train(act=stop_in_the_third), caller)
    assert caller.trials == [0, 1]

    found = {}

    def look(task):
        found[task.trial] = sorted(str(path.relative_to(task.checkpoint)) for path in task.checkpoint.rglob("*"))
        if found[task.trial]:
            assert (task.checkpoint / "deep/weights").read_bytes() == b"\0\1"

    resumed = shard(Train(act=look), Caller(), checkpoint=caller.states[-1])
    assert found == {2: ["deep", "deep/weights"], 3: []}
    whole = shard(Train(), Caller())
    for name in ("trial", "membership", "train_correct", "test_correct"):
        np.testing.assert_array_equal(getattr(resumed, name), getattr(whole, name))
    assert resumed.metrics == whole.metrics


@pytest.mark.parametrize("state", [b"", b"PK\3\4", "other"])
def test_a_checkpoint_that_cannot_be_used_costs_time_only(shard, state):
    if state == "other":
        caller = Caller()
        shard(Train(act=lambda task: task.save()), caller)
        state = caller.states[-1]
        state = state.replace(("f" * 64).encode("utf-32-le"), ("e" * 64).encode("utf-32-le"))
    train = Train()
    with structlog.testing.capture_logs() as logs:
        shard(train, Caller(), checkpoint=state)
    assert len(train.tasks) == 4
    assert [entry["event"] for entry in logs] == ["checkpoint cannot be used, starting over"]


@pytest.mark.parametrize(("returned", "described"), [([], "0 outcomes"), (None, "NoneType")])
def test_train_many_must_return_one_outcome_for_each_task(shard, returned, described):
    train = Train(many=True)
    train.__class__ = type("Other", (Train,), {"__call__": lambda self, tasks: returned})
    with pytest.raises(OutcomeError, match=f"train_many returned {described} for 4 tasks"):
        shard(train, Caller())


def test_what_the_code_writes_to_the_dataset_ends_with_its_trial(shard, digits):
    seen = []

    def write(task):
        seen.append((int(task.dataset.train_images[0].max()), int(task.dataset.train_labels[0])))
        task.dataset.train_images[0], task.dataset.train_labels[0] = 200, 9

    shard(Train(act=write), Caller())
    assert seen == [(int(digits.train_images[0].max()), int(digits.train_labels[0]))] * 4
    assert seen[0][0] != 200
    assert seen[0][1] != 9


@pytest.mark.parametrize("many", [False, True])
def test_labels_are_compared_with_those_on_the_disk(shard, many):
    def train(tasks):
        outcomes = []
        for task in tasks:
            task.dataset.train_labels[:5] = 0
            right = np.ones(task.dataset.n_train), np.ones(task.dataset.n_test)
            outcomes.append(Outcome(*right, train_labels=task.dataset.train_labels))
        return outcomes

    with pytest.raises(OutcomeError, match="train_labels differs from the dataset at 4 of 1438 examples"):
        shard(Code(train, many), Caller())


def test_a_faulty_outcome_names_its_trial(shard):
    train = Train()
    train.__class__ = type("Other", (Train,), {"__call__": lambda self, tasks: [Outcome([1], [1])]})
    with pytest.raises(OutcomeError, match=r"^trial 0 of a:b: train_correct has shape \[1\]"):
        shard(train, Caller())


@pytest.mark.parametrize("loss", [1.0, np.nan])
def test_outcomes_that_do_not_depend_on_the_subset_are_warned_of_unless_trials_diverged(shard, loss):
    def train(tasks):
        return [Outcome(np.arange(tasks[0].dataset.n_train) % 2, np.ones(tasks[0].dataset.n_test), metrics={"loss": loss})]

    caller = Caller()
    shard(Code(train), caller)
    assert ["outcomes are probably not in the order of the dataset" in each for each in caller.warnings] == [True] * (loss == 1.0)


@pytest.mark.parametrize("learned", [0.0, 0.3])
def test_scores_that_do_not_depend_on_the_subset_are_warned_of(experiment, digits, learned):
    def train(tasks):
        score = np.full(digits.n_train, 0.4)
        score[tasks[0].subset] += learned
        return [Outcome(train_score=score, test_score=np.ones(digits.n_test))]

    only, caller = experiment.model_copy(update={"record": RecordedOutcomes(scores="only")}), Caller()
    batch = train_user_shard(only, "f" * 64, digits, range(3), "cpu", Code(train), caller, None)
    assert batch.metrics[0].in_subset_accuracy == pytest.approx(0.4 + learned, abs=2e-3)
    assert ["outcomes are probably not in the order of the dataset" in each for each in caller.warnings] == [True] * (learned == 0)


def test_code_that_changes_the_folder_does_not_move_the_process(shard):
    before = Path.cwd()
    shard(Train(act=lambda task: os.chdir("/")), Caller())
    assert Path.cwd() == before


def test_a_checkpoint_with_other_outcomes_than_are_recorded_is_not_used(experiment, digits):
    with_scores = experiment.model_copy(update={"record": RecordedOutcomes(scores=True)})  # of one fingerprint

    def train(tasks):
        return [
            Outcome(np.ones(digits.n_train), np.ones(digits.n_test), train_score=np.ones(digits.n_train), test_score=np.ones(digits.n_test))
            for _ in tasks
        ]

    def interrupted(task):
        if task.trial == 1:
            (task.checkpoint / "weights").write_bytes(b"of trial 1")
            task.save()
            raise TrainingStopped

    scoring = Train()
    scoring.__class__ = type("Scoring", (Train,), {"__call__": lambda self, tasks: [self._act(task) for task in tasks] and train(tasks)})
    for before, after in ((experiment, with_scores), (with_scores, experiment)):
        caller, seen = Caller(), []
        scoring._act = interrupted
        with pytest.raises(TrainingStopped):
            train_user_shard(before, "f" * 64, digits, range(3), "cpu", scoring, caller, None)
        scoring._act = lambda task, seen=seen: seen.append((task.trial, any(task.checkpoint.iterdir())))
        with structlog.testing.capture_logs() as logs:
            batch = train_user_shard(after, "f" * 64, digits, range(3), "cpu", scoring, Caller(), caller.states[-1])
        assert (batch.train_score is not None) == after.record.keeps_scores
        assert seen == [(0, False), (1, False), (2, False)]
        assert logs[0]["event"] == "checkpoint cannot be used, starting over"
