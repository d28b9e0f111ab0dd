"""Studies of an experiment whose trainer is a function."""

import pytest
import yaml

from memtail.storage.local import LocalStore
from memtail.studies.result import load_results
from tests.support.arrays import write_arrays
from tests.support.cli import command

# A model that is right on its subset, on most other examples, and on a test example if a training example is in the subset.
TRAIN = """
import numpy as np
import memtail

def train(task):
    correct = np.random.default_rng(task.seed).random(task.dataset.n_train) < np.linspace(0.2, 1, task.dataset.n_train)
    correct[task.subset] = True
    test = np.isin(np.arange(task.dataset.n_test), task.subset)
    return memtail.Outcome(train_correct=correct, test_correct=test)
"""


@pytest.fixture(scope="module")
def folder(own_cache, tmp_path_factory):
    """A folder with the code and the store of two experiments of 120 trials."""
    folder = tmp_path_factory.mktemp("studies")
    (folder / "code").mkdir()
    (folder / "code" / "own.py").write_text(TRAIN)
    for number, name in enumerate(("one", "other")):
        content = {
            "name": name,
            "dataset": {"name": "arrays", "root": str(write_arrays(folder / "arrays.npz"))},
            "trainer": {"function": "own:train", "folder": "code"},
            "subsets": {"trials": 120, "fraction": 0.5, "seed": number},
            "execution": {"device": "cpu", "trials_per_shard": 60},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
        done = command("run", folder / f"{name}.yaml", "--store", folder / "store", "--json")
        assert done.returncode == 0, done.stderr
    return folder


def study(folder, name, *arguments):
    return command("study", name, "one", *arguments, "--store", folder / "store")


def result_of(folder, name):
    return {result.study: result for result in load_results(LocalStore(folder / "store"), "one")}[name]


def test_removal_trains_by_the_function_and_loses_what_the_removed_examples_gave(folder):
    done = study(folder, "removal", "--theta", "0.5", "--repeats", "2")
    assert done.returncode == 0, done.stderr
    (loss,) = result_of(folder, "removal").measured["losses"]
    assert loss["memorized"]["value"] > 0


def test_stability_and_architectures_need_no_built_in_trainer(folder):
    assert study(folder, "stability").returncode == 0
    done = study(folder, "architectures", "other")
    assert done.returncode == 0, done.stderr
    assert "one (own:train, 120 trials)" in done.stdout


@pytest.mark.parametrize("name", ["last-layer", "duplicates"])
def test_a_study_of_features_refuses_it_in_one_line(folder, name):
    done = study(folder, name)
    assert done.returncode == 2
    assert f"the study {name} needs a model of the built-in trainer" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_study_trains_by_the_code_as_it_was(folder, monkeypatch):
    arguments = "removal", "--theta", "0.3", "--repeats", "2"
    (folder / "code").rename(folder / "moved")  # as on another machine
    monkeypatch.setenv("MEMTAIL_CODE", str(folder / "moved"))
    (folder / "moved" / "own.py").write_text(TRAIN + "# changed")
    done = study(folder, *arguments)
    assert done.returncode == 2
    assert "differs: digest" in done.stderr
    (folder / "moved" / "own.py").write_text(TRAIN)
    assert study(folder, *arguments).returncode == 0
