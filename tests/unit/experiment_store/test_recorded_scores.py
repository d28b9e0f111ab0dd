"""Who records scores unless the declaration says so: the built-in trainer, from the first trial of an experiment on."""

import json
from dataclasses import replace

import pytest

from memtail.experiment_store import ExperimentStore, Record
from memtail.spec import Experiment
from memtail.storage import keys
from memtail.storage.local import LocalStore

IMAGENET = (1_281_167, 50_000)
CIFAR = (50_000, 10_000)


def record(size=CIFAR, trials=10, scores=None, **parts):
    recorded = {} if scores is None else {"record": {"scores": scores}}
    experiment = Experiment.parse({"name": "e", "dataset": {"name": "digits"}, "subsets": {"trials": trials}} | recorded | parts)
    trainer_code = None if "trainer" not in parts else "c" * 64
    canonical = experiment.canonical("d", trainer_code=trainer_code)
    return Record(experiment, "f" * 64, canonical, size[0], size[1], 7)


FUNCTION = {"trainer": {"function": "code:train"}}
IMPORTED = {"trainer": {"imported": "trials.npz"}}


@pytest.fixture
def experiment_store(tmp_path):
    return ExperimentStore(LocalStore(tmp_path), "e")


def held(experiment_store):
    return json.loads(experiment_store.store.get(keys.experiment("e")))["experiment"]["record"]


@pytest.mark.parametrize(
    ("size", "parts", "scores"),
    [
        (CIFAR, {}, True),
        (IMAGENET, {}, True),
        ((2 * IMAGENET[0], IMAGENET[1]), {}, False),
        ((IMAGENET[1], 400_000), {}, False),
        (CIFAR, {"model": {"name": "code:network"}}, True),
        (CIFAR, FUNCTION, False),
        (CIFAR, IMPORTED, False),
    ],
    ids=["cifar", "imagenet", "more training examples", "more test examples", "network of the user's", "function", "imported"],
)
def test_the_built_in_trainer_records_scores_up_to_the_size_of_imagenet(experiment_store, size, parts, scores):
    registered = experiment_store.register(record(size, **parts))
    assert registered.experiment.record.scores is scores
    assert experiment_store.read_record() == registered
    assert held(experiment_store) == {"margins": False} | ({"scores": True} if scores else {})


@pytest.mark.parametrize("scores", [True, False])
def test_a_declaration_decides_whatever_the_size(experiment_store, scores):
    registered = experiment_store.register(record((10**7, 10**6) if scores else CIFAR, scores=scores))
    assert experiment_store.read_record() == registered
    assert registered.experiment.record.scores is scores


@pytest.mark.parametrize("began", [True, False])
def test_an_experiment_goes_on_as_it_began(experiment_store, began):
    experiment_store.register(record(scores=began))  # of 0.1.0, which knows no scores, or of another declaration
    assert experiment_store.register(record()).experiment.record.scores is began
    assert experiment_store.register(record(trials=20)).experiment.record.scores is began
    assert experiment_store.register(record(trials=30, scores=not began)).experiment.record.scores is not began
    assert experiment_store.extend(40).experiment.record.scores is not began


def test_code_that_no_longer_declares_scores_need_not_return_them(experiment_store):
    experiment_store.register(record(scores=True, **FUNCTION))
    assert experiment_store.register(record(**FUNCTION)).experiment.record.scores is False


def test_a_record_without_scores_is_one_of_0_1_0():
    without = record(scores=False)
    assert "scores" not in json.loads(without.to_bytes())["experiment"]["record"]
    assert Record.from_bytes(without.to_bytes(), "record") == without
    assert Record.from_bytes(without.to_bytes(), "record").decided() == without


def test_scores_change_no_fingerprint():
    fingerprints = {record(scores=scores).experiment.fingerprint("d") for scores in (None, "auto", True, False)}
    assert len(fingerprints) == 1
    assert replace(record(), n_train=5).decided().experiment.fingerprint("d") in fingerprints
