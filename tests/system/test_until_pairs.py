"""Runs that end once the selected pairs are as stable as the experiment asks for."""

import json

import pytest
import yaml

import memtail
from memtail.estimators.overlap import expected_pair_overlap
from memtail.execution.submit import submit
from memtail.experiment_store import ExperimentStore
from memtail.spec import Experiment
from tests.support import inline
from tests.support.cli import batches, same_files, version

# Each test example is influenced by one training example of its class.
TRAIN = """
import numpy as np
import memtail

def train(task):
    data, rng, fixed = task.dataset, np.random.default_rng(task.seed), np.random.default_rng(0)
    members = np.zeros(data.n_train, bool)
    members[task.subset] = True
    source = [np.flatnonzero(data.train_labels == label)[test % 8] for test, label in enumerate(data.test_labels)]
    odds = fixed.normal(0, 0.7, data.n_test) + 1.6 * fixed.exponential(1, data.n_test) * (members[source] - 0.5)
    odds += rng.normal(0, 1, data.n_test)
    train_correct = rng.random(data.n_train) < np.where(members, 0.95, 0.4)
    return memtail.Outcome(train_correct, odds > 0, train_score=train_correct / 1.0, test_score=1 / (1 + np.exp(-odds)))
"""


@pytest.fixture
def experiment(tmp_path):
    (tmp_path / "planted.py").write_text(TRAIN)
    content = {
        "name": "pairs",
        "dataset": {"name": "digits", "max_train": 200, "max_test": 100},
        "trainer": {"function": "planted:train"},
        "subsets": {"trials": 80, "until": {"pairs": {"overlap": 0.85}}},
        "record": {"scores": True},
        "execution": {"device": "cpu", "trials_per_shard": 40},
    }
    path = tmp_path / "pairs.yaml"
    path.write_text(yaml.safe_dump(content))
    return Experiment.load(path)


def test_a_run_ends_with_stable_pairs_after_the_trials_of_one_that_was_extended(experiment, tmp_path):
    with inline.training():
        scores = memtail.run(experiment, tmp_path / "store").scores
    packed, labels = scores.statistics, (scores.train_labels, scores.test_labels)
    assert 80 < packed.trials < 800
    assert expected_pair_overlap(packed, *labels) >= 0.85
    assert expected_pair_overlap(packed.select(packed.counted_trials[:80]), *labels) < 0.85
    trained = [(batch.name, batch.stat().st_mtime_ns) for batch in batches(tmp_path / "store", "pairs")]
    memtail.run(experiment, tmp_path / "store")
    assert [(batch.name, batch.stat().st_mtime_ns) for batch in batches(tmp_path / "store", "pairs")] == trained
    without = experiment.model_copy(update={"subsets": experiment.subsets.model_copy(update={"until": None})})
    with inline.training():
        assert memtail.run(without, tmp_path / "longer").scores.statistics.trials == 80
        memtail.run(experiment, tmp_path / "longer")
    assert same_files(version(tmp_path / "longer", "pairs"), version(tmp_path / "store", "pairs"))


@pytest.mark.slow
def test_the_services_end_with_stable_pairs_after_the_trials_of_an_embedded_run(cluster, experiment, expected, tmp_path):
    scores = expected(experiment)
    submit(experiment, cluster.store)
    for service in ("dispatcher", "aggregator", "worker"):
        cluster.start(service, MEMTAIL_CODE=str(tmp_path))
    experiment_store = ExperimentStore(cluster.store, experiment.name)
    cluster.until_published(experiment_store, json.loads(scores["summary.json"])["trials"])
    assert cluster.scores(experiment.name) == scores
    assert not experiment_store.attempts()
