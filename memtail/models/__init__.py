"""Architectures by name: `build_model(spec, input_shape, classes)` returns a freshly initialised network.

A network maps float images [B, C, H, W], or features [B, D], to logits [B, classes]. Of the networks here, only `mlp` takes features.
A `torch.nn.Sequential` of plain layers is trained stacked, many trials at a time (see `memtail.trainers.images.stack`); any other network
is trained one trial at a time.
"""

import difflib
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import structlog
import torch
from torch import nn

from memtail.errors import MemtailError, SpecError
from memtail.models.convnet import convnet8
from memtail.models.densenet import densenet100
from memtail.models.inception import inception
from memtail.models.plain import cnn, mlp
from memtail.models.resnet import resnet9, resnet18, resnet50
from memtail.models.weights import say_replaced, start_from
from memtail.spec import Cnn, Mlp, ModelSpec, NamedModel

log = structlog.get_logger()

#: Shape of an example: (C, H, W) of an image, (D,) of features.
InputShape = tuple[int, ...]

_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "convnet8": convnet8,
    "resnet9": resnet9,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "densenet100": densenet100,
    "inception": inception,
}

# Networks with a choice of stems.
_STEMMED = ("resnet18", "resnet50")
# Smaller images, in pixels a side, get these with a stem for CIFAR, unless they name a stem; from the second size on that is slow.
_SMALL_IMAGE, _MIDDLE_IMAGE = 128, 48


def build_model(spec: ModelSpec, input_shape: InputShape, classes: int) -> nn.Module:
    """Return a network with weights drawn from torch's global generator, or with those from which the model is to start.

    Args:
        spec: the `model` part of an experiment.
        input_shape: of an example.
        classes: number of logits.

    Raises:
        SpecError: the name is unknown, the user's module cannot be imported, or the declared weights do not fit.
        UnsupportedError: the declared weights cannot be downloaded to this machine.
    """
    network = initialised(spec, input_shape, classes)
    if isinstance(spec, NamedModel):
        start_from(spec, own_network(network), classes)
    return network


def own_network(network: nn.Module) -> nn.Module:
    """Return the network whose parameters have the names of the architecture."""
    return network[1] if isinstance(network, _GreyAsColour) else network


def initialised(spec: ModelSpec, input_shape: InputShape, classes: int) -> nn.Module:
    """Return a network with initial weights, whatever weights it is to start from; arguments and errors as of `build_model`."""
    if isinstance(spec, Mlp):
        return mlp(input_shape, classes, spec.hidden)
    if isinstance(spec, Cnn):
        return cnn(input_shape, classes, spec.channels, spec.hidden)
    if ":" in spec.name:
        return _imported(spec.name)(input_shape, classes, **spec.options)
    options = dict(spec.options)
    imagenet = spec.name in _STEMMED and _stem(options, input_shape) == "imagenet"
    if spec.name in _BUILDERS and not imagenet:
        return _BUILDERS[spec.name](input_shape, classes, **options)
    return _torchvision(spec.name, input_shape, classes, options)


def _stem(options: dict[str, Any], input_shape: InputShape) -> str:
    """Take the stem of a residual network out of its options; by default it follows from the size of the images."""
    stem = options.pop("stem", "cifar" if input_shape[1] < _SMALL_IMAGE else "imagenet")
    if stem not in ("cifar", "imagenet"):
        raise SpecError(
            f"model.options.stem: there is no stem '{stem}': use cifar (a 3x3 convolution) or imagenet (a 7x7 convolution of stride 2, "
            f"and pooling)"
        )
    return str(stem)


def check_model(
    spec: ModelSpec, input_shape: InputShape, classes: int, *, within: AbstractContextManager[object] | None = None
) -> nn.Module:
    """Build the network and run one example through it.

    Args:
        spec: the `model` part of an experiment.
        input_shape: of an example.
        classes: number of logits.
        within: context manager of the building and the run, to measure them.

    Returns:
        The network.

    Raises:
        SpecError: the network cannot be built, fails on examples of this shape, or does not return one row of logits per example.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), within or nullcontext():
            network = build_model(spec, input_shape, classes)
            logits = network.eval()(torch.zeros(1, *input_shape))
    except MemtailError:
        raise
    except Exception as error:  # user code may raise any exception
        examples = f"images of {list(input_shape)} [C, H, W]" if len(input_shape) == 3 else f"features {list(input_shape)}"
        raise SpecError(
            f"model '{spec.name}': cannot be built for {examples} and run on one "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}): fix its options, or choose another model or other data"
        ) from None
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, classes):
        shown = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise SpecError(f"model '{spec.name}': gives {shown} for one example, needed are logits [1, {classes}]: fix the model")
    if isinstance(spec, NamedModel):
        say_replaced(spec, own_network(network), classes)
        _say_costly_stem(spec, input_shape)
    return network


def _say_costly_stem(spec: NamedModel, input_shape: InputShape) -> None:
    """Log that images of a middle size get the stem of small ones, with 16 times the operations in all layers but the first."""
    if spec.name in _STEMMED and "stem" not in spec.options and _MIDDLE_IMAGE <= input_shape[1] < _SMALL_IMAGE:
        side = f"{input_shape[1]} pixels"
        log.warning("stem of small images, slow on these: set model.options.stem to imagenet", model=spec.name, side=side)


def _torchvision(name: str, input_shape: InputShape, classes: int, options: dict[str, Any]) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        every = ["mlp", "cnn", *_BUILDERS, *known]
        near = difflib.get_close_matches(name, every, n=1)
        hint = (
            f"did you mean '{near[0]}'?" if near else f"known: mlp, cnn, {', '.join(_BUILDERS)}, torchvision's, or package.module:function"
        )
        raise SpecError(f"model.name: there is no model '{name}': {hint}")
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True, **options}
    network: nn.Module = models.get_model(name, weights=None, num_classes=classes, **options)
    return network if input_shape[0] == 3 else _GreyAsColour(_AsColour(), network)


class _GreyAsColour(nn.Sequential):
    """A network of torchvision's that takes grey images."""


class _AsColour(nn.Module):
    """Repeats a grey channel three times, since torchvision's networks take colour images."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.expand(-1, 3, -1, -1)


def _imported(path: str) -> Callable[..., nn.Module]:
    module, _, function = path.partition(":")
    try:
        builder: Callable[..., nn.Module] = getattr(importlib.import_module(module), function)
    except Exception as error:  # a user's module may raise any exception
        raise SpecError(
            f"model.name: '{path}' cannot be imported ({type(error).__name__}: {' '.join(str(error).split())}): "
            f"it must be package.module:function, importable from here (see PYTHONPATH)"
        ) from error  # its traceback shows where
    return builder
