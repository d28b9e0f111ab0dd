"""What one model makes of the images before its last layer, as a dataset of its own.

One model is trained on the whole training set by an experiment's recipe, then frozen. The inputs of its last linear layer, each feature
standardised over the training set and rounded to 255 steps from -4 to 4 standard deviations, are the pixels of grey images. So whatever
takes a dataset takes features: a model of no hidden layer on them is the last layer, trained alone.

The dataset is put into the store, and the object `features.json` of the experiment names it: the model is trained once.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from memtail.datasets import ImageDataset
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

# Standard deviations to either side that pixels can tell apart, and images per pass.
_REACH = 4.0
_BATCH = 256


@dataclass(frozen=True)
class Features:
    """What the one model makes of an experiment's images.

    Attributes:
        dataset: of the same labels and classes; its images are uint8 [n, H, W, 1], the features row by row, padded with a constant.
        test_accuracy: of the model, 0 to 1.
    """

    dataset: ImageDataset
    test_accuracy: float


def features_of(store: ObjectStore, record: Record, images: Callable[[], ImageDataset]) -> Features:
    """The features of an experiment's images, from the store, or by training the one model here.

    Args:
        store, record: the experiment.
        images: opens its images, if they are needed.

    Raises:
        SpecError: the model has no linear layer at its end, or the device is not here.
        ScoresError: the model diverged, or gives every image the same features.
        StoreError: the store cannot be read or written.
    """
    settings, key = Settings(), keys.features(record.experiment.name)
    try:
        known = json.loads(store.get(key, limit=1 << 16))
        if known.get("model_of") == _model_of(record):
            return Features(fetch(store, str(known["dataset"]), settings.cache, settings.cache_limit), float(known["test_accuracy"]))
    except ObjectNotFound:
        pass
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{key}: is damaged ({error}): remove it, then run the study again") from None
    dataset = images()
    train, test, accuracy = _frozen_features(record, dataset)
    if not (np.isfinite(train).all() and np.isfinite(test).all() and train.std(0).any()):
        raise ScoresError(
            f"experiment '{record.experiment.name}': the model trained on everything diverged, so that it has no features: "
            f"lower the learning rate"
        )
    pixels = _as_images(train, test)
    made = InMemoryDataset(pixels[0], dataset.train_labels, pixels[1], dataset.test_labels, dataset.classes)
    features = ImageDataset.open(write_dataset(made, settings.cache / "datasets"))
    stage(features, store)
    facts = {"dataset": features.fingerprint, "features": train.shape[1], "test_accuracy": accuracy, "model_of": _model_of(record)}
    store.put(key, json.dumps(facts, indent=1).encode())
    return Features(features, accuracy)


def _model_of(record: Record) -> str:
    """What decides on the model: more trials of an experiment leave it as it is, another recipe or other images do not."""
    decides = {part: record.canonical[part] for part in ("dataset", "model", "training")}
    return hashlib.sha256(json.dumps([decides, record.experiment.subsets.seed], sort_keys=True).encode()).hexdigest()


class _Whole(nn.Module):
    """A network as one module, which is trained by itself, and whose last linear layer keeps its input."""

    def __init__(self, network: nn.Module, classes: int) -> None:
        super().__init__()
        self.network = network
        linear = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
        if not linear or linear[-1].out_features != classes:
            raise SpecError(f"model '{type(network).__name__}': has no linear layer at its end, so that there are no features before it")
        self.features: Tensor | None = None
        linear[-1].register_forward_pre_hook(self._keep)

    def _keep(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not self.training:
            self.features = inputs[0].detach().flatten(1).float()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits


def whole(image_shape: tuple[int, int, int], classes: int, *, model: dict[str, Any]) -> nn.Module:
    """A model, by its declaration, that can be asked for its features: `model` of an experiment as `memtail.models` takes it."""
    from pydantic import TypeAdapter

    from memtail.spec import ModelSpec

    return _Whole(build_model(TypeAdapter(ModelSpec).validate_python(model), image_shape, classes), classes)


_Floats = npt.NDArray[np.float32]


def _frozen_features(record: Record, dataset: ImageDataset) -> tuple[_Floats, _Floats, float]:
    """Train the model; features [n, D] and [q, D], and its accuracy on the test set."""
    experiment = record.experiment
    model = NamedModel(name=f"{__name__}:{whole.__name__}", options={"model": experiment.model.model_dump(mode="json")})
    device = available_devices(experiment.execution.device)[0]
    with reproducible(device), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        images, classes = device_images(dataset, device), len(dataset.classes)
        everything = np.arange(dataset.n_train)[None]
        run = StackedRun(experiment.model_copy(update={"model": model}), images, dataset.image_shape, classes, [0], everything)
        accuracy = float(run.train(lambda _: None).test.correct.mean())
        run.stack.eval()
        (network,) = (module for module in run.stack.modules() if isinstance(module, _Whole))
        found = {}
        for split, count in (("train", dataset.n_train), ("test", dataset.n_test)):
            parts = []
            for start in range(0, count, _BATCH):
                with torch.no_grad(), run.autocast:
                    run.stack(images.split(split, start, min(start + _BATCH, count)))
                assert network.features is not None
                parts.append(network.features.cpu().numpy())
            found[split] = np.concatenate(parts)
    return found["train"], found["test"], accuracy


def _as_images(train: _Floats, test: _Floats) -> list[npt.NDArray[np.uint8]]:
    """Features as grey images, as square as they can be; those that never vary are left out."""
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
