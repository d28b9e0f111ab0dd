"""Rows of single networks: trials of convolutional ones beside plain PyTorch, steps of ResNet-50, and stacks of small ones."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch.nn import functional as F

from memtail import datasets
from memtail.datasets import ImageDataset, as_images
from memtail.errors import TrainingStopped
from memtail.models import build_model
from memtail.models.plain import cnn
from memtail.spec import Experiment
from memtail.trainers.images import train_shard
from memtail.trainers.images.devices import reproducible
from memtail.trainers.images.stack import join_parameters, stack_networks, use_channels_last
from tests.benchmarks.gpu import loops
from tests.benchmarks.gpu.card import Floor, finish, seconds_of
from tests.benchmarks.gpu.data import dataset, made_up
from tests.benchmarks.gpu.experiments import declaration
from tests.benchmarks.gpu.results import Figure
from tests.benchmarks.gpu.runner import Bench

_EPOCHS = 24
# Epochs of a compiled loop, whose accuracy is that of the eager one; a trial is as many times longer as it has more images.
_COMPILED_EPOCHS = 4


def resnet9(bench: Bench) -> Iterator[Figure]:
    """Measure a trial on CIFAR-10 by memtail, and by plain PyTorch: eager, compiled, and compiled with CUDA graphs."""
    yield from _trial(bench, "resnet9", "at most 3.5 times its FLOP floor", "at least 1.3", ["default", "reduce-overhead"])


def convnet8(bench: Bench) -> Iterator[Figure]:
    """Measure a trial of the lighter network likewise."""
    yield from _trial(bench, "convnet8", "5 s; 99% in-subset", "", ["default"])


def resnet50(bench: Bench) -> Iterator[Figure]:
    """Measure a step of ResNet-50 at the size of CIFAR-100, by memtail and by plain PyTorch."""
    batch, steps, epochs = (8, 2, 2) if bench.tiny else (512, 20, 4)
    data = made_up(bench.folder / "hundred.npz", -(-steps * batch * 10 // 7), 8 if bench.tiny else 32, 3, 4 if bench.tiny else 100)
    name = "resnet9" if bench.tiny else "resnet50"
    experiment, images = _opened(_declared(bench, name, data, epochs=160, batch_size=batch))
    floor = _floor(bench, experiment, images, batch)
    ours, first = _steps(experiment, images, torch.device(bench.card.device), epochs)
    yield Figure("memtail, a step", ours * 1e3, "ms", _in_milliseconds(floor), note=f"batch {batch}; first epoch {first:.1f} s")
    for name, mode in (("eager PyTorch", None), ("compiled PyTorch", "default")):
        loop = loops.train(experiment, images, torch.device(bench.card.device), epochs, mode)
        theirs = loop.image * batch
        yield Figure(f"{name}, a step", theirs * 1e3, "ms", _in_milliseconds(floor), note=f"first epoch {loop.first:.1f} s")
        goal = "at least 0.87" if mode else ""
        yield Figure(f"{name} over memtail", theirs / ours, "x", goal=goal)


def stacks(bench: Bench) -> Iterator[Figure]:
    """Measure a step of small CNNs: stacked, as grouped convolutions, against one at a time."""
    device, batch = torch.device(bench.card.device), 8 if bench.tiny else 128
    with reproducible(device):
        for width in (1, 2) if bench.tiny else (1, 2, 4, 8, 16, 32, 64):
            step = _stack_step(width, batch, device)
            launched = seconds_of(step, device) / width
            replayed = seconds_of(_captured(step, device), device) / width
            what = "one small CNN at a time" if width == 1 else f"{width} small CNNs as grouped convolutions"
            yield Figure(f"{what}, a step of each", replayed * 1e6, "us", note=f"captured; {launched * 1e6:.0f} us launched by Python")


def _trial(bench: Bench, model: str, goal: str, faster: str, modes: list[str]) -> Iterator[Figure]:
    experiment, images = _opened(_declared(bench, model, dataset("cifar10", bench), epochs=_EPOCHS))
    device, recipe = torch.device(bench.card.device), experiment.training
    trained = recipe.epochs * round(experiment.subsets.fraction * images.n_train)
    floor = _floor(bench, experiment, images, trained)
    times = []
    for trial in range(2):
        began = time.perf_counter()
        (entry,) = train_shard(experiment, images, range(trial, trial + 1), device).metrics
        times.append(time.perf_counter() - began)
    reached = f"{entry.in_subset_accuracy:.2%} in-subset, {entry.test_accuracy:.2%} test"
    peak = f"; peak {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB" if device.type == "cuda" else ""
    yield Figure("memtail, a trial", times[1], floor=floor, goal=goal, note=f"{reached}; the first of the process {times[0]:.1f} s{peak}")
    for mode in [modes[0], None, *modes[1:]]:
        loop = loops.train(experiment, images, device, min(recipe.epochs, _COMPILED_EPOCHS) if mode else recipe.epochs, mode)
        name = "eager PyTorch" if mode is None else f"compiled PyTorch ({mode})"
        note = f"first epoch {loop.first:.1f} s" if mode else f"{loop.inside:.2%} in-subset, {loop.test:.2%} test"
        yield Figure(f"{name}, a trial", loop.trial(trained), floor=floor, note=note)
        yield Figure(f"{name} over memtail", loop.trial(trained) / times[1], "x", goal=faster if mode else "")


def _declared(bench: Bench, model: str, data: dict[str, Any], **training: Any) -> dict[str, Any]:
    declared = declaration("cifar10", bench, data, trials=2000, **training)
    return declared | {"model": {"name": model, "options": {"width": 4} if bench.tiny else {}}}


def _opened(declared: dict[str, Any]) -> tuple[Experiment, ImageDataset]:
    experiment = Experiment.parse(declared)
    return experiment, as_images(datasets.prepare(experiment.dataset))


def _floor(bench: Bench, experiment: Experiment, images: ImageDataset, count: int) -> Floor:
    """Return the floor of training on a number of images."""
    return bench.card.training(build_model(experiment.model, images.image_shape, len(images.classes)), images.image_shape, count)


def _in_milliseconds(floor: Floor) -> Floor:
    return Floor(floor.by_operations * 1e3, floor.by_bytes * 1e3)


def _steps(experiment: Experiment, images: ImageDataset, device: torch.device, epochs: int) -> tuple[float, float]:
    """Return the seconds of a step in memtail's training, and those of its first epoch, before which all is prepared."""
    began, ends = time.perf_counter(), []

    def ended(_: object) -> None:
        finish(device)
        ends.append(time.perf_counter())

    with suppress(TrainingStopped):
        train_shard(experiment, images, range(1), device, on_progress=ended, stop=lambda: len(ends) > epochs)
    steps = -(-round(experiment.subsets.fraction * images.n_train) // experiment.training.batch_size)
    return (ends[-1] - ends[0]) / (len(ends) - 1) / steps, ends[0] - began


def _stack_step(width: int, batch: int, device: torch.device) -> Callable[[], None]:
    """Return a step of stacked CNNs, always on the same images."""
    torch.manual_seed(0)
    stack = stack_networks([cnn((1, 28, 28), 10, [16, 32], 128) for _ in range(width)]).to(device).train()
    if device.type == "cuda":
        use_channels_last(stack)
    weights = join_parameters(stack)
    gradients, momenta = weights.grad, torch.zeros_like(weights)
    images = torch.randn(width, batch, 1, 28, 28, device=device)
    labels = torch.randint(0, 10, (width * batch,), device=device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)

    def step() -> None:
        gradients.zero_()
        with autocast:
            logits = stack(images)
        torch.autograd.backward(F.cross_entropy(logits.flatten(0, 1).float(), labels))
        with torch.no_grad():
            momenta.mul_(0.9).add_(gradients)
            weights.add_(momenta, alpha=-0.001)

    return step


def _captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Return a replay of a step as a CUDA graph; elsewhere the step."""
    if device.type != "cuda":
        return step
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        step()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
