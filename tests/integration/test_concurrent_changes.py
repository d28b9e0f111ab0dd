"""Embedded runs of experiments that are changed by others while they train."""

from concurrent.futures.process import BrokenProcessPool

import pytest

import memtail
from memtail.errors import StoreError
from memtail.execution import aggregation, embedded, pool
from memtail.experiment_store import ExperimentStore
from memtail.scores.pointer import latest_version
from memtail.scores.publish import publish
from memtail.storage import keys
from memtail.storage.local import LocalStore
from memtail.trainers import images as trainers
from memtail.trials import Shard
from tests.support.batches import commit


@pytest.fixture
def run(tmp_path, declare, digits):
    """Function that runs an experiment of two shards of four trials, and calls a function once, when four trials are committed."""

    def run_and(change, trials=8, **parts):
        changes = [change]

        def show(state):
            if changes and state.trials >= 4:
                changes.pop()(ExperimentStore(LocalStore(tmp_path), "digits"))

        execution = {"trials_per_shard": 4, "device": "cpu", **parts.pop("execution", {})}
        experiment = declare(trials, subsets={"design": "balanced", **parts.pop("subsets", {})}, execution=execution, **parts)
        return memtail.run(experiment, tmp_path, dataset=digits, on_progress=show)

    return run_and


@pytest.fixture
def experiment_store(tmp_path):
    return ExperimentStore(LocalStore(tmp_path), "digits")


def test_a_run_trains_the_trials_by_which_another_process_extends_its_experiment(run, experiment_store):
    def extend(experiment_store):
        experiment_store.extend(16)
        commit(experiment_store, Shard(8, 11))

    assert run(extend).summary.trials == 16
    assert experiment_store.committed() == [Shard(first, first + 3) for first in (0, 4, 8, 12)]
    assert not list(experiment_store.failures())
    assert experiment_store.finished(experiment_store.read_record())


def test_a_batch_that_is_discarded_while_a_run_trains_is_trained_again(run, experiment_store):
    def discard(experiment_store):
        experiment_store.discard(experiment_store.committed()[0], "bad")

    assert run(discard).summary.trials == 8
    assert experiment_store.finished(experiment_store.read_record())


def test_a_batch_that_is_discarded_between_its_commit_and_its_count_is_trained_again(run, experiment_store, monkeypatch):
    read, discards = ExperimentStore.tagged_batch, []

    def discarded(experiment_store, shard, record):
        if not discards:
            discards.append(shard)
            experiment_store.discard(shard, "bad")
        return read(experiment_store, shard, record)

    monkeypatch.setattr(ExperimentStore, "tagged_batch", discarded)
    assert run(lambda _: None).summary.trials == 8
    assert discards


@pytest.mark.parametrize("change", ["discard", "extend"])
def test_a_change_while_a_run_publishes_the_last_scores_is_part_of_its_result(run, experiment_store, monkeypatch, change):
    changes = []

    def changed(*arguments):
        summary = publish(*arguments)
        if not changes:
            changes.append(change)
            experiment_store.extend(12) if change == "extend" else experiment_store.discard(Shard(0, 3), "bad")
        return summary

    monkeypatch.setattr(aggregation, "publish", changed)
    assert run(lambda _: None).summary.trials == (12 if change == "extend" else 8)
    finished = experiment_store.finished(experiment_store.read_record())
    assert finished.version == latest_version(experiment_store.store, "digits").version


def test_a_run_ends_when_another_one_has_finished_and_archived_the_experiment(run, experiment_store, declare, digits):
    def finish(experiment_store):
        record = experiment_store.read_record()
        commit(experiment_store, *experiment_store.missing(record))
        other = aggregation.Aggregation(experiment_store, record, digits, aggregation.Pace(1, 1, first_at_once=True))
        other.accumulate_new()
        other.publish()
        assert other.finish()
        for shard in experiment_store.committed():
            experiment_store.store.delete(keys.trial_batch("digits", shard.first, shard.last))

    assert run(finish, trials=16).summary.trials == 16
    assert not experiment_store.committed()


def test_a_run_ends_when_its_experiment_is_removed(run):
    def remove(experiment_store):
        for key in list(experiment_store.store.list(keys.experiments())):
            experiment_store.store.delete(key)

    with pytest.raises(StoreError, match="there is no experiment 'digits' in the store"):
        run(remove)


def test_a_shard_that_a_run_gave_up_and_another_one_trained_counts(run, experiment_store, monkeypatch):
    def fail(*_, **__):
        raise ValueError("too large for this device")

    def break_device(_):
        monkeypatch.setattr(trainers, "train_shard", fail)

    record_failure = ExperimentStore.record_failure

    def trained(experiment_store, shard, *rest, **options):
        failure = record_failure(experiment_store, shard, *rest, **options)
        if failure.attempt == 3:
            commit(experiment_store, shard)
        return failure

    monkeypatch.setattr(ExperimentStore, "record_failure", trained)
    assert run(break_device, trials=32).summary.trials == 32
    assert set(experiment_store.attempts().values()) == {3}


def test_a_run_goes_on_when_all_trials_are_discarded_before_it_publishes(run, monkeypatch):
    def discard(experiment_store):
        for shard in experiment_store.committed():
            experiment_store.discard(shard, "bad")

    monkeypatch.setattr(embedded, "PUBLISH_SECONDS", 0.0)
    assert run(discard, trials=32).summary.trials == 32


def test_failures_that_another_run_records_do_not_count_in_a_run(run, experiment_store, monkeypatch):
    train, failed = trainers.train_shard, []

    def fail_twice(experiment, dataset, trials, *rest, **options):
        if len(failed) < 2:
            failed.append(trials)
            for _ in range(2):
                experiment_store.record_failure(Shard(trials[0], trials[-1]), "of another run")
            raise ValueError("too large for this device")
        return train(experiment, dataset, trials, *rest, **options)

    monkeypatch.setattr(trainers, "train_shard", fail_twice)
    assert run(lambda _: None, trials=4).summary.trials == 4
    assert list(experiment_store.attempts().values()) == [6]


def test_a_second_training_whose_process_dies_counts_as_an_attempt(run, experiment_store, monkeypatch):
    train = pool._train

    def die(task, shard):
        if experiment_store.is_committed(shard):
            raise BrokenProcessPool
        return train(task, shard)

    monkeypatch.setattr(pool, "_train", die)
    for _ in range(3):
        assert run(lambda _: None, trials=4, execution={"verify": 1.0}).summary.trials == 4
    assert experiment_store.attempts() == {Shard(0, 3): 3}
    assert experiment_store.finished(experiment_store.read_record())
