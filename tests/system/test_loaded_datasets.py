"""Datasets that code or files of the submitting machine load: services train them without either."""

import pytest
import yaml

from memtail.execution.submit import submit
from memtail.experiment_store import ExperimentStore
from memtail.spec import Experiment

TRIALS = 32

LOAD = """
from sklearn.datasets import load_digits

def load(most):
    with open(__file__ + ".calls", "a") as calls:
        calls.write(".")
    x, y = load_digits(return_X_y=True)
    images = (x * 15).astype("uint8").reshape(-1, 8, 8)
    return dict(train_images=images[:most], train_labels=y[:most], test_images=images[most:], test_labels=y[most:])
"""


@pytest.fixture
def experiment(tmp_path):
    """An experiment on a dataset of the function `data:load` in its folder."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "data.py").write_text(LOAD)
    content = {
        "name": "loaded",
        "dataset": {"function": "data:load", "options": {"most": 300}, "max_test": 100},
        "model": {"name": "mlp", "hidden": [8]},
        "training": {"epochs": 2},
        "subsets": {"trials": TRIALS},
        "execution": {"device": "cpu", "trials_per_shard": 8},
    }
    path = tmp_path / "code" / "loaded.yaml"
    path.write_text(yaml.safe_dump(content))
    return Experiment.load(path)


def test_workers_train_what_a_function_has_loaded_where_it_was_submitted(living, experiment, expected, tmp_path):
    scores = expected(experiment)
    submit(experiment, living.store)
    assert (tmp_path / "code" / "data.py.calls").read_text() == "."
    (tmp_path / "code").rename(tmp_path / "away")  # as on another machine
    living.until_published(ExperimentStore(living.store, experiment.name), TRIALS)
    assert living.scores(experiment.name) == scores
    assert not ExperimentStore(living.store, experiment.name).attempts()
    assert (tmp_path / "away" / "data.py.calls").read_text() == "."
