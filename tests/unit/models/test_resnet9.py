"""The last pooling of resnet9."""

import numpy as np
import pytest
import torch
from torch import nn

from memtail.models.layers import GlobalMaxPool
from memtail.models.resnet import resnet9

FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (3, 5)], ids=str)
def test_pooling_over_all_places_equals_the_adaptive_one_to_the_bit(size, dtype, memory_format):
    """Whole numbers tie, as zeros after ReLU do: the gradient then belongs to one of the places."""
    torch.manual_seed(0)
    values = torch.randint(-2, 3, (6, 7, *size)).to(dtype).contiguous(memory_format=memory_format)
    values[0, 0] = float("nan")
    values[1] = float("-inf")
    results = []
    for pool in (GlobalMaxPool(), nn.AdaptiveMaxPool2d(1)):
        images = values.clone(memory_format=torch.preserve_format).requires_grad_()
        pooled = pool(images)
        pooled.backward(torch.arange(42.0).view(6, 7, 1, 1).to(dtype))
        results.append((pooled.detach(), images.grad))
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_array_equal(ours.float().numpy(), theirs.float().numpy())


def test_a_trained_step_equals_that_with_the_adaptive_pooling_to_the_bit():
    gradients = []
    for replaced in (False, True):
        torch.manual_seed(0)
        network = resnet9((3, 16, 16), 5, width=4)
        if replaced:
            place = next(index for index, layer in enumerate(network) if isinstance(layer, GlobalMaxPool))
            network[place] = nn.AdaptiveMaxPool2d(1)
        images = torch.randn(8, 3, 16, 16).contiguous(memory_format=torch.channels_last)
        nn.functional.cross_entropy(network(images), torch.arange(8) % 5).backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))
