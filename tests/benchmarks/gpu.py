"""All GPU measurements in one run: checks of the CUDA path, then one table.

    tests/benchmarks/gpu.sh                               on a machine with one CUDA GPU; datasets are searched in MEMTAIL_DATA
    python -m tests.benchmarks.gpu --dry-run              every step at tiny sizes on the CPU

Shards are trained in this process, after an untimed one that starts the device. Times are from initial weights to the
outcomes of the final models on both splits. If a check fails, the rows are still measured, and the exit code is 1.
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from memtail import datasets
from memtail.datasets import ImageDataset
from memtail.estimators import Memorization, high_influence_pairs, top_influencers
from memtail.models import build_model
from memtail.settings import Settings
from memtail.spec import DatasetSpec, Experiment, NamedModel
from memtail.statistics import cooccurrence
from memtail.statistics.cooccurrence_torch import count_block, words_on
from memtail.subsets import membership
from memtail.trainers.images import train_shard
from memtail.trials import TrialBatch
from tests.benchmarks.bench import Row, show
from tests.benchmarks.counting import _packed as random_statistics

EXAMPLES = Path(__file__).parents[2] / "examples"
_FOLDERS = {"mnist": "MNIST/raw", "cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
_STACK = 64


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurements: those of the targets on a GPU, minimal ones in a dry run."""

    device: torch.device
    mnist_trials: int
    image_trials: int
    checked_trials: int
    repetitions: int
    trials: int
    n: int
    q: int
    tiny: Path | None = None


def main() -> None:
    """Check, measure and print."""
    parser = argparse.ArgumentParser(description="GPU benchmarks of memtail")
    parser.add_argument("--dry-run", action="store_true", help="every step at tiny sizes on the CPU")
    if parser.parse_args().dry_run:
        with tempfile.TemporaryDirectory() as folder:
            measure(Sizes(torch.device("cpu"), 3, 1, 4, 1, 130, 300, 100, Path(folder)))
    elif torch.cuda.is_available():
        measure(Sizes(torch.device("cuda", 0), 2000, 3, 64, 5, 4000, 50_000, 10_000))
    else:
        sys.exit("gpu.py: no CUDA device on this machine: run it on a machine with a GPU, or with --dry-run")


def measure(sizes: Sizes) -> None:
    """Run all checks and measure all rows; exits with 1 if a check failed."""
    print(machine(sizes.device), flush=True)
    failed = [name for name, passed in checks(sizes) if not passed]
    rows: list[Row] = []
    for row in (mnist(sizes), images("cifar10", sizes), images("cifar100", sizes), influence(sizes)):
        rows += row
    print(machine(sizes.device))
    show(rows)
    if failed:
        sys.exit(f"gpu.py: FAILED: {'; '.join(failed)}")


def machine(device: torch.device) -> str:
    """Return the device's name, its driver and torch's version."""
    if device.type != "cuda":
        return f"dry run on the CPU, torch {torch.__version__}"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return f"{torch.cuda.get_device_name(device)}, driver {driver}, torch {torch.__version__} (CUDA {torch.version.cuda})"


def checks(sizes: Sizes) -> Iterator[tuple[str, bool]]:
    """Check the results of the device; yields and prints the name of each check, and whether it passed."""
    count, device = sizes.checked_trials, sizes.device
    digits = datasets.prepare(DatasetSpec(name="digits"))
    model = {"name": "mlp", "hidden": [256]}
    mlp = Experiment.parse(
        {"name": "c", "dataset": {"name": "digits"}, "model": model, "training": {"epochs": 5}, "record": {"margins": True}}
    )
    training = {"epochs": 2, "augmentation": "crop-flip", "precision": "auto"}
    resnet = mlp.model_copy(
        update={
            "model": NamedModel(name="resnet9", options={"width": 64 if device.type == "cuda" else 4}),
            "training": Experiment.parse({"name": "c", "dataset": {"name": "digits"}, "training": training}).training,
        }
    )
    for experiment in (_tuned(mlp, mlp.dataset), mlp):
        stacked, again = (train_shard(experiment, digits, range(count), device) for _ in range(2))
        precision = experiment.training.precision
        yield _checked(f"training a stack of networks twice gives equal bits, precision {precision}", _same(stacked, again))
    once, again = (train_shard(resnet, digits, range(1), device) for _ in range(2))
    yield _checked("training a ResNet-9 trial twice gives equal bits", _same(once, again))

    alone = [train_shard(mlp, digits, range(trial, trial + 1), device) for trial in range(count)]
    members = (stacked.membership == np.concatenate([batch.membership for batch in alone])).all()
    difference = _accuracy([stacked])[1] - _accuracy(alone)[1]
    yield _checked(f"shards of 1 and of {count} have equal subsets", bool(members))
    yield _checked(f"shards of 1 and of {count} agree in test accuracy ({difference:+.2%})", abs(difference) < 0.01)

    first = range(min(count, 16))
    here, there = (_accuracy([train_shard(mlp, digits, first, where)])[1] for where in (device, torch.device("cpu")))
    yield _checked(f"{device.type} and CPU agree in test accuracy ({here:.2%} and {there:.2%})", abs(here - there) < 0.01)


def mnist(sizes: Sizes) -> list[Row]:
    """Measure all trials of the demo of the paper's authors."""
    experiment = Experiment.load(EXAMPLES / "mnist.yaml")
    if sizes.tiny:
        experiment = _tuned(experiment, DatasetSpec(name="digits"), epochs=2)
    elif (found := find("mnist")) is None:
        return _no_data("mnist")
    else:
        experiment = _tuned(experiment, found)
    dataset = datasets.prepare(experiment.dataset)
    total = sizes.mnist_trials
    train_shard(_tuned(experiment, experiment.dataset, epochs=1), dataset, range(min(total, _STACK)), sizes.device)
    _reset_peak(sizes.device)
    batches, began = [], time.perf_counter()
    for start in range(0, total, _STACK):
        batches.append(train_shard(experiment, dataset, range(start, min(start + _STACK, total)), sizes.device))
        print(f"mnist: {min(start + _STACK, total)} trials in {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - began
    note = f"{_accuracies(_accuracy(batches))}; precision auto"
    return [Row("mnist-mlp", f"{total:,} trials", "60 s", [seconds], peak_mib=_peak(sizes.device), note=note)]


def images(name: str, sizes: Sizes) -> list[Row]:
    """Measure ResNet-9 by the recipe of examples/cifar10.yaml against a plain PyTorch loop on the same subsets."""
    experiment = Experiment.load(EXAMPLES / "cifar10.yaml")
    if sizes.tiny:
        experiment = _tuned(experiment, _made_up(sizes.tiny / f"{name}.npz"), epochs=2, batch_size=32)
        experiment = experiment.model_copy(update={"model": NamedModel(name="resnet9", options={"width": 4})})
    elif (found := find(name)) is None:
        return _no_data(name)
    else:
        experiment = _tuned(experiment, found)
    dataset = datasets.prepare(experiment.dataset)
    short = _tuned(experiment, experiment.dataset, epochs=1)
    train_shard(short, dataset, range(1), sizes.device)
    plain_loop(short, dataset, 0, sizes.device)
    ours, theirs, batches, accuracies = [], [], [], []
    for trial in range(sizes.image_trials):
        _reset_peak(sizes.device)
        began = time.perf_counter()
        batches.append(train_shard(experiment, dataset, range(trial, trial + 1), sizes.device))
        ours.append(time.perf_counter() - began)
        peak = _peak(sizes.device)
        began = time.perf_counter()
        accuracies.append(plain_loop(experiment, dataset, trial, sizes.device))
        theirs.append(time.perf_counter() - began)
        print(f"{name}: trial {trial} in {ours[-1]:.2f} s, plain PyTorch {theirs[-1]:.2f} s", file=sys.stderr, flush=True)
    inside, test = np.mean(accuracies, axis=0)
    note = f"ours {_accuracies(_accuracy(batches))}; plain {_accuracies((inside, test))}"
    if experiment.dataset.name == "folder":
        note += "; images from JPEG"
    target = "5 s; 99% in-subset, 92% test" if name == "cifar10" else "5 s"
    return [Row(f"{name}-resnet9", "trial", target, ours, theirs, "plain PyTorch", peak, note)]


def influence(sizes: Sizes) -> list[Row]:
    """Measure the pairs and the top 10 of each test example on the device against the compiled kernels, whose results must be equal."""
    n, q = sizes.n, sizes.q
    rng = np.random.default_rng(0)
    packed = random_statistics(rng, sizes.trials, n, q)
    mem, half = rng.random(n) * 0.375, np.full(n, sizes.trials // 2)
    memorization = Memorization(mem, mem, mem, mem, half, half)
    train_labels, test_labels = np.arange(n) % 100, np.arange(q) % 100

    def everything(device: str | None) -> tuple[float, tuple[np.ndarray, ...]]:
        began = time.perf_counter()
        top = top_influencers(packed, 10, device=device)
        pairs = high_influence_pairs(packed, memorization, train_labels, test_labels, infl_threshold=0.05, device=device)
        return time.perf_counter() - began, (*top, pairs.train, pairs.test, pairs.influence, pairs.influence_se)

    left, right = packed.membership[:, :600], packed.test_correct[:, :600]
    counts = count_block(words_on(left, sizes.device), words_on(right, sizes.device)).cpu().numpy()
    if not (counts == cooccurrence(left, right)).all():
        sys.exit("gpu.py: FAILED: co-occurrence counts on the device differ from those of the compiled kernel")
    everything(None)  # compiles
    on_cpu, expected = everything(None)
    everything(str(sizes.device))
    _reset_peak(sizes.device)
    times = []
    for _ in range(sizes.repetitions):
        seconds, found = everything(str(sizes.device))
        times.append(seconds)
    if not all(np.array_equal(one, other, equal_nan=True) for one, other in zip(found, expected, strict=True)):
        sys.exit("gpu.py: FAILED: influences on the device differ from those of the compiled kernels")
    note = f"t = {sizes.trials}, n = {n:,}, q = {q:,}; {len(found[2]):,} pairs, and the top 10 of each test example; equal to the bit"
    return [Row("influence", "pass", "1 s", times, [on_cpu], "CPU", _peak(sizes.device), note)]


@torch.backends.cudnn.flags(enabled=True, benchmark=True)
def plain_loop(experiment: Experiment, dataset: ImageDataset, trial: int, device: torch.device) -> tuple[float, float]:
    """Train a model by a careful plain loop (images on the device, bfloat16, channels last); return in-subset and test accuracy."""
    recipe, sgd = experiment.training, experiment.training.optimizer
    mean, std = (torch.tensor(values, device=device) for values in (dataset.mean, dataset.std))

    def normalised(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(array)).to(device).float().sub_(mean).div_(std).permute(0, 3, 1, 2)

    train, test = normalised(dataset.train_images), normalised(dataset.test_images)
    train_labels, test_labels = (torch.from_numpy(np.array(x)).to(device) for x in (dataset.train_labels, dataset.test_labels))
    member = membership(experiment.subsets, dataset.train_labels, [trial])[0]
    subset = torch.from_numpy(np.flatnonzero(member)).to(device)
    torch.manual_seed(trial)
    network = build_model(experiment.model, dataset.image_shape, len(dataset.classes))
    model: nn.Module = network.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), sgd.lr, sgd.momentum, weight_decay=sgd.weight_decay, nesterov=sgd.nesterov, fused=True)
    steps = recipe.epochs * -(-len(subset) // recipe.batch_size)
    peak = max(1, round(recipe.schedule.warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / peak, (steps - step) / (steps - peak + 1)))
    autocast = torch.autocast(device.type, torch.bfloat16)
    for _ in range(recipe.epochs):
        for batch in torch.split(subset[torch.randperm(len(subset), device=device)], recipe.batch_size):
            with autocast:
                logits = model(_cropped_and_flipped(train[batch], max(1, train.shape[-1] // 8)))
            loss = F.cross_entropy(logits.float(), train_labels[batch])
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    model.eval()

    def correct(inputs: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
        with torch.no_grad(), autocast:
            return (torch.cat([model(part).argmax(1) for part in torch.split(inputs, 2048)]) == labels).cpu().numpy()

    return float(correct(train, train_labels)[member].mean()), float(correct(test, test_labels).mean())


def _cropped_and_flipped(batch: torch.Tensor, reach: int) -> torch.Tensor:
    """Shift each image of [B, C, H, W] by up to `reach` pixels, and mirror it with probability 1/2; channels last."""
    count, _, height, width = batch.shape
    device = batch.device
    down, right = torch.randint(0, 2 * reach + 1, (2, count, 1, 1), device=device)
    column = torch.arange(width, device=device).expand(count, 1, width)
    column = torch.where(torch.rand(count, 1, 1, device=device) < 0.5, width - 1 - column, column) + right
    row = torch.arange(height, device=device)[:, None] + down
    moved = F.pad(batch, (reach,) * 4)[torch.arange(count, device=device)[:, None, None], :, row, column]
    return moved.permute(0, 3, 1, 2)


def find(name: str) -> DatasetSpec | None:
    """Find a dataset on this machine, CIFAR-10 also as an archive of JPEG files; None if it would have to be downloaded."""
    settings = Settings()
    places = settings.places(None)
    if any((place / _FOLDERS[name]).is_dir() for place in places):
        return DatasetSpec.model_validate({"name": name})
    for place in places:
        archive = place / f"{name}-jpeg.tar.xz"
        unpacked = settings.cache / "unpacked" / f"{name}-jpeg"
        if archive.is_file():
            if not unpacked.is_dir():
                partial = unpacked.with_suffix(".partial")
                with tarfile.open(archive) as opened:
                    opened.extractall(partial, filter="data")
                partial.rename(unpacked)
            return DatasetSpec(name="folder", root=unpacked / name)
    return None


def _tuned(experiment: Experiment, dataset: DatasetSpec, **training: int) -> Experiment:
    """Replace the dataset and a part of the recipe of an experiment; the precision is `auto`."""
    recipe = experiment.training.model_copy(update={"precision": "auto", **training})
    return experiment.model_copy(update={"dataset": dataset, "training": recipe})


def _made_up(path: Path) -> DatasetSpec:
    """Write small colour images in four classes."""
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for split, count in (("train", 100), ("test", 40)):
        labels = np.arange(count) % 4
        arrays[f"{split}_labels"] = labels
        arrays[f"{split}_images"] = (rng.integers(0, 100, (count, 8, 8, 3)) + 40 * labels[:, None, None, None]).astype(np.uint8)
    np.savez(path, **arrays)
    return DatasetSpec(name="arrays", root=path)


def _no_data(name: str) -> list[Row]:
    print(f"{name}: no data: row skipped (searched {', '.join(str(place) for place in Settings().places(None))})", flush=True)
    return []


def _checked(name: str, passed: bool) -> tuple[str, bool]:
    print(f"{'ok' if passed else 'FAILED'}: {name}", flush=True)
    return name, passed


def _same(one: TrialBatch, other: TrialBatch) -> bool:
    names = ("membership", "train_correct", "test_correct", "train_margin", "test_margin")
    return all(getattr(one, name).tobytes() == getattr(other, name).tobytes() for name in names)


def _accuracy(batches: list[TrialBatch]) -> tuple[float, float]:
    """Return the mean in-subset and test accuracy of all trials."""
    entries = [entry for batch in batches for entry in batch.metrics]
    return float(np.mean([entry.in_subset_accuracy for entry in entries])), float(np.mean([entry.test_accuracy for entry in entries]))


def _accuracies(both: tuple[float, float]) -> str:
    return f"{both[0]:.2%} in-subset, {both[1]:.2%} test"


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> float | None:
    """Return the peak memory of arrays on the device since the last reset, in MiB."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None


if __name__ == "__main__":
    main()
