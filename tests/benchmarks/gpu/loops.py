"""Baseline: a careful loop in plain PyTorch, eager or compiled, for networks that are trained one at a time.

Images are on the device as bytes and batches are augmented there; weights and images are channels last; bfloat16 autocast; fused SGD.
Recipe, subset and augmentation are those of the experiment.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtail.datasets import ImageDataset
from memtail.models import build_model
from memtail.spec import Experiment
from memtail.subsets import membership
from tests.benchmarks.gpu.card import finish

_EVALUATED = 2048


@dataclass(frozen=True)
class Trained:
    """What a loop took and reached.

    Attributes:
        first: seconds of an epoch before the others, with the compilation where there is one.
        image: seconds of an image in training.
        evaluation: seconds of the evaluation on both splits, by the network that is not compiled.
        inside, test: in-subset and test accuracy.
    """

    first: float
    image: float
    evaluation: float
    inside: float
    test: float

    def trial(self, images: int) -> float:
        """Return the seconds of a trial that trains on so many images, from its first step to its outcomes."""
        return self.image * images + self.evaluation


@torch.backends.cudnn.flags(enabled=True, benchmark=True)
def train(experiment: Experiment, data: ImageDataset, device: torch.device, epochs: int, compiled: str | None = None) -> Trained:
    """Train trial 0 for a number of epochs, after one that does not count.

    A compiled loop leaves out the last batch of an epoch, which is smaller, and would have to be compiled by itself.

    Args:
        experiment: model, recipe and subsets.
        data: its dataset.
        device: where to train.
        epochs: their number, also in the schedule.
        compiled: mode of `torch.compile`; eager without one.
    """
    loop = _Loop(experiment, data, device, epochs, compiled)
    began = time.perf_counter()
    loop.epoch()
    finish(device)
    first = time.perf_counter() - began
    loop.start_over()
    began = time.perf_counter()
    for _ in range(epochs):
        loop.epoch()
    finish(device)
    trained = time.perf_counter()
    inside, test = loop.evaluate()
    images = epochs * sum(map(len, loop.batches()))
    return Trained(first, (trained - began) / images, time.perf_counter() - trained, inside, test)


class _Loop:
    def __init__(self, experiment: Experiment, data: ImageDataset, device: torch.device, epochs: int, compiled: str | None) -> None:
        self.recipe, self.device = experiment.training, device
        on_device = {"device": device, "dtype": torch.float32}
        self.mean, self.std = (torch.tensor(values, **on_device).view(1, -1, 1, 1) for values in (data.mean, data.std))
        self.train, self.test = (torch.from_numpy(np.array(x)).to(device) for x in (data.train_images, data.test_images))
        self.train_labels, self.test_labels = (torch.from_numpy(np.array(x)).to(device) for x in (data.train_labels, data.test_labels))
        self.member = membership(experiment.subsets, data.train_labels, [0])[0]
        self.subset = torch.from_numpy(np.flatnonzero(self.member)).to(device)
        torch.manual_seed(0)
        network = build_model(experiment.model, data.image_shape, len(data.classes))
        self.network: nn.Module = network.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self.initial = {name: value.clone() for name, value in self.network.state_dict().items()}
        self.forward = self.network
        if compiled:
            # inductor would compile a dry run for minutes
            backend, mode = ("inductor", compiled) if device.type == "cuda" else ("eager", None)
            self.forward = torch.compile(self.network, fullgraph=True, dynamic=False, backend=backend, mode=mode)
        self.autocast = torch.autocast(device.type, torch.bfloat16)
        self.whole = compiled is not None and len(self.subset) >= self.recipe.batch_size
        self.steps = epochs * len(self.batches())
        self.start_over()

    def batches(self) -> list[Tensor]:
        """Return the examples of each batch of an epoch, in a new order."""
        order = self.subset[torch.randperm(len(self.subset), device=self.device)]
        batches = torch.split(order, self.recipe.batch_size)
        return [batch for batch in batches if not self.whole or len(batch) == self.recipe.batch_size]

    def start_over(self) -> None:
        """Return to the initial weights, and to the first step."""
        self.network.load_state_dict(self.initial)
        sgd = self.recipe.optimizer
        options = {"momentum": sgd.momentum, "weight_decay": sgd.weight_decay, "nesterov": sgd.nesterov}
        self.optimizer = torch.optim.SGD(self.network.parameters(), sgd.lr, **options, fused=True)
        peak, steps = max(1, round(self.recipe.schedule.warmup * self.steps)), self.steps
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: max(0.0, min((step + 1) / peak, (steps - step) / (steps - peak + 1)))
        )

    def epoch(self) -> None:
        """Train an epoch."""
        for batch in self.batches():
            images = _cropped_and_flipped(self._normalised(self.train[batch]), max(1, self.train.shape[1] // 8))
            with self.autocast:
                logits = self.forward(images)
            loss = F.cross_entropy(logits.float(), self.train_labels[batch])
            self.optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            self.optimizer.step()
            self.schedule.step()

    def evaluate(self) -> tuple[float, float]:
        """Return in-subset and test accuracy."""
        self.network.eval()
        train, test = self._correct(self.train, self.train_labels), self._correct(self.test, self.test_labels)
        return float(train[self.member].mean()), float(test.mean())

    @torch.no_grad()
    def _correct(self, images: Tensor, labels: Tensor) -> np.ndarray:
        with self.autocast:
            found = [self.network(self._normalised(part)).argmax(1) for part in torch.split(images, _EVALUATED)]
        return (torch.cat(found) == labels).cpu().numpy()

    def _normalised(self, images: Tensor) -> Tensor:
        """Turn bytes [B, H, W, C] into floats [B, C, H, W], channels last."""
        return images.permute(0, 3, 1, 2).float().sub_(self.mean).div_(self.std)


def _cropped_and_flipped(batch: Tensor, reach: int) -> Tensor:
    """Shift each image of [B, C, H, W] by up to `reach` pixels, and mirror it with probability 1/2; channels last."""
    count, _, height, width = batch.shape
    device = batch.device
    down, right = torch.randint(0, 2 * reach + 1, (2, count, 1, 1), device=device)
    column = torch.arange(width, device=device).expand(count, 1, width)
    column = torch.where(torch.rand(count, 1, 1, device=device) < 0.5, width - 1 - column, column) + right
    row = torch.arange(height, device=device)[:, None] + down
    moved = F.pad(batch, (reach,) * 4)[torch.arange(count, device=device)[:, None, None], :, row, column]
    return moved.permute(0, 3, 1, 2)
