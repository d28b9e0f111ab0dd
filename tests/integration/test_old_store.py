"""Stores that memtail 0.1.0 wrote: counts, estimates and published files are read unchanged, and experiments are extended.

The store is kept in tests/fixtures. tests/system/test_release_0_1_0.py runs that release itself.
"""

import io
import json
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

OLD = Path(__file__).parents[1] / "fixtures" / "store-0.1.0"
ERRORS = ("mem_se", "mem_lo", "mem_hi", "infl_se", "infl_lo", "infl_hi")


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
    """Without standard errors and intervals, which 0.1.0 computed from the observed rates, or not at all."""
    table = pq.read_table(pa.BufferReader(data)).to_pydict()
    return repr({name: values for name, values in table.items() if name not in ERRORS})  # as text: NaN is unequal to itself


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
    for column, values in {"mem": mem.value, "k_in": mem.k_in, "k_out": mem.k_out}.items():
        np.testing.assert_array_equal(table[column].to_numpy(), values)
    assert (table["mem_se"].to_numpy() == 0).any()
    assert (mem.standard_error > 0).all()
    (tmp_path / "again").mkdir()
    write_scores(tmp_path / "again", "old", record.fingerprint, aggregation.statistics, dataset)
    before = published(store)
    with np.load(tmp_path / "again" / "infl_matrix.npz") as again, np.load(io.BytesIO(before["infl_matrix.npz"])) as old:
        for key in old.files:
            np.testing.assert_array_equal(again[key], old[key], strict=True)
    for file in ("high_infl_pairs_infl0.15_mem0.25.npz", "statistics.npz"):
        assert (tmp_path / "again" / file).read_bytes() == before[file], file
    old_summary, summary = (json.loads(data) for data in (before["summary.json"], (tmp_path / "again" / "summary.json").read_bytes()))
    assert {key for key in summary if summary[key] != old_summary.get(key)} == {
        "schema",
        "mem_se_quantiles",
        "conditions",
        "selected_pairs",
    }
    assert aggregation.next_step() is Step.PUBLISH
    aggregation.publish()
    after = published(store)
    changed = {file for file in before | after if before.get(file) != after.get(file)}
    assert changed == {"infl_matrix.npz", "memorization.csv", "pairs.parquet", "summary.json"}
    assert latest_version(store, "old").summary.schema == 2


def test_published_scores_of_an_old_store_are_read(store):
    scores = memtail.load_scores(store.root / "experiments" / "old")
    assert scores.summary.trials == 24
    assert len(scores.most_memorized(5)["mem"]) == 5
    assert "mem_lo" not in scores.memorization
    assert scores.selected_pairs is None
    assert scores.summary.selected_pairs is None
    assert "infl_lo" not in scores.pairs
    mem = memorization(scores.statistics)
    np.testing.assert_array_equal([scores.mem_lo, scores.mem_hi], mem.interval)
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
