"""First layers of the residual networks: by the size of the images, or as declared."""

import pytest
import torch
from structlog.testing import capture_logs
from torchvision import models as torchvision_models

from memtail.errors import SpecError
from memtail.models import build_model, check_model
from memtail.spec import NamedModel

SHAPES = {"cifar": [64, 3, 3, 3], "imagenet": [64, 3, 7, 7]}


@pytest.mark.parametrize(("size", "options", "stem"), [
    (32, {}, "cifar"), (128, {}, "imagenet"), (32, {"stem": "imagenet"}, "imagenet"), (128, {"stem": "cifar"}, "cifar"),
])  # fmt: skip
def test_the_stem_follows_from_the_size_unless_it_is_declared(size, options, stem):
    spec = NamedModel(name="resnet18", options=options)
    network = build_model(spec, (3, size, size), 5)
    assert list(network.conv1.weight.shape) == SHAPES[stem]
    assert isinstance(network.maxpool, torch.nn.MaxPool2d) == (stem == "imagenet")
    assert network.eval()(torch.zeros(1, 3, size, size)).shape == (1, 5)
    assert spec.options == options


def test_weights_of_imagenet_fit_small_images_with_its_stem(tmp_path):
    state = torchvision_models.resnet18(weights=None).state_dict()
    torch.save(state, tmp_path / "w.pt")
    network = build_model(NamedModel(name="resnet18", options={"stem": "imagenet"}, weights=str(tmp_path / "w.pt")), (3, 32, 32), 10)
    assert torch.equal(network.conv1.weight, state["conv1.weight"])
    with pytest.raises(SpecError, match=r"model\.weights: .* does not fit the network"):
        build_model(NamedModel(name="resnet18", weights=str(tmp_path / "w.pt")), (3, 32, 32), 10)


@pytest.mark.parametrize("stem", ["small", 3, None])
def test_an_unknown_stem_is_refused(stem):
    with pytest.raises(SpecError, match=rf"^model\.options\.stem: there is no stem '{stem}': use cifar \(a 3x3 convolution\) or imagenet"):
        check_model(NamedModel(name="resnet50", options={"stem": stem}), (3, 32, 32), 5)


@pytest.mark.parametrize(("size", "options", "said"), [
    (32, {}, False), (48, {}, True), (96, {}, True), (128, {}, False), (64, {"stem": "cifar"}, False), (64, {"stem": "imagenet"}, False),
])  # fmt: skip
def test_a_stem_that_is_slow_on_images_of_a_middle_size_is_named(size, options, said):
    with capture_logs() as logs:
        check_model(NamedModel(name="resnet18", options=options), (3, size, size), 5)
    assert [entry["side"] for entry in logs] == [f"{size} pixels"] * said


def test_other_networks_have_no_stem():
    with pytest.raises(SpecError, match="unexpected keyword argument 'stem'"):
        check_model(NamedModel(name="resnet9", options={"stem": "cifar"}), (3, 32, 32), 5)
