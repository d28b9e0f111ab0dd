"""The network of the fastest trainings: its operations, its layers, and that it learns."""

import numpy as np
import pytest
import torch
from torch import fx, nn

from memtail.datasets import prepare
from memtail.errors import SpecError
from memtail.models import build_model, check_model
from memtail.models.layers import GlobalMaxPool
from memtail.spec import NamedModel
from memtail.trainers.images import train_shard
from memtail.trainers.images.stack import is_stackable


def network_of(name, shape=(3, 32, 32), **options):
    return build_model(NamedModel(name=name, options=options), shape, 10)


def operations(name):
    """Floating point operations of all convolutions on an image of CIFAR-10, forward and backward."""
    counts = []

    def count(layer, _, output):
        counts.append(3 * 2 * output[0].numel() * layer.weight[0].numel())

    network = network_of(name).eval()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(count)
    network(torch.zeros(1, 3, 32, 32))
    return sum(counts)


def test_it_takes_a_third_of_the_operations_of_resnet9():
    assert operations("convnet8") < operations("resnet9") / 3
    assert 24 * 35_000 * operations("convnet8") / 450e12 < 1.4  # seconds of a trial at what convolutions reach on an H100


def test_layers_suit_cuda():
    network = network_of("convnet8")
    weights = [layer.weight for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    assert len(weights) == 7
    assert all(weight.shape[0] % 8 == 0 for weight in weights)  # tensor cores compute eight channels at a time
    assert not any("Adaptive" in type(layer).__name__ for layer in network.modules())
    assert not is_stackable(network)


def test_one_graph_holds_the_whole_network():
    class Tracer(fx.Tracer):
        def is_leaf_module(self, module, _):
            return not isinstance(module, nn.Sequential | GlobalMaxPool) and type(module).__module__.startswith("torch.")

    network = network_of("convnet8", (1, 9, 9), width=4).eval()
    traced = fx.GraphModule(network, Tracer().trace(network))
    images = torch.randn(2, 1, 9, 9)
    assert torch.equal(traced(images), network(images))


def test_images_below_nine_pixels_are_refused():
    spec = NamedModel(name="convnet8")
    check_model(spec, (1, 9, 9), 3)
    with pytest.raises(SpecError, match=r"model 'convnet8': cannot be built for images of \[1, 8, 8\]"):
        check_model(spec, (1, 8, 8), 3)


def test_some_hundred_images_are_learned(declare, digits, tmp_path):
    images, labels = digits.train_images[:200].repeat(2, 1).repeat(2, 2), digits.train_labels[:200]
    np.savez(tmp_path / "large.npz", train_images=images, train_labels=labels, test_images=images[:20], test_labels=labels[:20])
    model, training = {"name": "convnet8", "options": {"width": 8, "scale": 0.5}}, {"epochs": 12, "batch_size": 20}
    experiment = declare(2, dataset={"name": "arrays", "root": str(tmp_path / "large.npz")}, model=model, training=training)
    (trained,) = train_shard(experiment, prepare(experiment.dataset), range(1), torch.device("cpu")).metrics
    assert trained.in_subset_accuracy > 0.98
