"""`Aggregation` with random trials, without a server, on a simulated clock."""

import json
import threading

import numpy as np
import pytest

from memtail.errors import ScoresError, StoreError
from memtail.execution import aggregation as module
from memtail.execution import retention
from memtail.execution.aggregation import Aggregation, Extend, Pace, Step
from memtail.execution.declare import declare as declare_record
from memtail.execution.progress import progress_of
from memtail.execution.stopping import next_round
from memtail.experiment_store import Control, ExperimentStore
from memtail.scores.files import write_scores
from memtail.scores.pointer import latest_version
from memtail.scores.publish import publish
from memtail.storage import keys
from memtail.storage.local import LocalStore
from memtail.trials import Provenance, Shard, TrialBatch, TrialMetrics, pack

AT_ONCE = Pace(trials=1, seconds=1, first_at_once=True)


class Clock:
    """A simulated clock, advanced by the test."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Trained:
    """An experiment of shards of eight trials in a folder, whose batches the test commits."""

    def __init__(self, folder, declare, digits, trials, **subsets):
        experiment = declare(trials, execution={"trials_per_shard": 8, "device": "cpu"}, subsets={"design": "balanced", **subsets})
        self.store, self.digits, self.clock = ExperimentStore(LocalStore(folder), experiment.name), digits, Clock()
        self.record = self.store.register(declare_record(experiment, digits, 8))

    def aggregation(self, pace=AT_ONCE):
        return Aggregation(self.store, self.record, self.digits, pace, self.clock)

    def aggregation_of_all(self):
        aggregation = self.aggregation()
        aggregation.accumulate_new()
        return aggregation

    def commit(self, first, diverged=False, correct=0.5, fingerprint=None, **origin):
        rng = np.random.default_rng(first)
        trials = np.arange(first, first + 8, dtype=np.int32)
        sizes = self.record.n_train, self.record.n_train, self.record.n_test
        bits = [pack(rng.random((8, size)) < share) for size, share in zip(sizes, (0.5, correct, correct), strict=True)]
        metrics = [TrialMetrics(int(trial), diverged, 0.1, 1.0, 0.5, 0.75) for trial in trials]
        provenance = Provenance(fingerprint or self.record.fingerprint, seconds=1.0, **origin)
        counts = self.record.n_train, self.record.n_test
        batch = TrialBatch(trials, bits[0], bits[1], bits[2], *counts, metrics, provenance)
        self.store.store.put_if_absent(keys.trial_batch(self.store.name, first, first + 7), batch.to_bytes())
        return batch


@pytest.fixture
def trained(tmp_path, declare, digits):
    return lambda trials=16, **subsets: Trained(tmp_path / "store", declare, digits, trials, **subsets)


def test_every_batch_is_accumulated_once_in_any_order_and_published_scores_have_the_same_bits(trained, tmp_path):
    experiment = trained(24)
    for first in (16, 0, 8):
        experiment.commit(first)
    whole, stepwise = experiment.aggregation(), experiment.aggregation()
    whole.accumulate_new()
    for shard in reversed(stepwise.new_shards()):
        assert stepwise.accumulate(shard)
    stepwise.accumulate_new()
    assert not whole.new_shards()
    assert stepwise.trials == whole.trials == whole.total == 24
    assert whole.publish() == stepwise.publish()
    (version,) = experiment.store.store.folders(keys.all_scores("digits"))
    assert whole.pointer == stepwise.pointer
    assert whole.pointer.version == version


def test_steps_alternate_between_wait_and_publish_until_done(trained):
    experiment = trained(16)
    aggregation = experiment.aggregation(Pace(trials=1, seconds=1, first_at_once=True))
    assert aggregation.next_step() is Step.WAIT
    experiment.commit(0)
    aggregation.accumulate_new()
    assert aggregation.next_step() is Step.PUBLISH
    aggregation.publish()
    assert aggregation.next_step() is Step.WAIT
    experiment.commit(8)
    aggregation.accumulate_new()
    assert aggregation.next_step() is Step.PUBLISH
    aggregation.publish()
    assert aggregation.next_step() is Step.DONE
    assert aggregation.published


def test_before_the_end_scores_are_published_by_number_of_trials_or_by_time(trained):
    experiment = trained(64)
    aggregation = experiment.aggregation(Pace(trials=16, seconds=300, first_at_once=False))
    experiment.commit(0)
    aggregation.accumulate_new()
    assert aggregation.next_step() is Step.WAIT
    experiment.clock.now += 300
    assert aggregation.next_step() is Step.PUBLISH
    aggregation.publish()
    experiment.commit(8)
    aggregation.accumulate_new()
    assert aggregation.next_step() is Step.WAIT
    experiment.commit(16)
    aggregation.accumulate_new()
    assert aggregation.next_step() is Step.PUBLISH


def test_publishing_takes_a_tenth_of_the_time_at_most_but_the_last_version_is_immediate(trained, monkeypatch):
    experiment = trained(48)
    aggregation = experiment.aggregation()

    def slowly(*arguments):
        experiment.clock.now += 100.0
        return publish(*arguments)

    monkeypatch.setattr(module, "publish", slowly)

    def published_after(first, seconds):
        """Commit eight more trials, advance the clock, and return the number of trials in the scores."""
        experiment.commit(first)
        experiment.clock.now += seconds
        aggregation.accumulate_new()
        if aggregation.next_step() is Step.PUBLISH:
            aggregation.publish()
        return aggregation.pointer.summary.trials

    assert published_after(0, 0) == 8  # does not count
    assert published_after(8, 1) == 16
    assert published_after(16, 890) == 16
    assert published_after(24, 10) == 32
    assert published_after(32, 10) == 32
    assert published_after(40, 10) == 48


def test_code_that_the_first_publication_compiles_does_not_delay_the_second(trained, monkeypatch):
    experiment = trained(64)
    aggregation = experiment.aggregation(Pace(trials=500, seconds=60, first_at_once=True))
    durations = iter([18.0, 0.1, 0.1])

    def timed(*arguments):
        experiment.clock.now += next(durations)
        return publish(*arguments)

    monkeypatch.setattr(module, "publish", timed)
    for first in (0, 8, 16):
        experiment.commit(first)
        aggregation.accumulate_new()
        assert aggregation.next_step() is Step.PUBLISH
        aggregation.publish()
        experiment.clock.now += 60


def test_an_experiment_that_is_not_exact_enough_is_extended_before_it_is_published(trained):
    experiment = trained(8, until={"standard_error": 0.2, "quantile": 0.5})
    experiment.commit(0)
    aggregation = experiment.aggregation()
    aggregation.accumulate_new()
    step = aggregation.next_step()
    assert isinstance(step, Extend)
    aggregation.extend(step.trials)
    assert aggregation.total == step.trials > 8
    assert experiment.store.read_record().experiment.subsets.trials == step.trials
    assert aggregation.next_step() is Step.PUBLISH


def test_a_round_is_decided_once_for_the_same_trials_and_again_for_others(trained, monkeypatch):
    experiment, decided = trained(16, until={"standard_error": 0.05}), []

    def counted(subsets, statistics, *arguments):
        decided.append((subsets.trials, statistics.digest()))
        return next_round(subsets, statistics, *arguments)

    monkeypatch.setattr(module, "next_round", counted)
    for first in (0, 8):
        experiment.commit(first, correct=0.9)
    aggregation = experiment.aggregation()
    aggregation.accumulate_new()
    step = aggregation.next_step()
    assert isinstance(step, Extend)
    assert [aggregation.next_step() for _ in range(3)] == [step] * 3
    assert len(decided) == 1
    assert experiment.aggregation_of_all().next_step() == step  # as another process, or a restarted one
    experiment.store.store.delete(keys.trial_batch("digits", 8, 15))
    experiment.commit(8, correct=0.5)
    aggregation.accumulate_new()
    aggregation.next_step()
    aggregation.next_step()
    assert len(decided) == len(set(decided)) + 1 == 3
    aggregation.extend(32)
    for first in (16, 24):
        assert aggregation.next_step() is Step.PUBLISH  # no round is decided before its end
        experiment.commit(first)
        aggregation.accumulate_new()
    aggregation.next_step()
    assert [trials for trials, _ in decided] == [16, 16, 16, 32]


@pytest.mark.parametrize("damage", ["bytes", "fingerprint"])
def test_a_damaged_or_foreign_batch_is_refused_recorded_once_and_the_rest_goes_on(trained, damage):
    experiment = trained(16)
    experiment.commit(0, fingerprint="f" * 64 if damage == "fingerprint" else None)
    if damage == "bytes":
        experiment.store.store.put(keys.trial_batch("digits", 0, 7), b"no batch")
    experiment.commit(8)
    aggregation = experiment.aggregation()
    for _ in range(3):
        aggregation.accumulate_new()
    assert aggregation.trials == 8
    assert list(aggregation.refused) == [Shard(0, 7)]
    (failure,) = experiment.store.failures()
    assert failure.shard == Shard(0, 7)
    assert failure.error == aggregation.refused[Shard(0, 7)]
    assert keys.trial_batch("digits", 0, 7) in failure.error
    assert not aggregation.complete
    aggregation.publish()
    assert aggregation.next_step() is Step.WAIT

    experiment.store.store.delete(keys.trial_batch("digits", 0, 7))
    experiment.commit(0)
    aggregation.accumulate_new()
    assert not aggregation.refused
    assert aggregation.next_step() is Step.PUBLISH


def test_the_requests_for_refused_batches_grow_with_their_number_only(trained, monkeypatch):
    experiment = trained(240)
    for first in range(0, 240, 8):
        experiment.commit(first, fingerprint="f" * 64)
    read = []
    get = LocalStore.get
    monkeypatch.setattr(LocalStore, "get", lambda store, key, limit=None: read.append(key) or get(store, key, limit))
    for restart in range(2):
        aggregation = experiment.aggregation()
        read.clear()
        aggregation.accumulate_new()
        assert len(aggregation.refused) == 30
        assert len(read) <= (1 + restart) * 30  # the batch, and after a restart its record
    assert sum(experiment.store.attempts().values()) == 30


def test_batches_are_read_at_the_same_time_but_only_a_few_ahead(trained, monkeypatch):
    experiment = trained(320)
    for first in range(0, 320, 8):
        experiment.commit(first)
    aggregation = experiment.aggregation()
    together, read = threading.Barrier(module._READERS, timeout=60), []
    get = LocalStore.get

    def read_together(store, key, limit=None):
        read.append(key)
        together.wait()
        return get(store, key, limit)

    shards = aggregation.new_shards()
    monkeypatch.setattr(LocalStore, "get", read_together)
    done = []
    for shard in aggregation.accumulate_each(shards):
        done.append(shard)
        assert len(read) - len(done) <= module._READERS
    assert done == shards
    assert aggregation.trials == 320


def test_a_batch_that_is_removed_after_the_listing_is_skipped(trained):
    experiment = trained(16)
    for first in (0, 8):
        experiment.commit(first)
    aggregation = experiment.aggregation()
    shards = aggregation.new_shards()
    experiment.store.discard(Shard(0, 7), "damaged")
    assert list(aggregation.accumulate_each(shards)) == shards
    assert aggregation.trials == 8


def test_an_experiment_whose_trials_all_diverge_is_done_without_scores(trained):
    experiment = trained(8)
    experiment.commit(0, diverged=True)
    aggregation = experiment.aggregation()
    aggregation.accumulate_new()
    assert aggregation.next_step() is Step.DONE
    with pytest.raises(ScoresError, match="diverged"):
        aggregation.publish()


def test_a_new_aggregation_reads_the_pointer_and_publishes_the_same_version(trained):
    experiment = trained(8)
    experiment.commit(0)
    first = experiment.aggregation()
    first.accumulate_new()
    first.publish()
    second = experiment.aggregation()
    assert second.pointer == first.pointer
    second.accumulate_new()
    assert second.next_step() is Step.PUBLISH
    second.publish()
    assert second.pointer == first.pointer


@pytest.mark.parametrize("restarted", [False, True])
def test_a_replaced_batch_reaches_the_published_scores(trained, tmp_path, declare, digits, restarted):
    experiment = trained(16)
    experiment.commit(0)
    experiment.commit(8, correct=0.9)
    aggregation = experiment.aggregation()
    aggregation.accumulate_new()
    aggregation.publish()
    wrong = aggregation.pointer.version
    experiment.store.store.delete(keys.trial_batch("digits", 8, 15))
    experiment.commit(8)
    if restarted:
        aggregation = experiment.aggregation()
    aggregation.accumulate_new()
    assert aggregation.next_step() is Step.PUBLISH
    aggregation.publish()

    undisturbed = Trained(tmp_path / "undisturbed", declare, digits, 16)
    undisturbed.commit(0)
    undisturbed.commit(8)
    expected = undisturbed.aggregation()
    expected.accumulate_new()
    expected.publish()
    assert aggregation.pointer.version == expected.pointer.version != wrong
    assert latest_version(experiment.store.store, "digits").version == expected.pointer.version
    for file in expected.pointer.files:
        key = keys.scores("digits", expected.pointer.version) + file
        assert experiment.store.store.get(key) == undisturbed.store.store.get(key)


def test_devices_and_versions_are_counted_and_shown_and_change_neither_version_nor_scores(trained, tmp_path, declare, digits):
    mixed, alike = trained(24), Trained(tmp_path / "alike", declare, digits, 24)
    origins = (
        {"device": "NVIDIA H100", "cpu": "x, AVX512", "torch": "2.15.0", "memtail": "0.2.0"},
        {"device": "cpu (x86_64)", "cpu": "x, AVX2", "torch": "2.15.0", "memtail": "0.1.0"},
        {"device": "b", "devices": ("a, x", "b, x"), "torch": "2.15.0"},
    )
    published = []
    for experiment, of_shards in ((mixed, origins), (alike, [origins[0]] * 3)):
        for shard, origin in enumerate(of_shards):
            experiment.commit(8 * shard, **origin)
        aggregation = experiment.aggregation()
        aggregation.accumulate_new()
        aggregation.publish()
        store, pointer = experiment.store.store, aggregation.pointer
        published.append({file: store.get(keys.scores("digits", pointer.version) + file) for file in pointer.files})
        assert latest_version(store, "digits").summary == aggregation.pointer.summary
    first, second = (json.loads(files.pop("summary.json")) for files in published)
    assert published[0] == published[1]
    assert first.pop("conditions") == {
        "device": {"NVIDIA H100, x, AVX512": 8, "a, x, then b, x": 8, "cpu (x86_64), x, AVX2": 8},
        "torch": {"2.15.0": 24},
        "memtail": {"0.1.0": 8, "0.2.0": 8, "unknown": 8},
    }
    assert second.pop("conditions")["device"] == {"NVIDIA H100, x, AVX512": 24}
    assert first == second
    shown, quiet = (progress_of(experiment.store.store, "digits") for experiment in (mixed, alike))
    assert shown.lines == ["trials of several kinds: 8 on NVIDIA H100, x, AVX512, 8 on a, x, then b, x, 8 on cpu (x86_64), x, AVX2"]
    assert shown.to_json()["conditions"]["torch"] == {"2.15.0": 24}
    assert not quiet.lines


def test_discarded_trials_leave_the_scores_at_once(trained):
    experiment = trained(16)
    experiment.commit(0)
    experiment.commit(8)
    aggregation = experiment.aggregation()
    aggregation.accumulate_new()
    aggregation.publish()
    experiment.store.discard(Shard(8, 15), "the memory of the GPU was damaged")
    aggregation.accumulate_new()
    experiment.clock.now += 1000
    assert aggregation.next_step() is Step.PUBLISH
    aggregation.publish()
    pointer = latest_version(experiment.store.store, "digits")
    assert (pointer.summary.accumulated_trials, pointer.discards) == (8, 2)
    experiment.commit(8)
    aggregation.accumulate_new()
    aggregation.publish()
    pointer = latest_version(experiment.store.store, "digits")
    assert (pointer.summary.accumulated_trials, pointer.discards) == (16, 2)


def test_trials_that_are_discarded_while_their_scores_are_written_leave_the_next_scores(trained, monkeypatch):
    experiment = trained(16)
    experiment.commit(0)
    experiment.commit(8)
    aggregation = experiment.aggregation()
    aggregation.accumulate_new()

    def discarded(*arguments):
        monkeypatch.undo()
        experiment.store.discard(Shard(8, 15), "the memory of the GPU was damaged")
        return write_scores(*arguments)

    monkeypatch.setattr("memtail.scores.publish.write_scores", discarded)
    aggregation.publish()
    aggregation.accumulate_new()
    aggregation.publish()
    pointer = latest_version(experiment.store.store, "digits")
    assert (pointer.summary.accumulated_trials, pointer.discards) == (8, 2)


def test_a_refused_batch_is_read_again_only_when_it_was_replaced(trained, monkeypatch):
    experiment = trained(16)
    experiment.commit(0, fingerprint="f" * 64)
    aggregation = experiment.aggregation()
    aggregation.accumulate_new()
    assert aggregation.refused
    assert not aggregation.new_shards()
    experiment.store.store.delete(keys.trial_batch("digits", 0, 7))
    assert not aggregation.new_shards()
    assert not aggregation.refused
    experiment.commit(0)
    assert aggregation.new_shards() == [Shard(0, 7)]


@pytest.mark.parametrize("moment", ["while the files are written", "after the pointer is read"])
def test_of_two_aggregations_the_one_with_more_trials_wins_and_its_files_stay(trained, monkeypatch, moment):
    experiment = trained(24)
    experiment.commit(0)
    older = experiment.aggregation()
    older.accumulate_new()
    experiment.commit(8)
    newer = experiment.aggregation()
    newer.accumulate_new()
    read = LocalStore.get_tagged

    def written(*arguments):
        summary = write_scores(*arguments)
        monkeypatch.undo()
        newer.publish()
        return summary

    def pointed(store, key, limit=None):
        held = read(store, key, limit)
        monkeypatch.undo()
        newer.publish()
        return held

    if moment == "while the files are written":
        monkeypatch.setattr("memtail.scores.publish.write_scores", written)
    else:
        experiment.store.store.put(keys.latest_scores("digits"), b"damaged")
        monkeypatch.setattr(LocalStore, "get_tagged", pointed)
    older.publish()
    pointer = latest_version(experiment.store.store, "digits")
    assert pointer.summary.trials == 16
    assert set(pointer.files) == {key.rpartition("/")[2] for key in experiment.store.store.list(keys.scores("digits", pointer.version))}


def test_batches_of_an_extension_by_another_process_wait_for_the_record_and_are_not_refused(trained):
    experiment = trained(16)
    experiment.commit(0)
    aggregation = experiment.aggregation()
    extended = experiment.store.extend(32)
    experiment.commit(16)
    aggregation.accumulate_new()
    assert aggregation.trials == 8
    aggregation.record = extended
    aggregation.accumulate_new()
    assert aggregation.trials == 16
    assert not aggregation.refused
    assert not list(experiment.store.failures())


def test_a_batch_that_is_replaced_between_its_count_and_the_first_listing_reaches_the_scores(trained):
    experiment = trained(16)
    experiment.commit(0)
    experiment.commit(8)
    aggregation = experiment.aggregation()
    assert aggregation.accumulate(Shard(0, 7))
    experiment.store.discard(Shard(0, 7), "the memory of the GPU was damaged")
    experiment.commit(0, correct=0.9)
    aggregation.accumulate_new()
    rebuilt = experiment.aggregation()
    rebuilt.accumulate_new()
    assert aggregation.publish() == rebuilt.publish()
    assert aggregation.statistics.digest() == rebuilt.statistics.digest()


@pytest.mark.parametrize("submitted", [False, True])
def test_scores_of_an_experiment_that_is_removed_while_they_are_written_are_not_published(trained, declare, digits, submitted):
    experiment = trained(8)
    experiment.commit(0)
    store, name = experiment.store.store, experiment.store.name

    def remove():
        if experiment.store.control() == Control("cancelled"):
            retention.remove(store, name, retention.planned_removal(store, name))
            if submitted:
                experiment.store.register(declare_record(declare(8, training={"epochs": 3}, subsets={"design": "balanced"}), digits, 8))

    experiment.store.set_control(Control("cancelled"))
    aggregation = Aggregation(experiment.store, experiment.record, digits, AT_ONCE, progress=remove)
    aggregation.accumulate_new()
    with pytest.raises(StoreError, match="another experiment has the name" if submitted else "there is no experiment"):
        aggregation.publish()
    assert list(store.list(keys.everything(name))) == [keys.experiment(name)] * submitted


def test_a_name_with_scores_of_a_removed_experiment_is_refused_for_another_one(trained, declare, digits):
    experiment = trained(8)
    experiment.commit(0)
    aggregation = experiment.aggregation()
    aggregation.accumulate_new()
    aggregation.publish()
    store, name = experiment.store.store, experiment.store.name
    for key in (keys.experiment(name), keys.trial_batch(name, 0, 7)):
        store.delete(key)
    with pytest.raises(StoreError, match=rf"scores of another experiment '{name}', .*latest\.json\): memtail remove {name}, or choose"):
        experiment.store.register(declare_record(declare(8, training={"epochs": 3}, subsets={"design": "balanced"}), digits, 8))
    assert experiment.store.register(experiment.record) == experiment.record
