"""Features of an experiment's images, as a dataset: the inputs of the last layer of one model.

One model is trained on the whole training set with the experiment's recipe, then frozen. The inputs of its last linear layer are
standardised over the training set, rounded to 255 steps from -4 to 4 standard deviations, and stored as pixels of grey images. So features
can be used wherever a dataset can: a model without hidden layers on them is the last layer, trained alone.

The dataset is put into the store, and the experiment's object `features.json` points to it, so the model is trained once.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from memtail.datasets import Dataset, ImageDataset, as_images
from memtail.datasets.cache_folder import open_if_complete
from memtail.datasets.prepared import write_dataset
from memtail.datasets.sources import InMemoryDataset
from memtail.datasets.staged_dataset import fetch, stage
from memtail.errors import ScoresError, SpecError, StoreError
from memtail.experiment_store import Record
from memtail.models import build_model
from memtail.settings import Settings
from memtail.spec import NamedModel
from memtail.storage import ObjectNotFound, ObjectStore, keys
from memtail.trainers.images.devices import available_devices, reproducible
from memtail.trainers.images.images import device_images
from memtail.trainers.images.stack_trainer import StackedRun

# Range of the pixels, in standard deviations from the mean, and images per forward pass.
_REACH = 4.0
_BATCH = 256
# Largest `features.json` read, in bytes.
_MOST_BYTES = 1 << 16


@dataclass(frozen=True)
class Features:
    """Features of an experiment's images.

    Attributes:
        dataset: the labels and classes of the experiment; images uint8 [n, H, W, 1] with the features row by row, padded with a constant.
        test_accuracy: test accuracy of the model, 0 to 1.
    """

    dataset: ImageDataset
    test_accuracy: float


@dataclass(frozen=True)
class _Pointer:
    """Content of `features.json`.

    Attributes:
        dataset: fingerprint of the dataset of features.
        features: number of features.
        test_accuracy: test accuracy of the model, 0 to 1.
        model_of: hash of all that decides on the model.
    """

    dataset: str
    features: int
    test_accuracy: float
    model_of: str


def features_of(store: ObjectStore, record: Record, images: Callable[[], Dataset]) -> Features:
    """Read the features of an experiment's images from the store, or train the model on this machine.

    Args:
        store: holds the experiment, and receives the features.
        record: the experiment.
        images: opens its images; called only if the model must be trained.

    Raises:
        SpecError: the model does not end with a linear layer, or the device is not on this machine.
        ScoresError: the model diverged, or gives all images the same features.
        StoreError: the store cannot be read or written.
    """
    settings, key = Settings(), keys.features(record.experiment.name)
    try:
        known = json.loads(store.get(key, limit=_MOST_BYTES))
        if known.get("model_of") == _model_of(record):
            pointer = TypeAdapter(_Pointer).validate_python(known)
            return Features(as_images(fetch(store, pointer.dataset, settings.cache, settings.cache_limit)), pointer.test_accuracy)
    except ObjectNotFound:
        pass
    except (ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise StoreError(f"{key}: is damaged ({reason}): remove it, then run the study again") from None
    dataset = images()
    train, test, accuracy = _frozen_features(record, as_images(dataset))
    if not (np.isfinite(train).all() and np.isfinite(test).all() and train.std(0).any()):
        raise ScoresError(
            f"experiment '{record.experiment.name}': the model trained on all examples diverged, so it has no features: "
            f"lower the learning rate"
        )
    pixels = _as_images(train, test)
    made = InMemoryDataset(pixels[0], dataset.train_labels, pixels[1], dataset.test_labels, dataset.classes)
    features = None
    while features is None:  # evicted before it was opened
        features = open_if_complete(ImageDataset.open, write_dataset(made, settings.cache / "datasets"))
    stage(features, store)
    pointer = _Pointer(features.fingerprint, train.shape[1], accuracy, _model_of(record))
    store.put(key, json.dumps(asdict(pointer), indent=1).encode())
    return Features(features, accuracy)


def _model_of(record: Record) -> str:
    """Hash all that decides on the model: dataset, recipe and seed, but not the number of trials."""
    decides = {part: record.canonical[part] for part in ("dataset", "model", "training")}
    return hashlib.sha256(json.dumps([decides, record.experiment.subsets.seed], sort_keys=True).encode()).hexdigest()


class _FeatureModel(nn.Module):
    """A network that keeps the input of its last linear layer in evaluation mode."""

    def __init__(self, network: nn.Module, classes: int) -> None:
        super().__init__()
        self.network = network
        linear = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
        if not linear or linear[-1].out_features != classes:
            raise SpecError(
                f"model '{type(network).__name__}': does not end with a linear layer, so it has no features: choose another model"
            )
        self._features: Tensor | None = None
        linear[-1].register_forward_pre_hook(self._keep)

    def _keep(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not self.training:
            self._features = inputs[0].detach().flatten(1).float()

    def last_features(self) -> Tensor:
        """Return the features of the last batch."""
        if self._features is None:
            raise RuntimeError("no batch was passed in evaluation mode")
        return self._features

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits


def feature_model(image_shape: tuple[int, int, int], classes: int, *, model: dict[str, Any]) -> nn.Module:
    """Build the model of a declaration so that its features can be read; `model` is the experiment's."""
    from memtail.spec import ModelSpec

    return _FeatureModel(build_model(TypeAdapter(ModelSpec).validate_python(model), image_shape, classes), classes)


_Floats = npt.NDArray[np.float32]


def _frozen_features(record: Record, dataset: ImageDataset) -> tuple[_Floats, _Floats, float]:
    """Train the model; returns its features, [n, D] and [q, D], and its test accuracy."""
    experiment = record.experiment
    model = NamedModel(name=f"{__name__}:{feature_model.__name__}", options={"model": experiment.model.model_dump(mode="json")})
    device = available_devices(experiment.execution.device)[0]
    with reproducible(device), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        images, classes = device_images(dataset, device), len(dataset.classes)
        everything = np.arange(dataset.n_train)[None]
        run = StackedRun(experiment.model_copy(update={"model": model}), images, dataset.image_shape, classes, [0], everything)
        accuracy = float(run.train(lambda _: None).test.correct.mean())
        run.stack.eval()
        (network,) = (module for module in run.stack.modules() if isinstance(module, _FeatureModel))
        features = {}
        for split, count in (("train", dataset.n_train), ("test", dataset.n_test)):
            parts = []
            for start in range(0, count, _BATCH):
                with torch.no_grad(), run.autocast:
                    run.stack(images.split(split, start, min(start + _BATCH, count)))
                parts.append(network.last_features().cpu().numpy())
            features[split] = np.concatenate(parts)
    return features["train"], features["test"], accuracy


def _as_images(train: _Floats, test: _Floats) -> list[npt.NDArray[np.uint8]]:
    """Store features as grey images, as square as possible; constant features are left out."""
    mean, spread = train.mean(0), train.std(0)
    varies = np.flatnonzero(spread > 0)
    width = math.ceil(math.sqrt(max(1, len(varies))))
    height = max(1, -(-len(varies) // width))
    images = []
    for features in (train, test):
        standard = (features[:, varies] - mean[varies]) / spread[varies]
        steps = np.rint((np.clip(standard, -_REACH, _REACH) + _REACH) * (254 / (2 * _REACH))).astype(np.uint8)
        padded = np.pad(steps, ((0, 0), (0, height * width - len(varies))), constant_values=127)
        images.append(padded.reshape(len(features), height, width, 1))
    return images
