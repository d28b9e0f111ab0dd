"""Registration, extension, missing shards, attempts and control."""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtail.errors import ForeignObjectError, StoreError, UnsupportedError
from memtail.experiment_store import Control, ExperimentStore, Origin, Record, missing_shards
from memtail.spec import Experiment
from memtail.storage import ObjectNotFound, keys
from memtail.storage.local import LocalStore
from memtail.trials import Shard
from tests.support.batches import random_batch


@given(trials=st.integers(1, 200), size=st.integers(1, 70), done=st.sets(st.integers(0, 250), max_size=60))
@settings(max_examples=100, deadline=None)
def test_missing_shards_are_exactly_the_missing_trials_cut_at_the_grid(trials, size, done):
    missing = missing_shards(trials, size, [Shard(trial, trial) for trial in done])
    assert [trial for shard in missing for trial in shard.trials] == sorted(set(range(trials)) - done)
    assert all(shard.first // size == shard.last // size for shard in missing)


def test_a_shard_that_ends_beyond_the_last_trial_does_not_count_as_committed():
    assert missing_shards(6, 4, [Shard(0, 3), Shard(4, 7)]) == [Shard(4, 5)]


def record(trials=100, **training):
    spec = {"name": "e", "dataset": {"name": "digits"}, "training": training, "subsets": {"trials": trials}}
    experiment = Experiment.parse(spec)
    return Record(experiment, experiment.fingerprint("d"), experiment.canonical("d"), 10, 5, 7).decided()


@pytest.fixture
def experiment_store(tmp_path):
    return ExperimentStore(LocalStore(tmp_path), "e")


def test_an_experiment_is_registered_once_and_read_back(experiment_store):
    assert experiment_store.register(record()) == record()
    assert experiment_store.register(record()) == experiment_store.read_record() == record()


def test_another_experiment_under_the_name_is_refused_and_differences_are_named(experiment_store):
    experiment_store.register(record())
    with pytest.raises(StoreError, match=r"'e' is in the store with fingerprint .* \(training\.epochs 20 -> 3\): choose another name"):
        experiment_store.register(record(epochs=3))


def test_more_trials_extend_an_experiment_on_its_own_grid_and_fewer_are_refused(experiment_store):
    experiment_store.register(record())
    longer = experiment_store.register(dataclasses.replace(record(200), trials_per_shard=50))
    assert longer.experiment.subsets.trials == 200
    assert longer.trials_per_shard == 7
    assert experiment_store.read_record() == longer
    with pytest.raises(StoreError, match="with 200 trials, this spec has 100"):
        experiment_store.register(record(100))


def test_a_name_with_trials_of_a_removed_experiment_is_refused_and_trials_of_the_same_one_are_counted(experiment_store):
    kept = replace(record(), n_train=13)
    batch = random_batch()[0]
    batch = replace(batch, provenance=replace(batch.provenance, fingerprint=kept.fingerprint))
    experiment_store.register(kept)
    assert experiment_store.commit(batch, kept.fingerprint)
    experiment_store.store.delete(keys.experiment("e"))
    with pytest.raises(StoreError, match=r"trials of another experiment 'e', .* are left in .*: memtail remove e, or choose another name"):
        experiment_store.register(record(epochs=3))
    assert not experiment_store.is_registered()
    experiment_store.register(kept)
    assert experiment_store.committed() == [Shard(10, 12)]


def test_a_batch_whose_trials_differ_from_its_name_is_refused_and_foreign_files_are_ignored(experiment_store):
    batch = random_batch()[0]
    held = dataclasses.replace(experiment_store.register(record()), fingerprint="f", n_train=13)
    assert experiment_store.commit(batch, "f")
    assert not experiment_store.commit(batch, "f")
    assert experiment_store.committed() == [Shard(10, 12)]
    assert experiment_store.batch(Shard(10, 12), held).shard == Shard(10, 12)
    with pytest.raises(StoreError, match="belongs to another experiment"):
        experiment_store.commit(batch, "g")
    experiment_store.store.put("experiments/e/trials/00000000-00000002.npz", batch.to_bytes())
    experiment_store.store.put("experiments/e/trials/notes.txt", b"")
    assert experiment_store.committed() == [Shard(0, 2), Shard(10, 12)]
    with pytest.raises(StoreError, match=r"00000000-00000002\.npz: holds other trials than its name says"):
        experiment_store.batch(Shard(0, 2), held)
    with pytest.raises(ForeignObjectError, match="of a dataset of another size"):
        experiment_store.batch(Shard(10, 12), dataclasses.replace(held, n_test=6))
    with pytest.raises(ForeignObjectError, match="the experiment has 100 trials"):
        experiment_store.batch(Shard(10**9, 10**9), held)
    experiment_store.store.put("experiments/e/trials/00000003-00000004.npz", b"0" * (2 << 20))
    with pytest.raises(ForeignObjectError, match="has 2097152 bytes, more than the"):
        experiment_store.batch(Shard(3, 4), held)


@pytest.mark.parametrize("data", [b"{", b'"x"', b"{}", b'{"schema": 7}'])
def test_a_damaged_record_is_named(experiment_store, data):
    experiment_store.store.put("experiments/e/experiment.json", data)
    with pytest.raises(StoreError, match=r"experiment\.json: (is corrupt|has schema)"):
        experiment_store.read_record()


def test_a_name_that_is_not_a_valid_key_is_reported_as_missing(tmp_path):
    for name in ("", "../d", "a/b"):
        with pytest.raises(StoreError, match=f"there is no experiment '{name}'"):
            ExperimentStore(LocalStore(tmp_path), name).read_record()


def test_failures_are_kept_and_counted(experiment_store):
    first = experiment_store.record_failure(Shard(0, 6), "boom", "trace", "now")
    second = experiment_store.record_failure(Shard(0, 6), "boom again", "trace", "later")
    assert (first.attempt, second.attempt) == (1, 2)
    assert [failure.error for failure in experiment_store.failures()] == ["boom", "boom again"]


def test_a_failure_names_its_process_and_records_of_0_1_0_name_none(experiment_store):
    origin = Origin(node="rack-3", host="worker-7", device="cuda:1", memtail="0.2.0", torch="2.11.0")
    experiment_store.record_failure(Shard(0, 6), "boom", origin=origin)
    old = {"attempt": 1, "error": "boom", "traceback": "", "when": "now"}
    experiment_store.store.put("experiments/e/failures/00000007-00000013/1.json", json.dumps(old).encode())
    assert [failure.origin for failure in experiment_store.failures()] == [origin, Origin()]


def test_failures_of_one_shard_are_read_without_the_others(experiment_store):
    for shard in (Shard(0, 6), Shard(7, 13), Shard(0, 6)):
        experiment_store.record_failure(shard, "boom")
    assert [failure.attempt for failure in experiment_store.failures(Shard(0, 6))] == [1, 2]
    assert not list(experiment_store.failures(Shard(14, 20)))


@pytest.mark.parametrize(("state", "after"), [("paused", "running"), ("running", "running"), ("cancelled", "cancelled")])
def test_a_retry_clears_failures_and_ends_a_pause_that_they_caused(experiment_store, state, after):
    experiment_store.record_failure(Shard(0, 6), "boom")
    experiment_store.set_control(Control(state, priority=3, tripped=True))
    assert experiment_store.retry() == 1
    assert experiment_store.control() == Control(after, priority=3)
    experiment_store.set_control(Control("paused"))
    experiment_store.retry()
    assert experiment_store.control() == Control("paused")


def changed(change):
    content = json.loads(record().to_bytes())
    change(content)
    return json.dumps(content).encode()


def test_unknown_settings_of_speed_and_unknown_fields_of_a_record_are_ignored(experiment_store):
    def add(content):
        content["experiment"]["execution"].update(compile="auto", workers={"max": 2, "zone": "a"})
        content["later"] = 1

    experiment_store.store.put("experiments/e/experiment.json", changed(add))
    held = experiment_store.read_record()
    held.check_trainable()
    assert held.experiment.execution.workers.max == 2
    execution = held.experiment.execution.model_copy(update={"workers": None})
    assert replace(held, experiment=held.experiment.model_copy(update={"execution": execution}), later={}) == record()


def test_settings_of_speed_of_a_later_version_survive_an_extension(experiment_store):
    def add(content):
        content["experiment"]["execution"].update(clocks="auto", workers={"max": 2, "zone": "a"})

    experiment_store.store.put("experiments/e/experiment.json", changed(add))
    held = experiment_store.read_record()
    experiment_store.register(held.with_trials(held.experiment.subsets.trials + 1))  # as a round of `until`
    submitted = record().with_trials(held.experiment.subsets.trials + 2)
    experiment_store.register(replace(submitted, experiment=submitted.experiment.model_copy()))  # as a client of this version
    execution = json.loads(experiment_store.store.get("experiments/e/experiment.json"))["experiment"]["execution"]
    assert execution["clocks"] == "auto"
    assert execution["workers"]["zone"] == "a"
    assert experiment_store.read_record().experiment.subsets.trials == held.experiment.subsets.trials + 2


def test_a_toleration_with_a_value_in_a_record_of_an_earlier_version_tolerates_that_value(experiment_store):
    tolerations = [{"key": "gpu", "operator": "Exists", "value": "a100", "effect": None}, {"key": "spot", "operator": "Exists"}]
    workers = {"tolerations": tolerations}
    data = changed(lambda content: content["experiment"]["execution"].update(workers=workers))
    experiment_store.store.put("experiments/e/experiment.json", data)
    read = experiment_store.read_record().experiment.execution.workers.tolerations
    assert [(each.key, each.operator, each.value) for each in read] == [("gpu", "Equal", "a100"), ("spot", "Exists", None)]


def test_an_unknown_part_of_the_recipe_is_not_supported(experiment_store):
    experiment_store.store.put("experiments/e/experiment.json", changed(lambda content: content["experiment"]["training"].update(new=1)))
    with pytest.raises(UnsupportedError, match=r"unknown key 'training\.new'.*: memtail .* cannot read this experiment: use the version"):
        experiment_store.read_record()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content["canonical"].update(recipe_version=3), "it has recipe 3, and memtail .* trains recipe 2"),
        (lambda content: content["canonical"]["training"].update(epochs=7), r"another declaration .*training\.epochs 7 -> 20"),
        (lambda content: content["canonical"].update(trainer="new"), "another declaration .*trainer"),
    ],
)
def test_another_recipe_is_read_but_not_trained(experiment_store, change, reason):
    experiment_store.store.put("experiments/e/experiment.json", changed(change))
    with pytest.raises(UnsupportedError, match=reason):
        experiment_store.read_record().check_trainable()


def test_attempts_are_counted_also_if_two_fail_at_once_and_cleared_on_request(experiment_store):
    for shard in (Shard(0, 6), Shard(0, 6), Shard(7, 13)):
        experiment_store.record_failure(shard, "boom", "", "now")
    assert experiment_store.attempts() == {Shard(0, 6): 2, Shard(7, 13): 1}
    assert experiment_store.clear_failures(Shard(0, 6)) == 2
    assert experiment_store.attempts() == {Shard(7, 13): 1}
    assert experiment_store.clear_failures() == 1
    assert not experiment_store.attempts()


def test_control_is_running_by_default_and_a_corrupt_one_is_named(experiment_store):
    assert experiment_store.control() == Control("running", 0)
    experiment_store.set_control(Control("paused", 5))
    assert experiment_store.control() == Control("paused", 5)
    experiment_store.store.put("experiments/e/control.json", b'{"state": "walking"}')
    with pytest.raises(StoreError, match=r"control\.json: is corrupt"):
        experiment_store.control()


def test_an_experiment_is_extended_and_never_shrinks(experiment_store):
    experiment_store.register(record(100))
    assert experiment_store.extend(150).experiment.subsets.trials == 150 == experiment_store.read_record().experiment.subsets.trials
    assert experiment_store.extend(120).experiment.subsets.trials == 150


class InterruptedStore(LocalStore):
    """A store in which another client makes a change between the next read of an object and the write that follows."""

    def __init__(self, root):
        super().__init__(root)
        self.interruption = None

    def _interrupt(self, result):
        interruption, self.interruption = self.interruption, None
        if interruption:
            interruption()
        return result

    def get(self, key, limit=None):
        return self._interrupt(super().get(key, limit))

    def get_tagged(self, key, limit=None):
        try:
            return self._interrupt(super().get_tagged(key, limit))
        except ObjectNotFound:
            self._interrupt(None)
            raise


@pytest.fixture
def two_clients(tmp_path):
    store = InterruptedStore(tmp_path)
    one, other = ExperimentStore(store, "e"), ExperimentStore(LocalStore(tmp_path), "e")
    one.register(record())
    return one, other


def test_of_two_submissions_at_once_no_trials_are_lost(two_clients):
    one, other = two_clients
    one.store.interruption = lambda: other.register(record(300))
    with pytest.raises(StoreError, match="with 300 trials, this spec has 200"):
        one.register(record(200))
    one.store.interruption = lambda: other.register(record(400))
    assert one.register(record(500)).experiment.subsets.trials == 500
    one.store.interruption = lambda: other.extend(900)
    assert one.extend(600).experiment.subsets.trials == 900
    assert other.read_record().experiment.subsets.trials == 900


@pytest.mark.parametrize("first", [True, False])
def test_of_two_changes_of_the_control_at_once_none_is_lost(two_clients, first):
    one, other = two_clients
    if not first:
        one.set_control(Control(priority=-1))
    one.store.interruption = lambda: other.change_control(lambda held: replace(held, priority=5))
    before, after = one.change_control(lambda held: replace(held, state="paused"))
    assert (before, after) == (Control(priority=5), Control("paused", 5))
    assert other.control() == after


def test_a_change_that_always_comes_too_late_is_given_up(two_clients):
    one, other = two_clients

    def interrupt():
        other.change_control(lambda held: replace(held, priority=held.priority + 1))
        one.store.interruption = interrupt

    one.store.interruption = interrupt
    with pytest.raises(StoreError, match=r"control\.json: others change it all the time: try again"):
        one.change_control(lambda held: replace(held, state="paused"))
    assert other.control().state == "running"


def test_many_clients_change_the_control_at_once(tmp_path):
    def count(_):
        ExperimentStore(LocalStore(tmp_path), "e").change_control(lambda held: replace(held, priority=held.priority + 1))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(count, range(40)))
    assert ExperimentStore(LocalStore(tmp_path), "e").control().priority == 40
