"""Stores that memtail 0.1.0 wrote: counts, estimates and published files are read unchanged, and experiments are extended.

The store is kept in tests/fixtures. tests/system/test_release_0_1_0.py runs that release itself.
"""

import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import memtail
from memtail.estimators import memorization
from memtail.execution.aggregation import Aggregation, Pace, Step
from memtail.experiment_store import ExperimentStore
from memtail.scores.files import write_scores
from memtail.scores.pointer import latest_version
from memtail.spec import Experiment
from memtail.storage import keys
from memtail.storage.local import LocalStore
from tests.support.versions import without_conditions

OLD = Path(__file__).parents[1] / "fixtures" / "store-0.1.0"


@pytest.fixture
def store(tmp_path):
    shutil.copytree(OLD, tmp_path / "store")
    return LocalStore(tmp_path / "store")


@pytest.fixture
def experiment():
    return Experiment.load(OLD / "old.yaml")


def published(store):
    """The bytes of the published files; of Parquet files, whose bytes depend on the version of pyarrow, the values."""
    pointer = latest_version(store, "old")
    files = {file: store.get(keys.scores("old", pointer.version) + file) for file in pointer.files}
    return {file: columns(data) if file.endswith(".parquet") else data for file, data in files.items()}


def columns(data):
    table = pq.read_table(pa.BufferReader(data))
    return repr(table.to_pydict())  # not the dictionary: NaN is unequal to itself


def test_counts_and_estimates_from_an_old_store_have_equal_bits(store, experiment, tmp_path):
    dataset = memtail.datasets.prepare(experiment.dataset)
    experiment_store = ExperimentStore(store, "old")
    record = experiment_store.read_record()
    assert experiment.fingerprint(dataset.fingerprint) == record.fingerprint
    aggregation = Aggregation(experiment_store, record, dataset, Pace(1, 1, first_at_once=True))
    aggregation.accumulate_new()
    assert aggregation.trials == 24
    mem, table = (
        memorization(aggregation.statistics),
        pq.read_table(OLD / keys.scores("old", aggregation.pointer.version) / "memorization.parquet"),
    )
    for column, values in {"mem": mem.value, "mem_se": mem.standard_error, "k_in": mem.k_in, "k_out": mem.k_out}.items():
        np.testing.assert_array_equal(table[column].to_numpy(), values)
    (tmp_path / "again").mkdir()
    write_scores(tmp_path / "again", "old", record.fingerprint, aggregation.statistics, dataset)
    before = published(store)
    with np.load(tmp_path / "again" / "infl_matrix.npz") as again, np.load(io.BytesIO(before["infl_matrix.npz"])) as old:
        for key in old.files:
            np.testing.assert_array_equal(again[key], old[key], strict=True)
    for file in ("high_infl_pairs_infl0.15_mem0.25.npz", "statistics.npz", "summary.json", "memorization.csv"):
        assert without_conditions((tmp_path / "again" / file).read_bytes()) == before[file], file
    assert aggregation.next_step() is Step.PUBLISH
    aggregation.publish()
    after = {file: without_conditions(data) for file, data in published(store).items()}
    assert {file for file in before | after if before.get(file) != after.get(file)} == {"infl_matrix.npz"}


def test_published_scores_of_an_old_store_are_read(store):
    scores = memtail.load_scores(store.root / "experiments" / "old")
    assert scores.summary.trials == 24
    assert len(scores.most_memorized(5)["mem"]) == 5
    assert scores.influence(train=[0, 1], test=slice(0, 5)).value.shape == (2, 5)


def test_an_old_store_is_extended_without_training_a_trial_again(store, experiment):
    held = {path.name: path.read_bytes() for path in (store.root / "experiments/old/trials").iterdir()}
    more = experiment.model_copy(update={"subsets": experiment.subsets.model_copy(update={"trials": 40})})
    result = memtail.run(more, store.root)
    assert result.summary.trials == result["trials"] == 40
    batches = {path.name: path.read_bytes() for path in (store.root / "experiments/old/trials").iterdir()}
    assert {name: batches[name] for name in held} == held
    assert sorted(batches.keys() - held.keys()) == ["00000024-00000031.npz", "00000032-00000039.npz"]
    assert result.scores.summary.trials == 40


def test_a_complete_experiment_of_an_old_store_is_finished_in_the_first_pass_and_its_scores_outlive_its_batches(store, experiment):
    dataset = memtail.datasets.prepare(experiment.dataset)
    experiment_store = ExperimentStore(store, "old")
    aggregation = Aggregation(experiment_store, experiment_store.read_record(), dataset, Pace(1, 1, first_at_once=True))
    aggregation.accumulate_new()
    aggregation.publish()
    assert aggregation.finish().trials == 24
    for key in list(store.list(keys.trials("old"))):
        store.delete(key)
    assert experiment_store.missing(aggregation.record) == []
    assert memtail.load_scores(store.root / "experiments" / "old").summary.trials == 24
