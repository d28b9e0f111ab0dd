"""Trained models that were kept: their weights in the format safetensors, with what is needed to use them.

A file holds the state dict of one network, under the names of the plain architecture, so that `load_state_dict` takes it. Its metadata has
one key, `memtail`: JSON with the fields of `About`.
"""

import json
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from memtail.errors import DatasetError, ForeignObjectError, ObjectNotFound, SpecError
from memtail.experiment_store import ExperimentStore
from memtail.models import initialised, own_network
from memtail.spec import ModelSpec
from memtail.storage import keys
from memtail.storage.open import is_url, open_store

# Bytes before the header of a file of safetensors, which hold its length.
_LENGTH = 8


@dataclass(frozen=True)
class About:
    """Description of a trained model.

    Attributes:
        fingerprint: of the experiment.
        trial: the trial.
        input_shape: of an example, (C, H, W) of an image, (D,) of features.
        classes: number of logits.
        shift, scale: float32 [C] or [D]; the network takes (value + shift) * scale.
    """

    fingerprint: str
    trial: int
    input_shape: tuple[int, ...]
    classes: int
    shift: list[float]
    scale: list[float]


def packed(state: Mapping[str, Tensor], about: About) -> bytes:
    """Return the file of a trained model; equal models give equal bytes.

    Args:
        state: its state dict.
        about: its description.

    Raises:
        SpecError: the state dict holds something else than tensors.
    """
    from safetensors.torch import save

    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise SpecError(f"record.models: '{name}' of the network's state dict is no tensor, so its models cannot be kept: remove it")
    tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}  # tied ones in arrays of their own
    file: bytes = save(tensors, {"memtail": json.dumps(asdict(about))})
    return file


class TrainedModel(nn.Module):
    """A trained model that takes examples as their dataset holds them.

    Args:
        network: the network, which takes normalised examples.
        about: its description.

    Attributes:
        network: the plain network: float32 [B, C, H, W] or [B, D], as `normalised` returns them, to logits [B, classes].
        about: its description.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, network: nn.Module, about: About) -> None:
        super().__init__()
        self.network, self.about = network, about
        for name in ("shift", "scale"):
            self.register_buffer(name, torch.tensor(getattr(about, name), dtype=torch.float32), persistent=False)

    def forward(self, examples: Tensor) -> Tensor:
        """Map images uint8 [B, H, W, C], or features float32 [B, D], to logits [B, classes].

        Raises:
            DatasetError: the examples have another shape or type.
        """
        logits: Tensor = self.network(self.normalised(examples))
        return logits

    def normalised(self, examples: Tensor) -> Tensor:
        """Return what the network takes: float32 [B, C, H, W], or [B, D].

        Raises:
            DatasetError: the examples have another shape or type than those of the dataset.
        """
        are_images = len(self.about.input_shape) == 3
        shape = (*self.about.input_shape[1:], self.about.input_shape[0]) if are_images else self.about.input_shape
        if not isinstance(examples, Tensor) or examples.shape[1:] != shape or are_images != (examples.dtype == torch.uint8):
            expected = f"images uint8 [B, {', '.join(map(str, shape))}]" if are_images else f"features float32 [B, {shape[0]}]"
            given = f"{getattr(examples, 'dtype', type(examples).__name__)} {list(getattr(examples, 'shape', ()))}"
            raise DatasetError(f"the model takes a tensor of {expected}, as its dataset holds them, not {given}: convert the examples")
        return normalised(examples, self.shift, self.scale, are_images)


def normalised(examples: Tensor, shift: Tensor, scale: Tensor, are_images: bool) -> Tensor:
    """Normalise images [..., H, W, C] to float32 [..., C, H, W], channels last in memory; features keep their shape.

    Args:
        examples: images uint8, or features float32.
        shift: float32 [C] or [D].
        scale: float32 [C] or [D]; values become (value + shift) * scale.
        are_images: whether they are images.
    """
    values = examples.to(torch.float32, copy=True).add_(shift).mul_(scale)
    return values.movedim(-1, -3) if are_images else values


def load_model(path: str | Path, trial: int) -> TrainedModel:
    """Load the model of a trial, in evaluation mode, on the CPU.

    Of a network of your own, the function that the experiment names is imported and called in this process.

    Args:
        path: `STORE/experiments/NAME`; the store is a folder or a bucket.
        trial: a trial whose model was kept: see `record.models` in the experiment file.

    Returns:
        The model, which takes examples as the dataset holds them.

    Raises:
        ObjectNotFound: there is no such experiment, or no model of the trial.
        ForeignObjectError: the model is damaged, or of another experiment.
        SpecError: the network cannot be built, or differs from the trained one.
        StoreError: the store cannot be read.
        TypeError: `trial` is no whole number.
    """
    whole = str(path) if is_url(path) else str(Path(path).absolute())
    address, separator, name = whole.rstrip("/").rpartition(f"/{keys.experiments()}")
    if not separator:
        raise SpecError(f"{path}: names no experiment: give STORE/experiments/NAME")
    experiment_store = ExperimentStore(open_store(address, verify=False), name)
    record, key = experiment_store.read_record(), keys.model(name, operator.index(trial))
    try:
        data = experiment_store.store.get(key)
    except ObjectNotFound:
        count = sum(1 for _ in experiment_store.store.list(keys.models(name)))
        held = f"{count} models are there, of the first trials" if count else "there are none"
        raise ObjectNotFound(
            f"experiment '{name}' keeps no model of trial {trial}, {held}: record.models keeps those of trials that are trained afterwards"
        ) from None
    state, about = _unpacked(data, key)
    if (about.fingerprint, about.trial) != (record.fingerprint, trial):
        raise ForeignObjectError(f"{key}: is the model of another experiment or trial: remove it")
    return TrainedModel(_rebuilt(record.experiment.model, state, about), about).eval()


def _unpacked(data: bytes, key: str) -> tuple[dict[str, Tensor], About]:
    from safetensors.torch import load

    try:
        header = json.loads(data[_LENGTH : _LENGTH + int.from_bytes(data[:_LENGTH], "little")])
        return load(data), TypeAdapter(About).validate_json(header["__metadata__"]["memtail"])
    except ValidationError as error:
        reason = f"{error.error_count()} errors in its description"
    except Exception as error:  # of the parser, which has exceptions of its own
        reason = " ".join(str(error).split())[:200]
    raise ForeignObjectError(f"{key}: is damaged ({reason}): remove it, and train the trial again")


def _rebuilt(spec: ModelSpec, state: dict[str, Tensor], about: About) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        network = initialised(spec, about.input_shape, about.classes)
    try:
        own_network(network).load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise SpecError(f"model.name: '{spec.name}' is not the network that was trained ({reason}): use the code of that time") from None
    return network
