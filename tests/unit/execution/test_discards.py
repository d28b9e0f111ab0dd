"""Discards beside processes that list, publish and end the experiment at any moment of them: no discarded trial stays in the scores."""

import pytest

from memtail.errors import UnreachableError
from memtail.execution.aggregation import Step
from memtail.scores.pointer import latest_version
from memtail.scores.publish import score_version
from memtail.storage import keys
from memtail.storage.local import LocalStore
from memtail.trials import Shard
from tests.unit.execution.test_aggregation import Trained

BAD = Shard(8, 15)
# Steps of a discard: the method of the store, and what its key has.
RECORD, REMOVAL, END, MARKER = ("put", "/discarded/"), ("delete", "/trials/"), ("put", "-removed"), ("put", "changes/")
STEPS = pytest.mark.parametrize("step", [RECORD, REMOVAL, END, MARKER], ids=["record", "removal", "end", "marker"])


def discard(experiment_store, *actions, shard=BAD):
    """Discard a shard; `actions` are steps with functions that are called before them."""
    pending = list(actions)

    def replaced(method):
        original = getattr(LocalStore, method)

        def act(store, key, *arguments):
            if pending and pending[0][0][0] == method and pending[0][0][1] in key:
                pending.pop(0)[1]()
            return original(store, key, *arguments)

        return act

    with pytest.MonkeyPatch.context() as patch:
        for method in ("put", "delete"):
            patch.setattr(LocalStore, method, replaced(method))
        experiment_store.discard(shard, "the memory of the GPU was damaged")
    assert not pending


def look(trained, aggregation):
    """Take a turn, as the aggregator does, long after the last one."""
    trained.clock.now += 1000
    aggregation.accumulate_new()
    if aggregation.next_step() is Step.PUBLISH:
        aggregation.publish()


def end(trained):
    """Accumulate, publish and record the end, as a run does."""
    aggregation = trained.aggregation()
    look(trained, aggregation)
    aggregation.finish()


def published(trained):
    """Return the number of trials in the published scores, whose files are all there."""
    store, pointer = trained.store.store, latest_version(trained.store.store, trained.store.name)
    assert set(pointer.files) == {key.rpartition("/")[2] for key in store.list(keys.scores(trained.store.name, pointer.version))}
    return pointer.summary.accumulated_trials


@pytest.mark.parametrize("first", [False, True])
@STEPS
def test_discarded_trials_leave_the_scores_whenever_they_were_listed(trained, step, first):
    aggregation = trained.aggregation()
    if not first:
        look(trained, aggregation)
    discard(trained.store, (step, lambda: look(trained, aggregation)))
    look(trained, aggregation)
    assert published(trained) == 8
    trained.commit(8, correct=0.9)
    look(trained, aggregation)
    assert published(trained) == 16
    rebuilt = trained.aggregation()
    rebuilt.accumulate_new()
    assert rebuilt.pointer.version == score_version(trained.record.fingerprint, rebuilt.statistics)
    assert aggregation.finish()


@STEPS
def test_scores_that_count_discarded_trials_do_not_take_the_place_of_those_that_do_not(trained, step):
    slow, aggregation = trained.aggregation(), trained.aggregation()
    before = slow.accumulate_new if step in (RECORD, REMOVAL) else lambda: look(trained, aggregation)
    discard(trained.store, *([] if step in (RECORD, REMOVAL) else [(REMOVAL, slow.accumulate_new)]), (step, before))
    look(trained, aggregation)
    slow.publish()
    assert published(trained) == 8


@STEPS
def test_an_end_that_is_recorded_beside_a_discard_does_not_hold(trained, step):
    discard(trained.store, (step, lambda: end(trained)))
    assert trained.store.finished(trained.record) is None
    assert trained.store.missing(trained.record) == [BAD]


@pytest.mark.parametrize("step", [END, MARKER], ids=["end", "marker"])
def test_a_discard_that_is_cut_off_beside_the_end_can_be_repeated(trained, step):
    def cut_off():
        raise UnreachableError("store: no answer")

    with pytest.raises(UnreachableError):
        discard(trained.store, (REMOVAL, lambda: end(trained)), (step, cut_off))
    discard(trained.store)
    assert trained.store.missing(trained.record) == [BAD]
    look(trained, trained.aggregation())
    assert published(trained) == 8


def test_a_publisher_does_not_remove_files_that_another_one_writes_after_a_discard(tmp_path, declare, digits):
    trained = Trained(tmp_path / "store", declare, digits, 24)
    trained.commit(0)
    trained.commit(8)
    look(trained, trained.aggregation())
    trained.commit(16)
    old = trained.aggregation()
    old.accumulate_new()
    for shard in (BAD, Shard(16, 23)):
        trained.store.discard(shard, "the memory of the GPU was damaged")
    new, upload = trained.aggregation(), LocalStore.upload
    new.accumulate_new()

    def slowly(store, key, path):
        upload(store, key, path)
        patch.undo()
        old.publish()
        assert published(trained) == 24

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStore, "upload", slowly)
        new.publish()
    assert published(trained) == 8
