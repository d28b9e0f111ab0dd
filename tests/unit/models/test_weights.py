"""Networks that start from weights, and parts of networks that are not trained."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from memtail import subsets
from memtail.datasets import prepare
from memtail.digests import file_digest
from memtail.errors import SpecError, UnsupportedError
from memtail.execution.declare import declare as declare_record
from memtail.execution.shard_task import run_shard
from memtail.experiment_store import ExperimentStore
from memtail.models import build_model, check_model, weights
from memtail.spec import NamedModel
from memtail.storage.local import LocalStore
from memtail.trainers.images import shard as shard_module
from memtail.trainers.images import train_shard
from memtail.trainers.images.images import DeviceImages
from memtail.trainers.images.stack_trainer import StackedRun
from memtail.trials import Shard
from tests.support.training import Interrupted, same_bits

CPU = torch.device("cpu")
SMALL = {"name": "resnet9", "options": {"width": 2}}


@pytest.fixture(autouse=True)
def nothing_kept():
    weights._saved.cache_clear()
    weights._published.cache_clear()


def state_of(classes: int, name: str = "resnet9", shape=(1, 8, 8), **options) -> dict[str, torch.Tensor]:
    """Return the state of a network whose every entry is random, also those that start as 0 or 1."""
    torch.manual_seed(classes)
    state = build_model(NamedModel(name=name, options=options), shape, classes).state_dict()
    return {key: torch.rand_like(value) if value.is_floating_point() else value for key, value in state.items()}


@pytest.fixture(params=["torch", "safetensors"])
def saved(request, tmp_path):
    """Return a function that saves a state dict and returns the file."""

    def save(state: dict[str, torch.Tensor]) -> str:
        if request.param == "safetensors":
            pytest.importorskip("safetensors.torch").save_file(state, tmp_path / "weights")
        else:
            torch.save(state, tmp_path / "weights")
        return str(tmp_path / "weights")

    return save


@pytest.mark.parametrize("seed", [1, 2])
def test_a_network_starts_from_a_file_and_keeps_a_last_layer_for_as_many_classes(saved, seed):
    state = state_of(10, width=2)
    torch.manual_seed(seed)
    network = build_model(NamedModel(**SMALL, weights=saved(state)), (1, 8, 8), 10)
    assert network.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_a_last_layer_for_other_classes_keeps_its_initial_weights_and_the_check_says_so(saved, capfd):
    spec, plain = NamedModel(**SMALL, weights=saved(state_of(10, width=2))), NamedModel(**SMALL)
    for seed in (1, 2):
        torch.manual_seed(seed)
        started = build_model(spec, (1, 8, 8), 7).state_dict()
        torch.manual_seed(seed)
        initial = build_model(plain, (1, 8, 8), 7).state_dict()
        same = {name for name in initial if torch.equal(started[name], initial[name])}
        assert {name for name in same if not name.endswith("num_batches_tracked")} == {"11.weight"}
    assert not "".join(capfd.readouterr())
    check_model(spec, (1, 8, 8), 7)
    check_model(spec, (1, 8, 8), 10)
    shown = "".join(capfd.readouterr())
    assert shown.count("last layer not loaded, it starts from initial weights") == 1
    assert "parameters=11.weight" in shown
    assert "10 -> 7" in shown


def test_a_file_that_was_replaced_is_read_again(tmp_path):
    spec, values = NamedModel(**SMALL, weights=str(tmp_path / "w.pt")), []
    for scale in (1, 2):
        torch.save({name: value * scale for name, value in state_of(10, width=2).items()}, tmp_path / "w.pt")
        os.utime(tmp_path / "w.pt", (scale, scale))
        values.append(build_model(spec, (1, 8, 8), 10).state_dict()["0.0.weight"])
    assert torch.equal(2 * values[0], values[1])


def changed(state, **entries):
    return {**state, **entries}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: {name: value for name, value in state.items() if name != "0.0.weight"},
            "it has no 0.0.weight: save the state_dict()",
        ),
        (lambda state: changed(state, more=torch.ones(2)), "it has more, which the network does not have: save"),
        (
            lambda state: changed(state, **{"0.0.weight": torch.ones(2, 1, 7, 7)}),
            r"it has 0.0.weight of \[2, 1, 7, 7\], and the network's is \[2, 1, 3, 3\]: save",
        ),
        (lambda state: {f"module.{name}": value for name, value in state.items()}, "; .*, and 87 more: save"),
        (lambda state: {"model": state}, r"holds no state dict of tensors alone \(keys model\)"),
        (lambda state: [1, 2], r"holds no state dict of tensors alone \(list\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path, change, message):
    torch.save(change(state_of(10, width=2)), tmp_path / "weights.pt")
    with pytest.raises(SpecError, match=message) as caught:
        check_model(NamedModel(**SMALL, weights=str(tmp_path / "weights.pt")), (1, 8, 8), 10)
    assert str(caught.value).startswith("model.weights: ")
    assert "\n" not in str(caught.value)


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_files_without_weights_are_refused_and_run_no_code(tmp_path):
    spec = NamedModel(**SMALL, weights=str(tmp_path / "weights.pt"))
    with pytest.raises(SpecError, match=r"weights\.pt cannot be read \(No such file or directory\)"):
        build_model(spec, (1, 8, 8), 10)
    for content in (b"", b"PK\x03\x04damaged", b"12345678{damaged"):
        (tmp_path / "weights.pt").write_bytes(content)
        with pytest.raises(SpecError, match=r"weights\.pt holds no weights"):
            build_model(spec, (1, 8, 8), 10)
    torch.save({"a": Harmful(tmp_path / "ran")}, tmp_path / "weights.pt")
    with pytest.raises(SpecError, match=r"weights\.pt holds no weights"):
        build_model(spec, (1, 8, 8), 10)
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Return a function that publishes other weights of shufflenet_v2_x0_5, and returns the place of their download."""
    from torchvision.models import get_model_weights

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def publish(state: dict[str, torch.Tensor]) -> Path:
        torch.save(state, tmp_path / "published")
        published = tmp_path / f"shufflenet-{file_digest(tmp_path / 'published')[:8]}.pth"
        (tmp_path / "published").rename(published)
        monkeypatch.setattr(get_model_weights("shufflenet_v2_x0_5").IMAGENET1K_V1.value, "url", published.as_uri())
        return tmp_path / "torch" / "hub" / "checkpoints" / published.name

    return publish


def test_published_weights_that_were_replaced_on_this_machine_are_not_used(publish, tmp_path, capfd):
    spec, state = NamedModel(name="shufflenet_v2_x0_5", weights="IMAGENET1K_V1"), state_of(1000, "shufflenet_v2_x0_5", (3, 128, 128))
    kept = publish(state)
    kept.parent.mkdir(parents=True)
    torch.save({name: torch.zeros_like(value) for name, value in state.items()}, kept)
    network = build_model(spec, (3, 128, 128), 1000)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert "".join(capfd.readouterr()).count("published weights were replaced, downloading them again") == 1
    weights._published.cache_clear()
    kept.write_bytes(b"replaced")
    (tmp_path / kept.name).unlink()
    with pytest.raises(UnsupportedError, match=r"weights IMAGENET1K_V1 of shufflenet_v2_x0_5 cannot be downloaded"):
        build_model(spec, (3, 128, 128), 1000)


@pytest.mark.parametrize("channels", [1, 3])
def test_published_weights_of_torchvision_are_those_of_its_file(publish, channels):
    name = "shufflenet_v2_x0_5"
    state = state_of(1000, name, (3, 128, 128))
    publish(state)
    network = build_model(NamedModel(name=name, weights="IMAGENET1K_V1", freeze=["conv1"]), (channels, 128, 128), 5)
    own = {key.removeprefix("1." if channels == 1 else ""): value for key, value in network.state_dict().items()}
    assert {key for key, value in own.items() if not torch.equal(value, state[key])} == {"fc.weight", "fc.bias"}
    assert [parameter.requires_grad for parameter in network.parameters()][:4] == [False] * 3 + [True]


def test_a_machine_that_cannot_download_weights_leaves_the_experiment_alone(tmp_path, monkeypatch, declare, digits):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    masks = tmp_path / "masks.npy"
    np.save(masks, np.arange(2 * digits.n_train).reshape(2, -1) % 3 > 0)
    experiment = declare(
        2, model={"name": "mobilenet_v3_small", "weights": "IMAGENET1K_V1"}, subsets={"masks": masks, "design": "explicit"}
    )
    message = r"weights IMAGENET1K_V1 of mobilenet_v3_small cannot be downloaded .*: check the network, or save"
    with pytest.raises(UnsupportedError, match=message):
        check_model(experiment.model, digits.image_shape, 10)
    experiment_store, shard = ExperimentStore(LocalStore(tmp_path / "store"), "digits"), Shard(0, 1)
    record = experiment_store.register(declare_record(experiment, digits, 2))
    with pytest.raises(UnsupportedError, match=message):
        run_shard(experiment_store, record, shard, "cpu", lambda _: train_shard(experiment, digits, shard.trials, CPU))
    assert not experiment_store.attempts()


@pytest.mark.parametrize(
    ("name", "published", "message"),
    [
        ("resnet50", "IMAGENET1K_V3", "there are no weights IMAGENET1K_V3 of resnet50: known are IMAGENET1K_V1, IMAGENET1K_V2"),
        ("resnet9", "IMAGENET1K_V1", "torchvision has no weights IMAGENET1K_V1 for 'resnet9': name a file"),
    ],
)
def test_published_weights_that_do_not_exist_are_refused(name, published, message):
    with pytest.raises(SpecError, match=message):
        check_model(NamedModel(name=name, weights=published), (3, 32, 32), 5)


def small_run(experiment, dataset):
    member = subsets.membership(experiment.subsets, dataset.train_labels, [0])
    subset = np.flatnonzero(member[0])[None]
    return StackedRun(experiment, DeviceImages(dataset, CPU), dataset.image_shape, len(dataset.classes), [0], subset)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_frozen_parts_get_no_gradient_no_decay_and_no_new_statistics(declare, optimizer):
    model = {**SMALL, "freeze": ["0", "3.inner.0."]}
    training = {"epochs": 1, "optimizer": {"name": optimizer, "weight_decay": 0.5}}
    experiment = declare(2, model=model, training=training, dataset={"name": "digits", "max_train": 200})
    run = small_run(experiment, prepare(experiment.dataset))
    before = {name: value.clone() for name, value in run.stack.state_dict().items()}
    run.train(lambda _: None)
    after = run.stack.state_dict()
    frozen = tuple(f"network.{prefix}" for prefix in ("0.", "3.inner.0."))
    for name, value in after.items():
        assert torch.equal(value, before[name]) == name.startswith(frozen), name
    assert {name for name, value in run.stack.named_parameters() if value.grad is None} == {
        name for name, _ in run.stack.named_parameters() if name.startswith(frozen)
    }


def test_a_frozen_batch_normalisation_computes_with_its_statistics(declare, tmp_path):
    torch.save(state_of(10, width=2), tmp_path / "w.pt")
    network = build_model(NamedModel(**SMALL, weights=str(tmp_path / "w.pt"), freeze=["0"]), (1, 8, 8), 10)
    images = torch.randn(6, 1, 8, 8)
    expected = network.eval()[0](images)
    assert torch.equal(network.train()[0](images), expected)
    assert network[1][1].training


def test_a_prefix_ends_at_a_dot_and_one_that_names_nothing_is_refused():
    def named(*prefixes):
        return build_model(NamedModel(**SMALL, freeze=list(prefixes)), (1, 8, 8), 10)

    frozen = {name for name, value in named("1").named_parameters() if not value.requires_grad}
    assert frozen == {"1.0.weight", "1.1.weight", "1.1.bias"}
    with pytest.raises(SpecError, match=r"no parameter whose name begins with 'layer1': its parts are 0, 1, 2, 3, .*12$"):
        named("layer1")
    with pytest.raises(SpecError, match="leave no parameter to train"):
        named("0", "1", "3", "4", "6", "8", "11")


def test_trials_of_a_fine_tuned_network_are_the_same_in_any_shard_and_after_a_checkpoint(declare, monkeypatch, tmp_path):
    monkeypatch.setattr(shard_module, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(shard_module, "_CHECKPOINT_SHARE", np.inf)
    torch.save(state_of(7, width=2), tmp_path / "w.pt")
    experiment = declare(
        3,
        model={**SMALL, "weights": str(tmp_path / "w.pt"), "freeze": ["0"]},
        training={"optimizer": {"name": "adamw"}},
        dataset={"name": "digits", "max_train": 200},
        record={"margins": True, "scores": True},
    )
    dataset = prepare(experiment.dataset)
    expected = train_shard(experiment, dataset, range(3), CPU)
    assert same_bits([expected], [train_shard(experiment, dataset, [trial], CPU) for trial in range(3)], recorded=True)
    checkpoints = Interrupted(8)
    with pytest.raises(Interrupted.StopError):
        train_shard(experiment, dataset, range(3), CPU, checkpoints=checkpoints)
    assert same_bits([expected], [train_shard(experiment, dataset, range(3), CPU, checkpoints=checkpoints)], recorded=True)


def test_a_user_network_starts_from_weights_too(tmp_path):
    name = "tests.support.networks:with_dropout"
    state = build_model(NamedModel(name=name), (1, 8, 8), 10).state_dict()
    torch.save(state, tmp_path / "w.pt")
    network = build_model(NamedModel(name=name, weights=str(tmp_path / "w.pt")), (1, 8, 8), 10)
    assert isinstance(network, nn.Module)
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
