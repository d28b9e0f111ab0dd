"""Services that train by a function of the user's."""

import pytest
import yaml

from memtail.execution.progress import progress_of
from memtail.execution.submit import submit
from memtail.experiment_store import ExperimentStore
from memtail.spec import Experiment, RecordedOutcomes
from memtail.storage import keys

TRIALS = 32

TRAIN = """
import numpy as np
import memtail

def train(task):
    images, labels = (np.asarray(part) for part in (task.dataset.train_images, task.dataset.train_labels))
    means = np.stack([images[task.subset][labels[task.subset] == label].mean(0) for label in range(10)]).reshape(10, -1)
    outcomes = {}
    for split in ("train", "test"):
        data = np.asarray(getattr(task.dataset, split + "_images")).astype(float)
        predicted = (((data.reshape(len(data), 1, -1) - means) ** 2).sum(2)).argmin(1)
        outcomes[split + "_correct"] = predicted == getattr(task.dataset, split + "_labels")
    return memtail.Outcome(**outcomes, train_labels=labels, metrics={"loss": 0.5, "seed": task.seed % 97})
"""


@pytest.fixture
def experiment(tmp_path):
    """An experiment whose function is in the folder `code`; in the folder `other` it was changed since."""
    for folder, text in (("code", TRAIN), ("other", TRAIN.replace("== label", "== label ") + "# changed")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "means.py").write_text(text)
    content = {
        "name": "means",
        "dataset": {"name": "digits", "max_train": 300, "max_test": 100},
        "trainer": {"function": "means:train"},
        "subsets": {"trials": TRIALS},
        "execution": {"device": "cpu", "trials_per_shard": 8},
    }
    path = tmp_path / "code" / "means.yaml"
    path.write_text(yaml.safe_dump(content))
    return Experiment.load(path)


@pytest.mark.slow
def test_a_worker_with_other_code_leaves_shards_to_one_with_the_code_which_publishes_the_bits_of_an_embedded_run(
    cluster, experiment, expected, tmp_path
):
    scores = expected(experiment)
    submit(experiment, cluster.store)
    (tmp_path / "code").rename(tmp_path / "installed")  # as on another machine
    experiment_store = ExperimentStore(cluster.store, experiment.name)
    cluster.start("dispatcher")
    cluster.start("aggregator")
    stranger = cluster.start("worker", MEMTAIL_CODE=str(tmp_path / "other"))
    cluster.until(lambda: len(list(cluster.events(stranger, "experiment not supported"))) >= 2)
    (line,) = [line for line in progress_of(cluster.store, experiment.name).lines if "training code" in line]
    assert f"that in {tmp_path / 'other'} differs: digest" in line
    assert not experiment_store.committed()
    cluster.start("worker", MEMTAIL_CODE=str(tmp_path / "installed"))
    cluster.until_published(experiment_store, TRIALS)
    assert cluster.scores(experiment.name) == scores
    assert not experiment_store.attempts()
    assert not list(cluster.store.list(keys.checkpoints(experiment.name)))
    assert not [line for line in progress_of(cluster.store, experiment.name).lines if "training code" in line]
    assert not [line for line in cluster.events(stranger, "shard ended") if '"committed"' in line or '"failed"' in line]


@pytest.mark.slow
def test_the_services_publish_scores_without_correctness_as_an_embedded_run(cluster, experiment, expected):
    folder = experiment.trainer.folder
    text = (folder / "means.py").read_text()
    scored = text.replace('split + "_correct"] = predicted ==', 'split + "_score"] = 0.2 + 0.6 * (predicted ==').replace(
        '_labels")\n', '_labels"))\n'
    )
    (folder / "means.py").write_text(scored)
    experiment = experiment.model_copy(update={"name": "scored", "record": RecordedOutcomes(scores="only")})
    scores = expected(experiment)
    submit(experiment, cluster.store)
    for service in ("dispatcher", "aggregator", "worker"):
        cluster.start(service)
    experiment_store = ExperimentStore(cluster.store, "scored")
    cluster.until_published(experiment_store, TRIALS)
    assert cluster.scores("scored") == scores
    assert b'"outcome": "score"' in scores["summary.json"]
    assert not experiment_store.attempts()
