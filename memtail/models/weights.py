"""Fine-tuning: weights that a network starts from, and parameters that stay as they are.

Weights are a state dict: a file of `torch.save` or of safetensors, or published ones of torchvision. The bytes of a file run no code.
"""

import re
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import structlog
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from memtail.digests import file_digest
from memtail.errors import SpecError, UnsupportedError
from memtail.spec import NamedModel

log = structlog.get_logger()

# Outputs beside the logits, which torchvision's networks have in training only, and memtail's never.
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
# Most names of parameters in a message.
_SHOWN = 3


def start_from(spec: NamedModel, network: nn.Module, classes: int) -> None:
    """Load the weights of a declared model into a network, and freeze the declared parameters.

    A last layer for another number of classes keeps its initial weights (see `say_replaced`). Every other parameter must be in the weights,
    with its shape.

    Args:
        spec: the `model` part of an experiment.
        network: the network, initialised; changed in place.
        classes: number of logits.

    Raises:
        SpecError: the file cannot be read, or does not fit the network; or there is nothing to freeze, or nothing left to train.
        UnsupportedError: weights of torchvision cannot be downloaded to this machine.
    """
    if spec.weights:
        _load(network, _state(spec), spec.weights, classes)
    if spec.freeze:
        _freeze(network, spec.freeze)


def say_replaced(spec: NamedModel, network: nn.Module, classes: int) -> None:
    """Log which parameters of a network do not start from the declared weights, since these are for other classes.

    Args:
        spec: the `model` part of an experiment.
        network: a network that starts from its weights.
        classes: number of logits.
    """
    if spec.weights and (head := _head(network.state_dict(), state := _state(spec), classes)):
        before = f"{state[head[0]].shape[0]} -> {classes}"
        log.info("last layer not loaded, it starts from initial weights", weights=spec.weights, parameters=", ".join(head), classes=before)


def _load(network: nn.Module, state: dict[str, Tensor], source: str, classes: int) -> None:
    own = network.state_dict()
    state = {name: value for name, value in state.items() if name in own or not name.startswith(_AUXILIARY)}
    head = _head(own, state, classes)
    faults = [f"{name}, which the network does not have" for name in state if name not in own]
    faults += [f"no {name}" for name in own if name not in state and not name.endswith("num_batches_tracked")]
    faults += [
        f"{name} of {list(state[name].shape)}, and the network's is {list(value.shape)}"
        for name, value in own.items()
        if name in state and name not in head and state[name].shape != value.shape
    ]
    if faults:
        more = f", and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise SpecError(
            f"model.weights: {source} does not fit the network: it has {'; '.join(faults[:_SHOWN])}{more}: save the state_dict() of a "
            f"network of this architecture, for images of this size"
        )
    network.load_state_dict({name: value for name, value in state.items() if name not in head}, strict=False)


def _head(own: dict[str, Tensor], state: dict[str, Tensor], classes: int) -> list[str]:
    """Return the parameters that differ from those of the weights in nothing but the number of classes."""
    shapes = {name: (value.shape, state[name].shape) for name, value in own.items() if name in state}
    return [name for name, (a, b) in shapes.items() if len(a) == len(b) > 0 and a[0] == classes != b[0] and a[1:] == b[1:]]


def _state(spec: NamedModel) -> dict[str, Tensor]:
    file = spec.weights_file
    if file is None:
        return _published(spec.name, str(spec.weights))
    try:
        return _saved(file, file.stat().st_mtime_ns)
    except OSError as error:
        raise SpecError(f"model.weights: {file} cannot be read ({error.strerror})") from None


@lru_cache(maxsize=1)  # for the next trial
def _saved(file: Path, modified: int) -> dict[str, Tensor]:
    try:
        with file.open("rb") as opened:
            beginning = opened.read(9)
        state: Any = _safetensors(file) if beginning[8:] == b"{" else torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damaged bytes make the parsers raise anything
        reason = " ".join(str(error).split())[:200]
        raise SpecError(f"model.weights: {file} holds no weights ({reason}): save the state_dict() by torch.save or safetensors") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        shown = f"keys {', '.join(map(str, list(state)[:5]))}" if isinstance(state, dict) else type(state).__name__
        raise SpecError(f"model.weights: {file} holds no state dict of tensors alone ({shown}): save model.state_dict()")
    return state


def _safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    state: dict[str, Tensor] = load_file(file)
    return state


@lru_cache(maxsize=1)
def _published(name: str, weights: str) -> dict[str, Tensor]:
    from torchvision import models

    try:
        known = models.get_model_weights(name)
    except ValueError:
        raise SpecError(f"model.weights: torchvision has no weights {weights} for '{name}': name a file with a state dict") from None
    if weights not in known.__members__:
        raise SpecError(f"model.weights: there are no weights {weights} of {name}: known are {', '.join(each.name for each in known)}")
    try:
        _remove_replaced(known[weights].url)
        state: dict[str, Tensor] = known[weights].get_state_dict(progress=False, check_hash=True, map_location="cpu")
    except (OSError, HTTPException, RuntimeError) as error:  # no network, no space; or other bytes than were published
        raise UnsupportedError(
            f"weights {weights} of {name} cannot be downloaded ({' '.join(str(error).split())[:200]}): check the network, or save them to "
            f"a file and name that in model.weights"
        ) from error
    return state


def _remove_replaced(url: str) -> None:
    """Remove a downloaded file of other bytes than were published, as user code can leave: torch checks those it downloads only."""
    file = Path(torch.hub.get_dir(), "checkpoints", PurePosixPath(urlsplit(url).path).name)
    published = re.search(r"-([0-9a-f]{8,})\.", file.name)  # the beginning of its SHA-256
    if published is None or not file.exists() or (digest := file_digest(file)).startswith(published[1]):
        return
    log.warning("published weights were replaced, downloading them again", file=str(file), sha256=digest, published=published[1])
    file.unlink(missing_ok=True)


def _freeze(network: nn.Module, prefixes: list[str]) -> None:
    """Exclude parameters from training, and keep the statistics of batch normalisation among them."""
    for prefix in prefixes:
        within = f"{prefix.rstrip('.')}."
        parameters = [parameter for name, parameter in network.named_parameters() if f"{name}.".startswith(within)]
        if not parameters:
            parts = ", ".join(name for name, _ in network.named_children())
            raise SpecError(f"model.freeze: the network has no parameter whose name begins with '{prefix}': its parts are {parts}")
        for parameter in parameters:
            parameter.requires_grad_(False)
        for name, layer in network.named_modules():
            if isinstance(layer, _BatchNorm) and f"{name}.".startswith(within):
                layer.register_forward_pre_hook(_keep_statistics)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise SpecError(f"model.freeze: {', '.join(prefixes)} leave no parameter to train: leave out the last layer")


def _keep_statistics(layer: nn.Module, inputs: Any) -> None:
    layer.eval()
