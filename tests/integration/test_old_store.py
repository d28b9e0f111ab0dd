"""Stores that memtail 0.1.0 wrote: counts, estimates and published files are read unchanged, and experiments are extended.

One store is kept, so that published files stay readable; others are written by the wheel of 0.1.0 as the tests need them.
"""

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
from tests.support import versions
from tests.support.cli import batches, version, write_spec

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


def without_conditions(data):
    """Remove the key of `summary.json` that 0.1.0 did not write."""
    if not isinstance(data, bytes) or b'"conditions"' not in data:
        return data
    content = json.loads(data)
    assert content.pop("conditions").keys() == {"device", "torch", "memtail"}
    return json.dumps(content, indent=1).encode()


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
    for file in ("infl_matrix.npz", "high_infl_pairs_infl0.15_mem0.25.npz", "statistics.npz", "summary.json", "memorization.csv"):
        assert without_conditions((tmp_path / "again" / file).read_bytes()) == before[file], file
    assert aggregation.next_step() is Step.PUBLISH
    aggregation.publish()
    assert {file: without_conditions(data) for file, data in published(store).items()} == before


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


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return versions.release_0_1_0(tmp_path_factory.mktemp("release"))


def test_fingerprints_are_those_of_0_1_0(release):
    dataset = {"name": "digits"}
    declarations = [
        {"name": "plain", "dataset": dataset},
        {"name": "cnn", "dataset": dataset, "model": {"name": "cnn", "channels": [4]}, "record": {"margins": True}},
        {"name": "named", "dataset": dataset, "model": {"name": "resnet9", "options": {"width": 8}}, "execution": {"device": "cpu"}},
        {"name": "until", "dataset": dataset, "subsets": {"until": {"standard_error": 0.1}, "fraction": 0.5, "design": "balanced"}},
        *(
            {"name": name, "dataset": dataset, "training": {"schedule": {"name": name}, "augmentation": "flip"}}
            for name in ("constant", "step", "cosine", "linear")
        ),
    ]
    script = """
import json, sys
from memtail.experiment import Experiment
print(json.dumps([Experiment.parse(each).fingerprint("d") for each in json.load(sys.stdin)]))
"""
    output = versions.python(release, "-c", script, text=json.dumps(declarations))
    assert [Experiment.parse(each).fingerprint("d") for each in declarations] == json.loads(output)


def test_an_experiment_that_0_1_0_has_begun_is_extended_and_finished_to_equal_bits(release, tmp_path):
    spec = write_spec(tmp_path, subsets={"trials": 40})
    versions.python(release, "-m", "memtail", "run", spec, "--store", tmp_path / "begun")
    # as after a kill: the middle shard is missing, and nothing is published
    kept = batches(tmp_path / "begun")
    kept.pop(3).unlink()
    shutil.rmtree(tmp_path / "begun" / "experiments" / "digits" / "scores")
    held = [path.read_bytes() for path in kept]
    spec = write_spec(tmp_path, subsets={"trials": 60})
    for store in ("begun", "alone"):
        memtail.run(Experiment.load(spec), tmp_path / store)
    assert [path.read_bytes() for path in kept] == held
    begun, alone = version(tmp_path / "begun"), version(tmp_path / "alone")
    names = sorted(path.name for path in alone.iterdir())
    assert sorted(path.name for path in begun.iterdir()) == names
    for name in names:
        assert without_conditions((begun / name).read_bytes()) == without_conditions((alone / name).read_bytes()), name


def test_what_this_version_writes_without_later_keys_is_read_by_0_1_0(release, tmp_path):
    spec = write_spec(tmp_path, subsets={"trials": 40})
    memtail.run(Experiment.load(spec), tmp_path / "store")
    held = batches(tmp_path / "store")
    output = versions.python(release, "-m", "memtail", "run", spec, "--store", tmp_path / "store")
    assert "40" in output
    assert batches(tmp_path / "store") == held
