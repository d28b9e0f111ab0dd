"""Number of networks in a stack, and of trials in a shard, by device."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from memtail.models import build_model
from memtail.spec import Cnn, Mlp, NamedModel
from memtail.trainers.images.shard_size import checked_shard_size, operations_per_trial
from memtail.trainers.images.stack import stack_networks, use_channels_last
from memtail.trainers.images.stack_width import network_bytes, stack_width

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda", 0), torch.device("mps")
MNIST = (1, 28, 28)
GIB = 1 << 30


@pytest.fixture(autouse=True)
def an_h100(monkeypatch):
    memory(monkeypatch, 80)


def memory(monkeypatch, gib):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=gib * GIB))


@pytest.mark.parametrize(("spec", "widths"), [
    (Mlp(hidden=[512, 256]), [16, 32, 512]), (Cnn(), [1, 32, 64]), (NamedModel(name="resnet9", options={"width": 2}), [1, 1, 1]),
])  # fmt: skip
def test_the_width_follows_from_the_network_and_the_device(spec, widths):
    network = build_model(spec, MNIST, 10)
    assert [stack_width(network, MNIST, 128, device) for device in (CPU, MPS, CUDA)] == widths


@pytest.mark.parametrize(("hidden", "gib", "width"), [
    ([512, 256], 4, 182), ([512, 256], 16, 512), ([4096, 4096], 80, 126), ([32768] * 2, 8, 1),
])  # fmt: skip
def test_a_stack_takes_half_of_the_memory_of_a_gpu(monkeypatch, hidden, gib, width):
    memory(monkeypatch, gib)
    with torch.device("meta"):
        network = build_model(Mlp(hidden=hidden), MNIST, 10)
    got = stack_width(network, MNIST, 128, CUDA)
    assert got == width
    assert got == 1 or got * network_bytes(network, MNIST, 128) <= gib * GIB / 2


def test_the_bytes_of_a_network_are_those_of_its_arrays():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2))
    parameters, outputs = 12 * 5 + 5 + 5 * 2 + 2, 12 + 12 + 5 + 5 + 2
    assert network_bytes(network, (3, 2, 2), 7) == 4 * (4 * parameters + 2 * 7 * outputs)
    assert not any(layer._forward_hooks for layer in network.modules())
    normalised = nn.Sequential(nn.BatchNorm2d(3), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(3, 2))
    assert network_bytes(normalised, (3, 2, 2), 7) == 4 * (4 * (6 + 8) + 2 * 7 * (12 + 12 + 3 + 3 + 2))


def test_stacked_networks_have_more_trials_in_a_shard_on_a_gpu(declare, digits):
    experiment = declare(5000)
    assert [checked_shard_size(experiment, digits, [device]) for device in (CPU, CUDA)] == [64, 1024]
    assert checked_shard_size(experiment, digits, [CUDA] * 8) == 625
    alone = declare(5000, model={"name": "resnet9", "options": {"width": 2}})
    assert checked_shard_size(alone, digits, [CUDA]) == 64
    long = declare(5000, model={"name": "mlp", "hidden": [2048]}, training={"epochs": 100_000})
    assert checked_shard_size(long, digits, [CUDA]) == int(5e15 / operations_per_trial(long, digits)) < 1024


@pytest.mark.parametrize("name", ["convnet8", "resnet9", "resnet18", "densenet100"])
def test_weights_channels_last_leave_values_and_names_and_suit_the_fused_update(name):
    """The fused update of CUDA refuses gradients and momenta whose strides differ from those of their parameters."""
    torch.manual_seed(0)
    options = {"width": 8} if name in ("convnet8", "resnet9") else {}
    network = build_model(NamedModel(name=name, options=options), (3, 32, 32), 10)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    use_channels_last(stack_networks([network]))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    weights = [layer.weight for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, nesterov=True, fused=True)
    images = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    nn.functional.cross_entropy(network(images), torch.arange(2)).backward()
    optimizer.step()
    for parameter in network.parameters():
        assert parameter.stride() == parameter.grad.stride() == optimizer.state[parameter]["momentum_buffer"].stride()
