"""Models that are kept: what is stored of them, and that a loaded one gives the outcomes of its trial."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import memtail
from memtail import datasets
from memtail.errors import ForeignObjectError, ObjectNotFound, SpecError, TrainingStopped
from memtail.execution.declare import declare as declare_record
from memtail.execution.shard_task import ShardOutcome, run_shard
from memtail.experiment_store import ExperimentStore
from memtail.models import build_model
from memtail.models.trained import About, packed
from memtail.spec import DatasetSpec
from memtail.storage import keys
from memtail.storage.local import LocalStore
from memtail.trainers.images import train_shard
from memtail.trials import Shard, unpack
from tests.support.checkpoints import KeptCheckpoints
from tests.support.training import same_bits

CPU = torch.device("cpu")
TRIALS = 4
MODELS = {
    "compiled": {"name": "mlp", "hidden": [9, 7]},
    "one layer": {"name": "mlp", "hidden": []},
    "convolutions": {"name": "cnn", "channels": [3, 4], "hidden": 7},
    "stacked batch normalisation": {"name": "tests.support.networks:normalised"},
    "one at a time": {"name": "resnet9", "options": {"width": 2}},
    "grey images for a colour network": {"name": "mobilenet_v3_small"},
    "of the user's": {"name": "tests.support.networks:with_dropout"},
    "frozen": {"name": "resnet9", "options": {"width": 2}, "freeze": ["0"]},
}
SMALL = {"name": "digits", "dataset": {"name": "digits", "max_train": 120, "max_test": 40}}


@pytest.fixture
def trained(tmp_path, declare):
    """Train and commit trials into a store; `attempt` of the result trains a shard once more."""

    def train(trials=TRIALS, dataset=None, **parts):
        experiment = declare(
            trials,
            **{
                **SMALL,
                "subsets": {"design": "balanced", "fraction": 0.5},
                "record": {"models": "all"},
                "training": {"epochs": 1},
                **parts,
            },
        )
        dataset = dataset or datasets.prepare(experiment.dataset)
        store, shard = LocalStore(tmp_path / "store"), Shard(0, trials - 1)
        experiment_store = ExperimentStore(store, "digits")
        record = experiment_store.register(declare_record(experiment, dataset, trials))

        def attempt(shard=shard, **options):
            def run(checkpoints):
                return train_shard(record.experiment, dataset, shard.trials, CPU, checkpoints=checkpoints, **options)

            return run_shard(experiment_store, record, shard, "cpu", run)

        result = attempt()
        return SimpleNamespace(
            path=tmp_path / "store" / "experiments" / "digits", result=result, store=store, attempt=attempt, dataset=dataset,
            experiment_store=experiment_store, record=record, shard=shard,
        )  # fmt: skip

    return train


def kept(trained):
    return {key: trained.store.get(key) for key in trained.store.list(keys.models("digits"))}


def assert_reproduced(trained):
    """Assert that each loaded model classifies those examples correctly that the trial did, from the examples as they are."""
    batch = trained.experiment_store.batch(trained.shard, trained.record)
    for row, trial in enumerate(trained.shard.trials):
        model = memtail.load_model(trained.path, trial)
        assert not any(module.training for module in model.modules())
        for split, bits in (("train", batch.train_correct), ("test", batch.test_correct)):
            labels = torch.from_numpy(np.array(getattr(trained.dataset, f"{split}_labels")))
            with torch.no_grad():
                correct = model(torch.from_numpy(np.array(trained.dataset.examples(split)))).argmax(1) == labels
            np.testing.assert_array_equal(correct.numpy(), unpack(bits, len(labels))[row].astype(bool))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_loaded_model_has_the_outcomes_of_its_trial_on_every_example(trained, model):
    done = trained(model=model)
    assert done.result.outcome is ShardOutcome.COMMITTED, done.result.error
    assert_reproduced(done)


def test_a_loaded_model_of_features_takes_them_as_they_are(trained, tmp_path):
    rng, arrays = np.random.default_rng(0), {}
    for split, count in (("train", 50), ("test", 20)):
        labels = np.arange(count) % 2
        vectors = [labels + rng.normal(0, 0.4, count), rng.normal(1e6, 1e3, count), np.full(count, 0.1)]
        arrays |= {f"{split}_labels": labels, f"{split}_features": np.stack(vectors, 1)}
    np.savez(tmp_path / "f.npz", **arrays)
    done = trained(dataset=datasets.prepare(DatasetSpec(name="arrays", root=tmp_path / "f.npz")), training={"epochs": 5})
    assert_reproduced(done)


@pytest.mark.parametrize("model", [MODELS["compiled"], MODELS["stacked batch normalisation"], MODELS["grey images for a colour network"]])
def test_the_file_is_the_state_dict_of_the_plain_network(trained, model):
    done = trained(model=model)
    network = build_model(done.record.experiment.model, (1, 8, 8), 10)
    network = network[1] if model["name"].startswith("mobilenet") else network
    state = safetensors.torch.load_file(done.path / "models" / "00000001.safetensors")
    assert state.keys() == network.state_dict().keys()
    network.load_state_dict(state)


@pytest.mark.parametrize(("models", "count"), [(0, 0), (2, 2), (7, TRIALS), ("all", TRIALS)])
def test_the_models_of_the_first_trials_are_kept(trained, models, count):
    done = trained(record={"models": models})
    assert list(kept(done)) == [f"experiments/digits/models/{trial:08d}.safetensors" for trial in range(count)]


def test_models_of_the_last_attempt_count_and_those_of_a_second_training_do_not(trained):
    done = trained(execution={"verify": 1.0, "device": "cpu"})
    before = kept(done)
    done.store.put(keys.model("digits", 1), b"of a second training")
    assert done.attempt().outcome is ShardOutcome.VERIFIED
    assert done.store.get(keys.model("digits", 1)) == b"of a second training"
    done.experiment_store.discard(done.shard, "to train it again")
    assert done.attempt().outcome is ShardOutcome.COMMITTED
    assert kept(done) == before


def test_models_of_a_shard_that_was_interrupted_are_complete(trained, monkeypatch):
    done = trained(model=MODELS["convolutions"], training={"epochs": 2})
    before = kept(done)
    done.experiment_store.discard(done.shard, "to train it again")
    for key in before:
        done.store.delete(key)
    epochs = []
    result = done.attempt(on_progress=epochs.append, stop=lambda: len(epochs) >= 3)  # in the second trial
    assert result.outcome is ShardOutcome.STOPPED
    assert list(kept(done)) == list(before)[:1]
    assert done.attempt().outcome is ShardOutcome.COMMITTED
    assert kept(done) == before


def test_models_asked_for_after_an_interruption_are_those_of_the_trials_left(digits, declare):
    none, every = (declare(3, model=MODELS["convolutions"], training={"epochs": 2}, record={"models": models}) for models in (0, "all"))
    checkpoints, whole, epochs = KeptCheckpoints(), KeptCheckpoints(), []
    with pytest.raises(TrainingStopped):  # in the second trial
        train_shard(none, digits, range(3), CPU, checkpoints=checkpoints, on_progress=epochs.append, stop=lambda: len(epochs) >= 3)
    resumed = train_shard(every, digits, range(3), CPU, checkpoints=checkpoints)
    assert same_bits([resumed], [train_shard(every, digits, range(3), CPU, checkpoints=whole)])
    assert sorted(whole.models) == [0, 1, 2]
    assert checkpoints.models == {trial: whole.models[trial] for trial in (1, 2)}  # the first was trained before they were asked for


def test_a_store_that_refuses_a_model_gets_the_shard_back_and_one_of_a_removed_experiment_is_dropped(trained, monkeypatch):
    done = trained()
    done.experiment_store.discard(done.shard, "to train it again")
    for key in kept(done):
        done.store.delete(key)
    put = LocalStore.put

    def refuse(self, key, data):
        if key.startswith(keys.models("digits")):
            raise memtail.StoreError(f"{key} cannot be written")
        put(self, key, data)

    monkeypatch.setattr(LocalStore, "put", refuse)
    result = done.attempt()
    assert (result.outcome, result.error) == (ShardOutcome.HANDED_BACK, f"{keys.model('digits', 0)} cannot be written")
    monkeypatch.setattr(LocalStore, "put", put)
    done.store.delete(keys.experiment("digits"))
    assert done.attempt().outcome is ShardOutcome.HANDED_BACK
    assert not kept(done)


def test_a_model_of_an_earlier_experiment_of_the_name_is_dropped(trained):
    done = trained()
    done.experiment_store.discard(done.shard, "to train it again")
    before = kept(done)
    for key in before:
        done.store.delete(key)
    other = replace(done.record, fingerprint="0" * 64)
    done.store.put(keys.experiment("digits"), other.to_bytes())
    result = done.attempt()
    assert result.outcome is ShardOutcome.HANDED_BACK
    assert result.error == "another experiment has the name 'digits' now, and what is made of the earlier one is dropped"
    assert not kept(done)


def test_training_gives_signs_of_life_while_models_are_kept(digits, declare):
    class Slow:
        def load(self) -> bytes | None:
            return None

        def save(self, state: bytes) -> None: ...

        def keep_model(self, trial: int, model: bytes) -> None:
            order.append("kept")

    order: list[str] = []

    def ask() -> bool:
        order.append("asked")
        return False

    experiment = declare(4, record={"models": "all"}, training={"epochs": 1})
    train_shard(experiment, digits, range(4), CPU, checkpoints=Slow(), stop=ask)
    assert order[-8:] == ["kept", "asked"] * 4


def test_what_is_no_model_of_the_trial_is_refused(trained, tmp_path):
    done = trained()
    expected = r"^experiment 'digits' keeps no model of trial 4, 4 models are there, of the first trials: record\.models keeps those of"
    with pytest.raises(ObjectNotFound, match=expected):
        memtail.load_model(done.path, TRIALS)
    with pytest.raises(TypeError, match="'str' object cannot be interpreted as an integer"):
        memtail.load_model(done.path, "0")
    with pytest.raises(ObjectNotFound, match="there is no experiment 'other' in the store; there: digits"):
        memtail.load_model(done.path.parent / "other", 0)
    with pytest.raises(SpecError, match="names no experiment: give STORE/experiments/NAME"):
        memtail.load_model(tmp_path / "store", 0)
    done.store.put(keys.model("digits", 0), done.store.get(keys.model("digits", 1)))
    with pytest.raises(ForeignObjectError, match=r"00000000\.safetensors: is the model of another experiment or trial: remove it"):
        memtail.load_model(done.path, 0)
    whole = done.store.get(keys.model("digits", 1))
    untitled = safetensors.torch.save({"a": torch.zeros(2)}, {"memtail": json.dumps({"trial": "x"})})
    for damaged in (b"", whole[:100], whole[:-1], untitled, safetensors.torch.save({"a": torch.zeros(2)})):
        done.store.put(keys.model("digits", 1), damaged)
        with pytest.raises(ForeignObjectError, match=r"00000001\.safetensors: is damaged \(.*\): remove it, and train the trial again"):
            memtail.load_model(done.path, 1)


@pytest.mark.parametrize(
    "examples",
    [
        torch.zeros(2, 8, 8, 1),
        torch.zeros(2, 1, 8, 8, dtype=torch.uint8),
        torch.zeros(8, 8, 1, dtype=torch.uint8),
        torch.zeros(2, 9, 9, 1, dtype=torch.uint8),
        np.zeros((2, 8, 8, 1), np.uint8),
    ],
    ids=["floats", "channels first", "one image", "another size", "an array"],
)
def test_a_loaded_model_refuses_examples_that_are_not_as_the_dataset_holds_them(trained, examples):
    model = memtail.load_model(trained().path, 0)
    expected = r"^the model takes a tensor of images uint8 \[B, 8, 8, 1\], as its dataset holds them, not "
    with pytest.raises(memtail.DatasetError, match=expected):
        model(examples)


def test_a_network_whose_code_has_changed_is_refused(trained, monkeypatch):
    done = trained(model={"name": "tests.support.networks:with_dropout"})
    monkeypatch.setattr("tests.support.networks.with_dropout", lambda shape, classes: nn.Linear(math.prod(shape), classes))
    with pytest.raises(SpecError, match=r"'tests\.support\.networks:with_dropout' is not the network that was trained \(.*use the code"):
        memtail.load_model(done.path, 0)


def test_loading_changes_no_random_state(trained):
    done = trained()
    state = torch.get_rng_state()
    memtail.load_model(done.path, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_tied_parameters_are_kept_and_what_is_no_tensor_is_refused():
    about = About("f", 0, (4,), 4, [0.0] * 4, [1.0] * 4)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    state = safetensors.torch.load(packed(tied.state_dict(), about))
    assert torch.equal(state["0.weight"], state["1.weight"])
    with pytest.raises(SpecError, match=r"record\.models: '0\._extra_state' of the network's state dict is no tensor"):
        packed({"0._extra_state": cast(Any, {"a": 1})}, about)
