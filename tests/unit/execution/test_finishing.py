"""The record of an experiment's end: when it is written, what it makes of missing batches, and what reopens the experiment."""

from dataclasses import replace

import pytest

import memtail
from memtail.errors import StoreError, UnreachableError
from memtail.execution.aggregation import Step
from memtail.execution.finishing import still_finished
from memtail.execution.progress import progress_of
from memtail.execution.shard_task import ShardOutcome, run_shard
from memtail.experiment_store import Control, ExperimentStore, change_tags
from memtail.experiment_store.replicas import compare
from memtail.scores.pointer import latest_version
from memtail.spec import UntilSpec
from memtail.storage import ObjectNotFound, keys
from memtail.storage.local import LocalStore
from memtail.trials import Shard

SHARDS = [Shard(0, 7), Shard(8, 15)]


def finish(trained):
    """Accumulate, publish and record the end, as a run does; return the record of the end."""
    aggregation = trained.aggregation()
    aggregation.accumulate_new()
    if aggregation.next_step() is Step.PUBLISH:
        aggregation.publish()
    return aggregation.finish()


def remove_batches(trained, *shards):
    for shard in shards or SHARDS:
        trained.store.store.delete(keys.trial_batch(trained.store.name, shard.first, shard.last))


def finished(trained):
    return still_finished(trained.store, trained.store.read_record())


def test_the_end_is_recorded_once_all_trials_are_published(trained):
    aggregation = trained.aggregation()
    assert aggregation.finish() is None
    aggregation.accumulate_new()
    assert aggregation.finish() is None
    aggregation.publish()
    record = aggregation.finish()
    assert record == trained.store.finished(trained.record)
    assert (record.trials, record.version, record.digest) == (16, aggregation.pointer.version, aggregation.statistics.digest())
    assert record.shards == SHARDS
    assert progress_of(trained.store.store, trained.store.name).finished


@pytest.mark.parametrize("gone", [SHARDS[:1], SHARDS])
def test_a_batch_that_is_missing_after_the_end_changes_nothing(trained, gone):
    record = finish(trained)
    remove_batches(trained, *gone)
    assert finished(trained) == record
    assert trained.store.missing(trained.record) == []
    progress = progress_of(trained.store.store, trained.store.name)
    assert (progress.ending, progress.trials, progress.missing, progress.committed) == ("published", 16, [], SHARDS)


def test_a_batch_that_is_missing_before_the_end_is_trained_again(trained):
    aggregation = trained.aggregation()
    aggregation.accumulate_new()
    aggregation.publish()  # and the process is killed
    remove_batches(trained, SHARDS[0])
    assert finish(trained) is None
    assert trained.store.missing(trained.record) == SHARDS[:1]


def test_a_process_killed_between_publication_and_the_record_of_the_end_is_made_up_for(trained):
    aggregation = trained.aggregation()
    aggregation.accumulate_new()
    aggregation.publish()
    published = latest_version(trained.store.store, trained.store.name)
    assert finish(trained).version == published.version
    assert latest_version(trained.store.store, trained.store.name) == published


def test_a_replaced_batch_reopens_the_experiment_and_its_scores_follow(trained):
    before = finish(trained)
    remove_batches(trained, SHARDS[0])
    trained.commit(0, correct=0.9)
    assert finished(trained) is None
    assert trained.store.name in change_tags(trained.store.store)
    after = finish(trained)
    assert after.version != before.version
    assert trained.store.name not in change_tags(trained.store.store)


def test_a_discarded_batch_reopens_the_experiment(trained):
    finish(trained)
    trained.store.discard(SHARDS[0], "bad")
    assert finished(trained) is None
    assert trained.store.missing(trained.record) == SHARDS[:1]
    trained.commit(0)
    assert finish(trained).discards == 2


def test_a_batch_that_was_discarded_and_trained_again_is_not_discarded_once_it_is_removed(trained):
    finish(trained)
    trained.store.discard(SHARDS[0], "bad")
    trained.commit(0)
    before = finish(trained)
    remove_batches(trained)
    with pytest.raises(ObjectNotFound, match="has no trial batch 0-7"):
        trained.store.discard(SHARDS[0], "bad")
    assert finished(trained) == before


def test_more_trials_reopen_the_experiment(trained):
    finish(trained)
    trained.record = trained.store.register(trained.record.with_trials(24))
    assert finished(trained) is None
    assert trained.store.missing(trained.record) == [Shard(16, 23)]
    trained.commit(16)
    assert finish(trained).trials == 24


def test_the_same_declaration_does_not_reopen_the_experiment(trained):
    finish(trained)
    remove_batches(trained)
    trained.store.register(trained.record)
    assert finished(trained)


def test_more_verification_reopens_the_experiment_until_each_shard_is_trained_twice(trained):
    finish(trained)
    trained.record = trained.store.register(verifying(trained.record, 1.0))
    assert finish(trained) is None
    batch = trained.store.batch(SHARDS[0], trained.record)
    trained.store.record_replica(compare(batch, batch))
    assert finish(trained) is None
    for _ in range(3):  # given up
        trained.store.record_failure(SHARDS[1], "boom")
    assert finish(trained)


def verifying(record, share):
    """Return a record with another share of shards to verify."""
    experiment = record.experiment
    return replace(
        record, experiment=experiment.model_copy(update={"execution": experiment.execution.model_copy(update={"verify": share})})
    )


@pytest.mark.parametrize(("ended_at", "until"), [(None, {"standard_error": 0.2}), ({"standard_error": 0.4}, {"standard_error": 0.2})])
def test_a_smaller_bound_reopens_the_experiment_which_then_takes_more_trials(trained, ended_at, until):
    trained.record = trained.store.register(bounded(trained.record, ended_at))
    assert finish(trained)
    trained.store.register(bounded(trained.record, ended_at))
    assert finished(trained)
    trained.record = trained.store.register(bounded(trained.record, until))
    assert not finished(trained)
    aggregation = trained.aggregation()
    aggregation.accumulate_new()
    assert aggregation.next_step().trials > 16


def test_a_record_of_the_end_that_does_not_name_the_bounds_holds(trained):
    trained.store.set_finished(replace(finish(trained), until={}))
    trained.record = trained.store.register(bounded(trained.record, {"standard_error": 0.2}))
    assert finished(trained)


def bounded(record, until):
    """Return a record with the bounds `until`."""
    subsets = record.experiment.subsets.model_copy(update={"until": until and UntilSpec(**until)})
    return replace(record, experiment=record.experiment.model_copy(update={"subsets": subsets}))


def test_more_verification_that_is_cut_off_before_it_reopens_the_experiment_takes_effect_if_repeated(trained, monkeypatch):
    finish(trained)
    more = verifying(trained.record, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(ExperimentStore, "reopen", lambda store, why: (_ for _ in ()).throw(UnreachableError("store: no answer")))
        with pytest.raises(UnreachableError):
            trained.store.register(more)
    trained.record = trained.store.register(more)
    assert not trained.store.store.exists(keys.finished(trained.store.name))
    assert finish(trained) is None


def test_less_verification_does_not_reopen_the_experiment(trained):
    trained.record = trained.store.register(verifying(trained.record, 1.0))
    for shard in SHARDS:
        batch = trained.store.batch(shard, trained.record)
        trained.store.record_replica(compare(batch, batch))
    before = finish(trained)
    trained.store.register(verifying(trained.record, 0.5))
    trained.store.register(verifying(trained.record, 1.0))
    assert finished(trained) == before


def test_a_cancelled_experiment_is_not_finished(trained):
    trained.store.set_control(Control("cancelled"))
    assert finish(trained) is None
    trained.store.set_control(Control())
    assert finish(trained)


CHANGES = {
    "extended": lambda trained: trained.store.register(trained.record.with_trials(24)),
    "discarded": lambda trained: trained.store.discard(SHARDS[0], "bad"),
    "to be verified": lambda trained: trained.store.register(verifying(trained.record, 1.0)),
    "cancelled": lambda trained: trained.store.set_control(Control("cancelled")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_while_the_end_is_recorded_is_not_lost(trained, monkeypatch, change):
    record_end = ExperimentStore.set_finished

    def changed_before(store, record):
        monkeypatch.undo()
        CHANGES[change](trained)
        record_end(store, record)

    monkeypatch.setattr(ExperimentStore, "set_finished", changed_before)
    assert finish(trained) is None
    assert not trained.store.store.exists(keys.finished(trained.store.name))
    assert change_tags(trained.store.store).keys() == {trained.store.name}


def test_two_aggregations_record_one_end(trained):
    first, second = trained.aggregation(), trained.aggregation()
    for aggregation in (first, second):
        aggregation.accumulate_new()
        aggregation.publish()
    record = first.finish()
    data = trained.store.store.get(keys.finished(trained.store.name))
    again = second.finish()
    assert again is not None
    assert replace(again, when=record.when) == record
    assert trained.store.store.get(keys.finished(trained.store.name)) == data


def test_lost_scores_are_published_again_from_the_batches_and_never_by_training(trained):
    before = finish(trained)
    trained.store.store.delete(keys.latest_scores(trained.store.name))
    assert finished(trained) is None
    assert finish(trained).version == before.version
    trained.store.store.delete(keys.latest_scores(trained.store.name))
    remove_batches(trained, SHARDS[1])
    assert finished(trained)
    assert trained.store.missing(trained.record) == []


@pytest.mark.parametrize("data", [b"", b"[]", b'{"schema": 1}', b'{"schema": 2}', b'{"schema": 1, "batches": {"x": "y"}}'])
def test_a_damaged_record_of_the_end_is_replaced(trained, data):
    before = finish(trained)
    trained.store.store.put(keys.finished(trained.store.name), data)
    assert finished(trained) is None
    assert finish(trained).batches == before.batches


def test_a_shard_of_a_finished_experiment_is_not_trained_again(trained):
    finish(trained)
    remove_batches(trained)
    result = run_shard(trained.store, trained.record, SHARDS[0], "cpu", lambda checkpoints: pytest.fail("trained"))
    assert result.outcome is ShardOutcome.DONE_BEFORE


def test_an_embedded_run_records_the_end_and_trains_nothing_after_it(declare, digits, tmp_path):
    experiment = declare(8, execution={"trials_per_shard": 4, "device": "cpu"}, subsets={"design": "balanced"})
    store = LocalStore(tmp_path / "store")
    before = memtail.run(experiment, store.root, dataset=digits)
    for key in list(store.list(keys.trials("digits"))):
        store.delete(key)
    after = memtail.run(experiment, store.root, dataset=digits)
    assert after.summary == before.summary
    assert not list(store.list(keys.trials("digits")))
    store.delete(keys.latest_scores("digits"))
    with pytest.raises(StoreError, match="restore them from a backup, or train again with memtail resume digits"):
        memtail.run(experiment, store.root, dataset=digits)
    ExperimentStore(store, "digits").reopen("resumed")
    assert memtail.run(experiment, store.root, dataset=digits).summary == before.summary
