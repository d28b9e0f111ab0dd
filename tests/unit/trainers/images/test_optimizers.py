"""Adam and AdamW in stacks and in compiled steps: equality with torch, and with any width of a stack."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memtail.spec import Adam, AdamW
from memtail.trainers.images import shard as shard_module
from memtail.trainers.images import stack_width, train_shard
from memtail.trainers.images.cpu.mlp import DenseStack, dense_layers
from memtail.trainers.images.optimizers import make_optimizer
from memtail.trainers.images.stack import join_parameters, stack_networks
from tests.support.training import STACKABLE, same_bits, torchs_optimizer

ADAPTIVE = [
    Adam(name="adam", weight_decay=0.1),
    AdamW(name="adamw", weight_decay=0.1),
    AdamW(name="adamw", lr=0.01, betas=[0.0, 0.5], eps=1e-4, weight_decay=0.0),
]


@pytest.mark.parametrize("spec", ADAPTIVE, ids=lambda spec: spec.name)
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("name", STACKABLE)
def test_an_adaptive_optimizer_of_a_stack_equals_torchs_of_each_network_step_by_step(name, width, spec):
    torch.manual_seed(0)
    networks = [STACKABLE[name]().double() for _ in range(width)]
    stack = stack_networks([copy.deepcopy(network) for network in networks]).double()
    ours = make_optimizer(spec, [join_parameters(stack)])
    theirs = [torchs_optimizer(spec, network.parameters()) for network in networks]
    shape = (1, 8, 8) if name == "mlp" else (3, 8, 8)
    for step in range(60):
        images, labels = torch.randn(width, 6, *shape).double(), torch.randint(0, 5, (width, 6))
        for group in (group for optimizer in (ours, *theirs) for group in optimizer.param_groups):
            group["lr"] = spec.lr * (1 - step / 60)
        ours.zero_grad(set_to_none=False)
        F.cross_entropy(stack(images).flatten(0, 1), labels.flatten(), reduction="sum").backward()
        ours.step()
        for network, optimizer, batch, targets in zip(networks, theirs, images, labels, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(network(batch), targets, reduction="sum").backward()
            optimizer.step()
        for parameter, *same in zip(stack.parameters(), *(network.parameters() for network in networks), strict=True):
            torch.testing.assert_close(parameter.flatten(), torch.stack(same).flatten(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("spec", ADAPTIVE, ids=lambda spec: spec.name)
def test_compiled_updates_of_adaptive_optimizers_equal_torchs_step_by_step(spec):
    from memtail.trainers.images.cpu.mlp_kernels import _update

    rng = np.random.default_rng(0)
    layers = dense_layers(stack_networks([nn.Sequential(nn.Flatten(), nn.Linear(4, 3))]))
    dense = DenseStack(layers, (1, 2, 2), torch.ones(1), torch.ones(1), spec, 0.0)
    values = rng.normal(size=1000).astype(np.float32)
    theirs = nn.Parameter(torch.from_numpy(values.astype(float)))
    optimizer = torchs_optimizer(spec, [theirs])
    means, squares = np.zeros_like(values), np.zeros_like(values)
    for step in range(300):
        rate = spec.lr * (1 - step / 300)
        gradient = (rng.normal(size=1000) * 10.0 ** rng.integers(-3, 3, 1000)).astype(np.float32)
        rates, constants, _ = dense._update([rate])
        _update(values, means, squares, 0, gradient, 1000, rates[0], constants)
        theirs.grad = torch.from_numpy(gradient.astype(float))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        expected = theirs.detach().numpy()
        assert np.linalg.norm(values - expected) < 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("spec", ADAPTIVE, ids=lambda spec: spec.name)
def test_compiled_steps_of_adaptive_optimizers_equal_those_of_torch(spec):
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(27, 8), nn.ReLU(), nn.Linear(8, 20)) for _ in range(3)]
    layers = dense_layers(stack_networks([copy.deepcopy(network) for network in networks]))
    shift, scale = torch.tensor([-120.0, -130.0, -140.0]), torch.tensor([0.01, 0.011, 0.012])
    dense = DenseStack(layers, (3, 3, 3), shift, scale, spec, 0.1)
    pixels, labels = torch.randint(0, 256, (3, 27, 3, 3, 3), dtype=torch.uint8), torch.randint(0, 20, (3, 27))
    images = ((pixels + shift) * scale).movedim(-1, -3).double()
    bounds = [(0, 12), (12, 24), (24, 27)]
    optimizers = [torchs_optimizer(spec, network.double().parameters()) for network in networks]
    for _ in range(20):
        dense.train_steps(pixels, labels, bounds, [spec.lr] * 3)
        for network, optimizer, own, targets in zip(networks, optimizers, images, labels, strict=True):
            for start, stop in bounds:
                optimizer.zero_grad()
                F.cross_entropy(network(own[start:stop]), targets[start:stop], label_smoothing=0.1).backward()
                optimizer.step()
    expected = torch.stack([network(own) for network, own in zip(networks, images, strict=True)])
    torch.testing.assert_close(dense(images.float()), expected.detach().float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
@pytest.mark.parametrize("model", [{"name": "mlp", "hidden": [16]}, {"name": "cnn", "channels": [4], "hidden": 8}])
def test_no_bit_of_an_adaptive_optimizer_depends_on_the_width_of_the_stack(declare, digits, monkeypatch, model, optimizer):
    experiment = declare(6, model=model, training={"epochs": 1, "optimizer": {"name": optimizer}}, record={"margins": True, "scores": True})
    batches = []
    for width in (1, 2, 6):
        monkeypatch.setattr(stack_width, "_DENSE", {"cpu": width})
        monkeypatch.setattr(shard_module, "stack_width", lambda *_, width=width: width)
        batches.append(train_shard(experiment, digits, range(6), torch.device("cpu")))
    assert same_bits([batches[0]], [batches[1]], recorded=True)
    assert same_bits([batches[0]], [batches[2]], recorded=True)
