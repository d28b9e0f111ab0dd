"""Commands that free space: what they show, remove, refuse and leave. Trials are random: no test trains."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from memtail import load_scores
from memtail.datasets.staged_dataset import fetch, stage
from memtail.errors import ObjectNotFound, ScoresError, StoreError
from memtail.execution import retention
from memtail.execution.aggregation import Aggregation, Pace
from memtail.execution.declare import declare as declare_record
from memtail.execution.finishing import still_finished
from memtail.execution.progress import progress_of
from memtail.experiment_store import Control, ExperimentStore, change_tags, recorded_actions
from memtail.storage import keys
from memtail.storage.local import LocalStore
from memtail.trials import Shard
from tests.support.batches import commit
from tests.support.cli import invoke

SHARDS = [Shard(0, 3), Shard(4, 7)]


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "store")


@pytest.fixture
def call(store):
    """Runs a command on the store in this process; raises the error that users would see."""
    return partial(invoke, store.address)


@pytest.fixture
def submit(store, declare, digits):
    """Register an experiment with a staged dataset; commit its shards, and record its end, if `done`."""

    def submitted(name="done", done=True, **parts):
        parts = {"execution": {"trials_per_shard": 4, "device": "cpu"}, "subsets": {"design": "balanced"}, **parts}
        stage(digits, store)
        experiment_store = ExperimentStore(store, name)
        experiment_store.register(declare_record(declare(8, name=name, **parts), digits, 4))
        if done:
            commit(experiment_store, *SHARDS)
            record_end(experiment_store, digits)
        return experiment_store

    return submitted


def record_end(experiment_store, digits):
    """Publish all trials, and record the end, as the aggregator does."""
    aggregation = Aggregation(experiment_store, experiment_store.read_record(), digits, Pace(1, 1, first_at_once=True))
    aggregation.accumulate_new()
    aggregation.publish()
    assert aggregation.finish()


def age(store, hours, *prefixes):
    """Make objects older."""
    for prefix in prefixes:
        for key in store.list(prefix):
            os.utime(store.root / key, (time.time() - 3600 * hours,) * 2)


def test_remove_shows_what_it_frees_and_asks(call, store, submit):
    submit()
    store.put(keys.model("done", 0), b"1")
    before = list(store.list(""))
    text = call("remove", "done", code=1, answer="n\n")
    assert f"{'trial batches':<15} {2:>8} objects" in text
    assert f"{'models':<15} {1:>8} object " in text
    assert "total" in text
    assert f"remove experiment done from {store.address}?" in text
    assert list(store.list("")) == before
    assert "done is removed" in call("remove", "done", answer="y\n")
    assert not list(store.list("experiments/"))
    assert list(store.list("datasets/"))


def test_a_running_experiment_is_removed_only_once_it_is_cancelled(call, store, submit):
    experiment_store = submit(done=False)
    with pytest.raises(StoreError, match="'done' is running: stop it first with memtail cancel done"):
        call("remove", "done", "--yes")
    call("cancel", "done")
    call("remove", "done", "--yes")
    assert not experiment_store.is_registered()
    with pytest.raises(ObjectNotFound, match="there is nothing of an experiment 'done'"):
        call("remove", "done", "--yes")
    with pytest.raises(ObjectNotFound, match=r"there is nothing of an experiment '\.\./x'"):
        call("remove", "../x", "--yes")


@pytest.mark.parametrize("written", [1, 2, 5])
def test_an_interrupted_removal_trains_nothing_and_is_completed_by_another(call, store, submit, monkeypatch, written):
    submit()
    planned = retention.planned_removal(store, "done")
    retention._delete(store, planned[:written])  # and the command is killed
    assert not ExperimentStore(store, "done").is_registered()
    call("remove", "done", "--yes")
    assert not list(store.list("experiments/"))


class HookedStore(LocalStore):
    """A store in which another client acts after a number of deletions."""

    after = 0
    act: Callable[[], object] | None = None

    def delete(self, key):
        super().delete(key)
        self.after -= 1
        if self.act and self.after == 0:
            self.act()


@pytest.mark.parametrize("deleted", ["the record", "all planned objects", "the change marker"])
def test_an_experiment_that_is_submitted_again_while_it_is_removed_is_kept(store, submit, deleted):
    submit()
    planned = retention.planned_removal(store, "done")
    hooked = HookedStore(store.root)
    hooked.after = {"the record": 1, "all planned objects": len(planned), "the change marker": len(planned) + 1}[deleted]
    hooked.act = lambda: submit(done=False)
    with pytest.raises(StoreError, match="'done' was submitted again while it was removed, and is kept: see memtail status done"):
        retention.remove(hooked, "done", planned)
    experiment_store = ExperimentStore(store, "done")
    assert experiment_store.is_registered()
    assert change_tags(store).keys() == {"done"}


def test_an_experiment_that_is_submitted_again_before_the_confirmation_is_not_removed(store, submit):
    submit()
    planned = retention.planned_removal(store, "done")
    retention.remove(store, "done", planned)
    submit(done=False)
    with pytest.raises(StoreError, match="'done' is running: stop it first with memtail cancel done"):
        retention.remove(store, "done", planned)
    assert ExperimentStore(store, "done").is_registered()


def test_an_experiment_whose_record_is_damaged_can_be_removed(call, store, submit):
    submit()
    store.put(keys.experiment("done"), b"{")
    call("remove", "done", "--yes")
    assert not list(store.list("experiments/"))


def test_archive_keeps_scores_and_report_and_nothing_is_trained_again(call, store, submit):
    experiment_store = submit()
    record = experiment_store.read_record()
    folder = store.root / "experiments" / "done"
    before = load_scores(folder)
    influence = before.influence(train=[0, 1], test=slice(0, 5)).value
    call("archive", "done", code=1, answer="n\n")
    assert experiment_store.committed() == SHARDS
    store.put(keys.model("done", 0), b"1")
    assert "done is archived" in call("archive", "done", "--yes")
    assert store.exists(keys.model("done", 0))
    assert [(each.action, each.details) for each in recorded_actions(store, "done")] == [("archive", "2 objects removed")]
    assert not experiment_store.committed()
    assert still_finished(experiment_store, record).archived
    assert experiment_store.missing(record) == []
    after = load_scores(folder)
    assert (after.summary, after.influence(train=[0, 1], test=slice(0, 5)).value.tolist()) == (before.summary, influence.tolist())
    assert "archived" in call("status")
    assert progress_of(store, "done").ending == "published"
    call("archive", "done", "--yes")  # again: nothing is left to remove
    assert "open again: missing trials are trained" in call("resume", "done")
    assert experiment_store.missing(record) == SHARDS


@pytest.mark.parametrize("finished_again", [False, True])
def test_archive_removes_nothing_of_an_experiment_that_is_resumed_at_the_same_time(store, submit, digits, monkeypatch, finished_again):
    experiment_store = submit()
    planned = retention.planned_archival(store, "done")

    def resumed_before(finished, **changes):
        experiment_store.reopen("resumed")
        if finished_again:
            record_end(experiment_store, digits)
        return replace(finished, **changes)

    monkeypatch.setattr("memtail.execution.retention.replace", resumed_before)
    with pytest.raises(StoreError, match="'done' was changed meanwhile: look at memtail status done, then archive it again"):
        retention.archive(store, "done", planned)
    assert experiment_store.committed() == SHARDS
    end = experiment_store.finished(experiment_store.read_record())
    assert (end is not None, end and end.archived) == (finished_again, None)


def test_archive_refuses_what_its_scores_do_not_replace(call, store, submit):
    experiment_store = submit("open", done=False)
    with pytest.raises(StoreError, match="'open' is not finished, so its trial batches are needed"):
        call("archive", "open", "--yes")
    experiment_store = submit()
    version = experiment_store.finished(experiment_store.read_record()).version
    store.delete(keys.scores("done", version) + "statistics.npz")
    with pytest.raises(ScoresError, match=r"statistics\.npz is missing: remove .*latest\.json, then memtail resume done"):
        call("archive", "done", "--yes")
    store.delete(keys.latest_scores("done"))
    with pytest.raises(ScoresError, match="the scores of experiment 'done' are missing"):
        call("archive", "done", "--yes")
    assert experiment_store.committed() == SHARDS


def test_gc_removes_what_no_experiment_needs_after_a_day(call, store, submit, digits):
    submit()
    store.put("datasets/" + 64 * "a" + "/manifest.json", b"{}")
    store.put("datasets/" + 64 * "a" + "/train_images.npy", b"123")
    store.put(keys.masks(64 * "b"), b"1")
    store.put(keys.weights(64 * "b"), b"1")
    store.put(keys.checkpoint("done", 0, 3), b"12")
    store.put(keys.checkpoint("removed", 0, 3), b"12")
    assert "nothing to remove" in call("gc")
    age(store, 25, "datasets/", "masks/", "weights/", "experiments/")
    store.put(keys.masks(64 * "c"), b"1")
    store.put(keys.weights(64 * "c"), b"1")
    before = list(store.list(""))
    text = call("gc", code=1, answer="n\n")
    assert list(store.list("")) == before
    for kind, count in {"datasets": 2, "masks": 1, "weights": 1, "checkpoints": 2, "total": 6}.items():
        assert f"{kind:<15} {count:>8}" in text
    call("gc", "--yes")
    gone = [key for key in before if key not in set(store.list(""))]
    assert len(gone) == 6
    assert fetch(store, digits.fingerprint, store.root.parent / "cache").n_train == digits.n_train
    assert "nothing to remove" in call("gc")
    call("gc", "--older-than", 0, "--yes")
    assert not [*store.list("masks/"), *store.list("weights/")]


def test_gc_keeps_checkpoints_that_shards_continue_from(call, store, submit):
    experiment_store = submit("open", done=False)
    commit(experiment_store, SHARDS[0])
    for shard in SHARDS:
        store.put(keys.checkpoint("open", shard.first, shard.last), b"state")
    age(store, 25, "experiments/")
    call("gc", "--yes")
    assert list(store.list(keys.checkpoints("open"))) == [keys.checkpoint("open", 4, 7)]
    experiment_store.set_control(Control("cancelled"))
    assert "nothing to remove" in call("gc")


def test_gc_keeps_checkpoints_of_second_trainings_until_the_shard_is_verified(call, store, submit):
    experiment_store = submit("open", done=False)
    commit(experiment_store, SHARDS[0])
    for shard in SHARDS:
        store.put(keys.checkpoint("open", shard.first, shard.last, second=True), b"state")
    age(store, 25, "experiments/")
    assert "nothing to remove" in call("gc")
    store.put(keys.replica("open", 0, 3, "equal"), b"{}")
    call("gc", "--yes")
    assert list(store.list(keys.checkpoints("open"))) == [keys.checkpoint("open", 4, 7, second=True)]


def test_gc_leaves_a_dataset_that_has_come_to_be_needed(store, submit, digits):
    stage(digits, store)
    age(store, 25, "datasets/")
    planned = retention.planned_collection(store, 3600)
    assert planned[0].key.endswith("/manifest.json")
    submit(done=False)
    retention.collect(store, planned)
    assert set(store.list("datasets/")) == {each.key for each in planned}


@pytest.mark.parametrize("completed", [False, True])
def test_gc_leaves_a_dataset_that_is_staged_again(store, digits, completed):
    """An interrupted staging is made up for while `gc` waits for its confirmation."""
    stage(digits, store)
    manifest = keys.dataset(digits.fingerprint, "manifest.json")
    store.delete(manifest)
    age(store, 25, "datasets/")
    planned = retention.planned_collection(store, 3600)
    assert planned
    if completed:
        stage(digits, store)
    else:  # another file of it has been uploaded again
        store.put(planned[-1].key, store.get(planned[-1].key))
    retention.collect(store, planned)
    assert set(store.list("datasets/")) == {each.key for each in planned} | ({manifest} if completed else set())


def test_a_dataset_that_is_staged_while_gc_removes_it_can_be_staged_again(store, digits):
    stage(digits, store)
    age(store, 25, "datasets/")
    hooked = HookedStore(store.root)
    hooked.after, hooked.act = 2, lambda: stage(digits, store)
    retention.collect(hooked, retention.planned_collection(store, 3600))
    stage(digits, store)
    assert fetch(store, digits.fingerprint, store.root.parent / "cache").n_train == digits.n_train


def test_gc_keeps_the_weights_that_an_experiment_starts_from(call, store, submit, tmp_path):
    (tmp_path / "w.pt").write_bytes(b"weights")
    model = {"name": "resnet9", "weights": str(tmp_path / "w.pt")}
    record = submit(model=model).read_record()
    key = keys.weights(record.canonical["model"]["weights"])
    store.put(key, b"weights")
    age(store, 25, "weights/", "experiments/")
    assert "nothing to remove" in call("gc")
    call("remove", "done", "--yes")
    call("gc", "--yes")
    assert not store.exists(key)


def test_gc_leaves_masks_and_checkpoints_that_were_written_again(store, submit):
    experiment_store = submit(done=False)
    for key in (masks := keys.masks(64 * "b"), checkpoint := keys.checkpoint("done", 0, 3), useless := keys.checkpoint("done", 4, 7)):
        store.put(key, b"1")
    commit(experiment_store, *SHARDS)
    age(store, 25, "masks/", "experiments/")
    planned = retention.planned_collection(store, 3600)
    assert {each.key for each in planned} == {masks, checkpoint, useless}
    experiment_store.discard(SHARDS[0], "bad")
    store.put(checkpoint, b"2")
    store.put(masks, b"1")
    retention.collect(store, planned)
    assert store.exists(masks)
    assert store.exists(checkpoint)
    assert not store.exists(useless)


def test_gc_removes_nothing_while_an_experiment_cannot_be_read(call, store, submit):
    submit()
    age(store, 25, "datasets/")
    store.put(keys.experiment("done"), b"{")
    with pytest.raises(StoreError, match="an object of experiment 'done' is damaged, so it is unknown which datasets it needs"):
        call("gc", "--yes")
    assert list(store.list("datasets/"))
