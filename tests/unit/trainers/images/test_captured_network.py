"""Captured steps of networks of any kind, on the CPU, where nothing is captured: equality with torch's optimizers, and reloading."""

import math
import shutil
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from memtail.datasets import prepare
from memtail.models import build_model
from memtail.randomness import Purpose, torch_seed
from memtail.spec import Cnn, Mlp, NamedModel, TrainingSpec
from memtail.trainers.images import shard as shard_module
from memtail.trainers.images import stack_trainer, train_shard
from memtail.trainers.images.cuda.network import CapturedNetwork
from memtail.trainers.images.images import DeviceImages, device_images
from memtail.trainers.images.initial import GENERATOR
from memtail.trainers.images.shard_size import is_compiled
from memtail.trainers.images.stack import Single, stack_networks
from memtail.trainers.images.stack_trainer import StackedRun
from tests.support.training import Interrupted, same_bits

pytestmark = pytest.mark.usefixtures("no_images")

CPU = torch.device("cpu")
# Rates that float32 holds exactly: those of captured steps are float32, those of torch's optimizers float64.
EXACT = {"schedule": {"name": "step", "milestones": [0.5], "gamma": 0.5}}
SGD, ADAM, ADAMW = {"lr": 0.125, "weight_decay": 0.01}, {"name": "adam", "lr": 2**-8}, {"name": "adamw", "lr": 2**-8, "weight_decay": 0.5}
RESNET9, CNN = {"name": "resnet9", "options": {"width": 2}}, {"name": "cnn", "channels": [4], "hidden": 8}
BUILT_IN = {
    "mlp": (Mlp(hidden=[8]), 8),
    "cnn": (Cnn(channels=[4], hidden=8), 8),
    "resnet9": (NamedModel(name="resnet9", options={"width": 4}), 8),
    "resnet18": (NamedModel(name="resnet18"), 8),
    "resnet50": (NamedModel(name="resnet50", options={"stem": "imagenet"}), 32),
    "densenet100": (NamedModel(name="densenet100"), 8),
    "inception": (NamedModel(name="inception"), 12),
}


def slow_where_in(*names):
    return [pytest.param(name, marks=[pytest.mark.slow] if name in names else []) for name in BUILT_IN]


@pytest.fixture
def few(declare):
    return prepare(declare(dataset={"name": "digits", "max_train": 150}).dataset)


@pytest.fixture
def capturing(monkeypatch):
    """Take captured steps on the CPU."""
    monkeypatch.setattr(stack_trainer, "_CAPTURING", {"cpu"})


def run_of(experiment, dataset, trials, images=None):
    """Train trials on 100 examples each; return the run and its result."""
    rng = np.random.default_rng(0)
    subsets = np.stack([np.sort(rng.permutation(dataset.n_train)[:100]) for _ in range(8)])[list(trials)]
    images = images or DeviceImages(dataset, CPU)
    run = StackedRun(experiment, images, dataset.input_shape, len(dataset.classes), trials, subsets)
    return run, run.train(lambda run: None)


@pytest.mark.parametrize("optimizer", [SGD, ADAM, ADAMW], ids=["sgd", "adam", "adamw"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_steps_of_a_network_equal_those_of_torchs_optimizer_to_the_bit(declare, few, monkeypatch, precision, optimizer):
    recipe = {"batch_size": 16, "label_smoothing": 0.1, "precision": precision, "optimizer": optimizer, **EXACT}
    experiment = declare(8, model=RESNET9, training=recipe, record={"margins": True})
    plain, expected = run_of(experiment, few, [3])
    monkeypatch.setattr(stack_trainer, "_CAPTURING", {"cpu"})
    captured, result = run_of(experiment, few, [3])
    assert (type(plain.stack), type(captured.stack)) == (Single, CapturedNetwork)
    theirs = plain.weights_of(0)
    assert all(torch.equal(value, theirs.pop(name)) for name, value in captured.weights_of(0).items())
    assert not theirs
    assert (result.test.margin == expected.test.margin).all()
    np.testing.assert_allclose(result.loss, expected.loss, rtol=1e-6)


@pytest.mark.parametrize("optimizer", [SGD, ADAM, ADAMW], ids=["sgd", "adam", "adamw"])
def test_steps_of_a_stack_equal_those_of_torchs_optimizer(declare, few, monkeypatch, optimizer):
    experiment = declare(8, model=CNN, training={"batch_size": 16, "optimizer": optimizer, **EXACT})
    plain, expected = run_of(experiment, few, [1, 2, 5])
    monkeypatch.setattr(stack_trainer, "_CAPTURING", {"cpu"})
    captured, result = run_of(experiment, few, [1, 2, 5])
    for place in range(3):
        torch.testing.assert_close(captured.weights_of(place), plain.weights_of(place), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(result.loss, expected.loss, rtol=1e-6)


@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize(("model", "before", "after"), [(RESNET9, [3], [5]), (CNN, [0, 1], [5, 6])], ids=["resnet9", "cnn"])
def test_a_network_that_has_trained_other_trials_gives_the_bits_of_a_new_one(declare, few, capturing, model, before, after, optimizer):
    experiment = declare(8, model=model, training={"batch_size": 16, "optimizer": optimizer}, record={"margins": True})
    images = DeviceImages(few, CPU)
    used, _ = run_of(experiment, few, before, images)
    again, result = run_of(experiment, few, after, images)
    alone, expected = run_of(experiment, few, after)
    assert used.stack is again.stack is not alone.stack
    states = again.stack.state_dict(), alone.stack.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0].keys() | states[1].keys())
    assert (result.train.margin == expected.train.margin).all()
    assert (result.loss == expected.loss).all()


def test_another_experiment_gets_another_network(declare, few, capturing):
    images = DeviceImages(few, CPU)
    changes: list[dict[str, Any]] = [{}, {}, {"label_smoothing": 0.1}, {"precision": "bfloat16"}, {"batch_size": 16}]
    networks = [run_of(declare(model=CNN, training={"epochs": 1, **change}), few, [0], images)[0].stack for change in changes]
    networks.append(run_of(declare(model=CNN, training={"epochs": 1, **changes[-1]}), few, [0, 1], images)[0].stack)
    assert [first is second for first, second in pairwise(networks)] == [True] + [False] * 4


def test_stacks_of_two_widths_and_of_other_lengths_of_training_share_networks(declare, few, capturing):
    images = DeviceImages(few, CPU)
    recipes: list[dict[str, Any]] = [{"epochs": 1}, {"epochs": 2}, {"epochs": 1, "optimizer": {"lr": 0.01}}]
    wide, wide_too, wide_again = (run_of(declare(model=CNN, training=recipe), few, [0, 1], images)[0].stack for recipe in recipes)
    narrow = run_of(declare(model=CNN, training=recipes[0]), few, [2], images)[0].stack
    again = run_of(declare(model=CNN, training=recipes[0]), few, [3, 4], images)[0].stack
    assert wide is wide_too is wide_again is again is not narrow
    assert [network for _, network in images.networks] == [narrow, wide]


@pytest.mark.parametrize("stop_at", [1, 6])
@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["sgd", "adam"])
def test_a_checkpoint_within_an_epoch_restores_to_equal_bits(declare, few, capturing, monkeypatch, optimizer, stop_at):
    monkeypatch.setattr(shard_module, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(shard_module, "_CHECKPOINT_SHARE", math.inf)
    experiment = declare(2, model=RESNET9, training={"batch_size": 32, "optimizer": optimizer}, record={"margins": True, "scores": True})
    expected, checkpoints = train_shard(experiment, few, range(2), CPU), Interrupted(stop_at)
    with pytest.raises(Interrupted.StopError):
        train_shard(experiment, few, range(2), CPU, checkpoints=checkpoints)
    assert same_bits([expected], [train_shard(experiment, few, range(2), CPU, checkpoints=checkpoints)], recorded=True)


def test_only_one_size_beside_the_full_batch_is_kept(declare, few, capturing):
    experiment, images = declare(model=RESNET9, training={"epochs": 1, "batch_size": 16}), DeviceImages(few, CPU)
    for size in (100, 90, 33, 70):
        run = StackedRun(experiment, images, few.input_shape, 10, [0], np.arange(size)[None])
        run.train(lambda run: None)
        assert list(run.stack._batches) == [16, 17 if size == 33 else size % 16]


def test_after_a_full_memory_the_network_is_not_kept(declare, few, capturing, monkeypatch):
    experiment, kept = declare(model=CNN, training={"epochs": 1}), []
    train_shard(experiment, few, range(1), CPU)
    assert device_images(few, CPU).networks
    train = StackedRun.train

    def full(self, between_steps):
        kept.append(list(self.images.networks))
        if len(kept) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return train(self, between_steps)

    monkeypatch.setattr(StackedRun, "train", full)
    monkeypatch.setattr(shard_module, "stack_width", lambda *_: 2)
    train_shard(experiment, few, range(2), CPU)
    assert not {id(network) for _, network in kept[0]} & {id(network) for _, network in kept[1]}
    assert [network for _, network in kept[1]] == [network for _, network in kept[2]]


def test_networks_of_ones_own_and_those_that_are_not_to_be_captured_take_plain_steps(declare, few, capturing):
    own = declare(model={"name": "tests.support.networks:with_dropout"}, training={"epochs": 1})
    declined = declare(model=RESNET9, training={"epochs": 1}, execution={"compile": False})
    for experiment in (own, declined):
        run, _ = run_of(experiment, few, [0])
        assert isinstance(run.stack, Single)
        assert run.optimizer


def captured(network, pixels, compiled=False):
    channels = pixels.shape[-1]
    shift, scale = torch.zeros(channels, device=pixels.device), torch.full((channels,), 0.01, device=pixels.device)
    return CapturedNetwork(stack_networks([network]), shift, scale, TrainingSpec(), False, pixels, compiled)


def images_of(size, channels=3, device="cpu"):
    torch.manual_seed(0)
    return torch.randint(0, 256, (1, 4, size, size, channels), dtype=torch.uint8, device=device)


def test_a_network_that_draws_is_not_repeated_and_draws_anew_in_each_step():
    torch.manual_seed(0)
    pixels, labels = images_of(8), torch.zeros(1, 4, dtype=torch.int64)
    drawing = captured(nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Dropout(0.5), nn.Linear(16, 10)), pixels)
    assert not drawing._repeats
    losses = [drawing.train_steps(pixels, labels, [(0, 4)], [0.0]) for _ in range(2)]
    assert losses[0] != losses[1]
    assert not drawing._batches


def test_an_evaluation_that_fails_keeps_no_memory():
    network = captured(build_model(Mlp(hidden=[8]), (3, 8, 8), 10), images_of(8)).eval()
    with pytest.raises(RuntimeError):
        network(torch.zeros(4, 3, 9, 9))
    assert not network._evaluations
    for images in (torch.zeros(4, 3, 8, 8), torch.ones(4, 3, 8, 8), torch.ones(1, 2, 3, 8, 8)):
        torch.testing.assert_close(network(images), network.stack(images).detach())
    assert len(network._evaluations) == 2


def test_gradients_have_the_layouts_of_the_parameters():
    """The kernels of optimizers take both for flat arrays."""
    torch.manual_seed(0)
    pixels, labels = images_of(8), torch.zeros(1, 4, dtype=torch.int64)
    plain, other = (captured(build_model(NamedModel(name="resnet9", options={"width": 4}), (3, 8, 8), 10), pixels) for _ in range(2))
    other.load(plain.stack)
    other.stack.to(memory_format=torch.channels_last)
    gradients = [network._differentiated(network.stack, pixels, labels)[1] for network in (plain, other)]
    assert [gradient.stride() for gradient in gradients[1]] == [parameter.stride() for parameter in other.stack.parameters()]
    assert gradients[0][0].stride() != gradients[1][0].stride()
    torch.testing.assert_close(gradients[0], gradients[1])


def test_frozen_parts_and_their_statistics_stay(declare, few, capturing):
    model = {**RESNET9, "freeze": ["0"]}
    experiment = declare(model=model, training={"epochs": 1})
    run, _ = run_of(experiment, few, [2])
    torch.default_generator.manual_seed(torch_seed(experiment.subsets.seed, Purpose.WEIGHTS, 2))
    initial = build_model(experiment.model, few.input_shape, 10).state_dict()
    assert {name.split(".")[0] for name, value in run.weights_of(0).items() if torch.equal(value, initial[name])} == {"0"}


class _Waits(TorchDispatchMode):
    """Collects operators for which a host waits for its device, or that have tensors in the host's memory."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        given = [value for value in [*args, *(kwargs or {}).values()] if isinstance(value, torch.Tensor)]
        waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(operator.tags)
        if waits or not all(value.is_meta for value in given):
            self.found.add(str(operator))
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", slow_where_in("resnet50", "densenet100"))
def test_the_host_never_waits_for_the_device_in_forward_and_backward_pass(name):
    spec, side = BUILT_IN[name]
    network = captured(build_model(spec, (3, side, side), 10), images_of(side, device="meta"))
    with _Waits() as waits:
        network._differentiated(network.stack, images_of(side, device="meta"), torch.zeros(1, 4, dtype=torch.int64, device="meta"))
    assert network._repeats
    assert not waits.found


def test_operators_for_which_the_host_waits_are_found():
    with _Waits() as waits:
        values = torch.zeros(3)
        torch.zeros(3, device="meta") + 1
        values.max().item()
        torch.nn.functional.one_hot(torch.zeros(3, dtype=torch.int64))
    assert {"aten._local_scalar_dense.default", "aten.max.default"} <= waits.found


@pytest.mark.parametrize("name", slow_where_in("resnet18", "resnet50", "densenet100", "inception"))
def test_every_network_is_compiled_as_one_graph(name):
    spec, side = BUILT_IN[name]
    stack = stack_networks([build_model(spec, (3, side, side), 10)]).to("meta").train()
    torch.compiler.reset()
    compiled = torch.compile(stack.forward, backend="eager", fullgraph=True, dynamic=False)
    assert compiled(torch.empty(4, 3, side, side, device="meta")).shape == (1, 4, 10)


class _Opaque(nn.Linear):
    def forward(self, x):
        torch._dynamo.graph_break()
        return super().forward(x.flatten(1))


def test_a_network_that_cannot_be_compiled_is_trained_without(capfd):
    pixels, labels = images_of(8), torch.zeros(1, 4, dtype=torch.int64)
    network = captured(_Opaque(192, 10), pixels, compiled=True)
    assert not network.compiled
    losses = [network.train_steps(pixels, labels, [(0, 4)], [0.1]) for _ in range(3)]
    assert losses[2] < losses[0]
    (line,) = [line for line in "".join(capfd.readouterr()).splitlines() if "network cannot be compiled here" in line]
    assert "error=" in line


def test_no_weights_are_drawn_while_a_network_is_compiled(monkeypatch):
    locked = []
    monkeypatch.setattr(CapturedNetwork, "_differentiated", lambda *_: locked.append(GENERATOR.locked()))
    captured(_Opaque(192, 10), images_of(8), compiled=True)
    assert locked == [True]
    assert not GENERATOR.locked()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="torch compiles for a CPU with a C++ compiler, and there is none")
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_network_agrees_with_an_uncompiled_one(declare, few, capturing, monkeypatch):
    recipe: dict[str, Any] = {"model": RESNET9, "training": {"batch_size": 32}, "record": {"margins": True}}
    experiments = [declare(**recipe, execution={"compile": declared}) for declared in (True, "auto")]
    (compiled, found), (plain, expected) = (run_of(experiment, few, [1]) for experiment in experiments)
    assert (compiled._maker()["stack"], plain._maker()["stack"]) == ("CapturedNetwork, compiled", "CapturedNetwork")
    torch.testing.assert_close(compiled.weights_of(0), plain.weights_of(0), rtol=1e-3, atol=1e-3)
    assert np.abs(found.test.margin.astype(float) - expected.test.margin).max() < 0.01
    with pytest.raises(ValueError, match="it was made by"):
        plain.restore(compiled.state())


def test_networks_are_compiled_whose_trials_take_long_whatever_their_number(declare):
    network = build_model(NamedModel(name="resnet9"), (3, 32, 32), 10)

    def compiled(epochs=24, trials=1000, examples=50_000, **execution):
        experiment = declare(trials, training={"epochs": epochs}, execution=execution)
        return is_compiled(experiment, network, (3, 32, 32), examples, 10_000)

    assert compiled()  # CIFAR-10, about 10 s of a GPU
    assert compiled(trials=2)
    assert not compiled(examples=1_000)
    assert not compiled(epochs=1)
    assert not compiled(compile=False)
    assert compiled(epochs=1, compile=True)
