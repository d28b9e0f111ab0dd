"""Captured steps of fully connected networks, on the CPU, where nothing is captured: equality with automatic differentiation and torch."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memtail.spec import Adam, AdamW, Sgd
from memtail.trainers.images import stack_trainer, train_shard
from memtail.trainers.images.cpu.mlp import dense_layers
from memtail.trainers.images.cuda.captured import Captured
from memtail.trainers.images.cuda.mlp import CapturedDenseStack
from memtail.trainers.images.stack import Stacked, stack_networks
from tests.support.training import torchs_optimizer

OPTIMIZERS = [
    Sgd(),
    Sgd(momentum=0.0, nesterov=False, weight_decay=0.0),
    Sgd(momentum=0.5, nesterov=False, weight_decay=0.01),
    Adam(name="adam", lr=0.01, weight_decay=0.1),
    AdamW(name="adamw", lr=0.01, weight_decay=0.1),
]
BOUNDS = [(0, 12), (12, 24), (24, 27)]
SHIFT, SCALE = torch.tensor([-120.0, -130.0, -140.0]), torch.tensor([0.01, 0.011, 0.012])


def networks(count):
    torch.manual_seed(0)
    return [nn.Sequential(nn.Flatten(), nn.Linear(60, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 20)) for _ in range(count)]


def captured(copies, spec=OPTIMIZERS[0], smoothing=0.1):
    layers = dense_layers(stack_networks([copy.deepcopy(network) for network in copies]))
    return CapturedDenseStack(layers, (3, 4, 5), SHIFT, SCALE, spec, smoothing)


def examples(count):
    torch.manual_seed(1)
    return torch.randint(0, 256, (count, 27, 4, 5, 3), dtype=torch.uint8), torch.randint(0, 20, (count, 27))


def normalised(pixels):
    return ((pixels + SHIFT) * SCALE).movedim(-1, -3)


@pytest.mark.parametrize("spec", OPTIMIZERS, ids=lambda spec: f"{spec.name}-{spec.weight_decay}")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_written_out_step_equals_automatic_differentiation_and_torchs_optimizer(spec, smoothing):
    plain = networks(3)
    stack = captured(plain, spec, smoothing)
    pixels, labels = examples(3)
    optimizers = [torchs_optimizer(spec, network.double().parameters()) for network in plain]
    for epoch in range(8):
        rates = [spec.lr * (1 - (3 * epoch + step) / 24) for step in range(3)]
        losses = stack.train_steps(pixels, labels, BOUNDS, rates)
        for place, (network, optimizer) in enumerate(zip(plain, optimizers, strict=True)):
            own, total = normalised(pixels[place]).double(), 0.0
            for (start, stop), rate in zip(BOUNDS, rates, strict=True):
                optimizer.param_groups[0]["lr"] = rate
                optimizer.zero_grad()
                loss = F.cross_entropy(network(own[start:stop]), labels[place, start:stop], label_smoothing=smoothing)
                loss.backward()
                optimizer.step()
                total += loss.item() * (stop - start)
            assert losses[place].item() == pytest.approx(total, rel=1e-4)
    for place, network in enumerate(plain):
        for ours, theirs in zip(stack.tensors_of(place), network.state_dict().values(), strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_logits_and_tensors_are_those_of_the_networks():
    plain = networks(2)
    stack, (pixels, _) = captured(plain), examples(2)
    own = normalised(pixels)
    torch.testing.assert_close(stack(own), torch.stack([network(batch) for network, batch in zip(plain, own, strict=True)]))
    torch.testing.assert_close(stack(own[0]), torch.stack([network(own[0]) for network in plain]))
    for place, network in enumerate(plain):
        for ours, theirs in zip(stack.tensors_of(place), network.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("spec", OPTIMIZERS[2:], ids=lambda spec: spec.name)
def test_a_restored_state_continues_to_equal_bits(spec):
    pixels, labels = examples(2)
    whole, first, second = (captured(networks(2), spec) for _ in range(3))
    for _ in range(2):
        whole.train_steps(pixels, labels, BOUNDS, [0.1] * 3)
    first.train_steps(pixels, labels, BOUNDS, [0.1] * 3)
    second.train_steps(pixels, labels, BOUNDS[:1], [0.5])
    second.load_state_dict(first.state_dict())
    second.train_steps(pixels, labels, BOUNDS, [0.1] * 3)
    assert all(torch.equal(*same) for same in zip(whole.state_dict().values(), second.state_dict().values(), strict=True))


def test_a_diverged_network_leaves_the_others_as_they_are():
    healthy, (pixels, labels) = networks(3), examples(3)
    broken = copy.deepcopy(healthy)
    broken[1][1].weight.data.fill_(float("nan"))
    one, other = captured(healthy), captured(broken)
    for _ in range(3):
        losses = [stack.train_steps(pixels, labels, BOUNDS, [0.1] * 3) for stack in (one, other)]
    assert losses[1][1].isnan()
    for place in (0, 2):
        assert all(torch.equal(*same) for same in zip(one.tensors_of(place), other.tensors_of(place), strict=True))


def test_features_are_normalised_and_trained():
    torch.manual_seed(0)
    plain = [nn.Sequential(nn.Flatten(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)) for _ in range(2)]
    shift, scale = torch.randn(7), torch.rand(7)
    stack = CapturedDenseStack(dense_layers(Stacked(plain)), (7,), shift, scale, Sgd(), 0.0)
    features, labels = torch.randn(2, 20, 7), torch.randint(0, 3, (2, 20))
    examples = (features + shift) * scale
    expected = [F.cross_entropy(network(own), targets) * 20 for network, own, targets in zip(plain, examples, labels, strict=True)]
    losses = [stack.train_steps(features, labels, [(0, 20)], [0.1]) for _ in range(10)]
    torch.testing.assert_close(losses[0], torch.stack(expected).detach())
    assert (losses[-1] < losses[0]).all()
    assert stack(examples).shape == (2, 20, 3)


def test_a_shard_of_captured_steps_has_the_outcomes_of_compiled_ones(declare, digits, monkeypatch):
    experiment = declare(4, training={"epochs": 3}, record={"margins": True})
    compiled = train_shard(experiment, digits, range(4), torch.device("cpu"))
    monkeypatch.setitem(stack_trainer._DENSE, "cpu", CapturedDenseStack)
    captured = train_shard(experiment, digits, range(4), torch.device("cpu"))
    assert np.abs(captured.test_margin.astype(float) - compiled.test_margin).max() < 0.05
    assert (captured.test_correct != compiled.test_correct).mean() < 0.005


def test_a_function_is_called_as_it_is_on_a_cpu():
    total, step = torch.zeros(()), torch.ones(())
    repeated = Captured([total])
    for value in (1, 2):
        step.fill_(value)
        repeated(lambda: total.add_(step))
    assert total == 3
