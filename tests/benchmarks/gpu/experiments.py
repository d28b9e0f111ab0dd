"""Rows of whole experiments: `memtail run` from its start to its report, and `memtail plan`."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from memtail import datasets
from memtail.datasets import as_images
from memtail.spec import DatasetSpec
from tests.benchmarks.gpu.data import dataset
from tests.benchmarks.gpu.results import Figure
from tests.benchmarks.gpu.runner import Bench

EXAMPLES = Path(__file__).parents[3] / "examples"
_WHOLE = "memtail run, from its start to its report"
# Enough for an estimate of every example of digits.
_FEW = 40


def declaration(example: str, bench: Bench, data: dict[str, Any], *, trials: int, **training: Any) -> dict[str, Any]:
    """Return an example of the repository on other data and with a changed recipe; the precision is `auto`."""
    declared = yaml.safe_load((EXAMPLES / f"{example}.yaml").read_text())
    declared["dataset"] = data
    declared["training"] |= {"precision": "auto", **training} | ({"epochs": 2, "batch_size": 32} if bench.tiny else {})
    declared["subsets"] |= {"trials": trials}
    return declared | {"execution": {"device": bench.card.device}}


def start(bench: Bench) -> Iterator[Figure]:
    """Run memtail for the first time, when it compiles much that later runs find compiled."""
    yield Figure(f"first run of memtail on this machine: {_FEW} trials of digits", _run(bench, _digits(bench, _FEW))[0])


def mnist(bench: Bench) -> Iterator[Figure]:
    """Measure the demo of the paper's authors."""
    yield from _whole(bench, _mnist(bench), "60 s")


def digits(bench: Bench) -> Iterator[Figure]:
    """Measure examples/digits.yaml."""
    yield from _whole(bench, _digits(bench), "5 s")


def forecast(bench: Bench) -> Iterator[Figure]:
    """Hold forecasts of `memtail plan` against the seconds of the rows that ran the same experiments."""
    for name, declared in (("digits", _digits(bench)), ("mnist", _mnist(bench))):
        truth = bench.measured.get((name, _WHOLE)) or _run(bench, declared)[0]
        began = time.perf_counter()
        found = json.loads(_memtail(bench, "plan", declared))["here"]["seconds"]
        note = f"{found / truth:.2f} of the {truth:.1f} s that it took; memtail plan took {time.perf_counter() - began:.1f} s"
        yield Figure(f"memtail plan: {name}", found, note=note)


def computation(bench: Bench) -> Iterator[Figure]:
    """Measure the share of a device's time that is computation."""
    colour = declaration("cifar10", bench, dataset("cifar10", bench), trials=4, epochs=12)
    colour["subsets"] |= {"design": "balanced", "fraction": 0.5}  # few trials then have an estimate of every example
    if bench.tiny:
        colour["model"]["options"] = {"width": 2}
    for name, declared in (("mnist", _mnist(bench, 256)), ("resnet9", colour)):
        profile = _run(bench, declared, "--profile")[1]["profile"]
        shares = profile["computation"]
        spent = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in profile["phases"].items())
        what = f"share of computation, {declared['subsets']['trials']} trials of {name}"
        yield Figure(what, 100 * sum(shares.values()) / len(shares), "%", goal="90%", note=f"seconds: {spent}")


def _whole(bench: Bench, declared: dict[str, Any], goal: str) -> Iterator[Figure]:
    data = as_images(datasets.prepare(DatasetSpec.model_validate(declared["dataset"])))
    trials, recipe = declared["subsets"]["trials"], declared["training"]
    steps = trials * recipe["epochs"] * -(-round(declared["subsets"]["fraction"] * data.n_train) // recipe["batch_size"])
    widths = [data.train_images[0].size, *declared["model"]["hidden"], len(data.classes)]
    floor = bench.card.dense_training(widths, recipe["batch_size"], steps)
    seconds, summary = _run(bench, declared)
    note = f"{trials:,} trials; {summary['in_subset_accuracy']:.2%} in-subset, {summary['test_accuracy']:.2%} test"
    yield Figure(_WHOLE, seconds, floor=floor, goal=goal, note=note)


def _mnist(bench: Bench, trials: int = 2000) -> dict[str, Any]:
    return declaration("mnist", bench, dataset("mnist", bench), trials=_FEW if bench.tiny else trials)


def _digits(bench: Bench, trials: int = 1000) -> dict[str, Any]:
    return declaration("digits", bench, {"name": "digits"}, trials=_FEW if bench.tiny else trials)


def _run(bench: Bench, declared: dict[str, Any], *options: str) -> tuple[float, dict[str, Any]]:
    """Run an experiment in a new store; return the seconds of the process, and its summary."""
    began = time.perf_counter()
    said = _memtail(bench, "run", declared, *options)
    return time.perf_counter() - began, json.loads(said)


def _memtail(bench: Bench, command: str, declared: dict[str, Any], *options: str) -> str:
    """Return what a command on an experiment prints as JSON."""
    folder = Path(tempfile.mkdtemp(dir=bench.folder))
    spec = folder / "experiment.yaml"
    spec.write_text(yaml.safe_dump(declared))
    arguments = [sys.executable, "-m", "memtail", command, str(spec), "--store", str(folder / "store"), "--json", *options]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    print(done.stderr, file=sys.stderr, flush=True)
    if done.returncode:
        raise RuntimeError(f"memtail {command}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return done.stdout
