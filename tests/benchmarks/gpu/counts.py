"""Rows that train nothing: the tests of a GPU, and influence from packed trials."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from memtail.estimators import Memorization, high_influence_pairs, top_influencers
from tests.benchmarks.counting import _packed as random_statistics
from tests.benchmarks.gpu.results import Figure
from tests.benchmarks.gpu.runner import Bench

_ROOT = Path(__file__).parents[3]


def tests(bench: Bench) -> Iterator[Figure]:
    """Run the tests of the CUDA path."""
    chosen = ["-k", "counts_equal"] if bench.tiny else []
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-n", "0", "-q", "--durations", "0", "-p", "no:cacheprovider", *chosen]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout, flush=True)
    lines = done.stdout.strip().splitlines() or [""]
    yield Figure("pytest tests/gpu", time.perf_counter() - began, note=lines[-1].strip("= "))
    if done.returncode:
        failed = re.findall(r"^(?:FAILED|ERROR) \S+::(.+)$", done.stdout, re.MULTILINE)
        raise RuntimeError("; ".join(failed) or lines[-1])


def influence(bench: Bench) -> Iterator[Figure]:
    """Measure the pairs and the top 10 of each test example on the device, and on the CPU, whose results must be equal."""
    trials, n, q = (130, 300, 100) if bench.tiny else (4000, 50_000, 10_000)
    rng = np.random.default_rng(0)
    packed = random_statistics(rng, trials, n, q)
    mem, half = rng.random(n) * 0.375, np.full(n, trials // 2)
    memorization = Memorization(mem, mem, mem, mem, half, half)
    labels = np.arange(n) % 100, np.arange(q) % 100

    def everything(device: str | None) -> tuple[float, tuple[np.ndarray, ...]]:
        began = time.perf_counter()
        top = top_influencers(packed, 10, device=device)
        pairs = high_influence_pairs(packed, memorization, *labels, infl_threshold=0.05, device=device)
        return time.perf_counter() - began, (*top, pairs.train, pairs.test, pairs.influence, pairs.influence_se)

    everything(bench.card.device)
    seconds, found = min((everything(bench.card.device) for _ in range(3)), key=lambda timed: timed[0])
    # products of 0 and 1 in 8-bit integers; counts in 32 bits are written and read once
    floor = bench.card.floor(2.0 * trials * n * q, 8.0 * n * q, speed=2.0)
    note = f"t = {trials}, n = {n:,}, q = {q:,}; {len(found[2]):,} pairs, and the top 10 of each test example"
    yield Figure("all influences on the device", seconds, floor=floor, goal="1 s", note=note)
    everything(None)  # compiles
    on_cpu, expected = everything(None)
    yield Figure("all influences on the CPU", on_cpu)
    if not all(np.array_equal(one, other, equal_nan=True) for one, other in zip(found, expected, strict=True)):
        raise RuntimeError("influences on the device differ from those of the compiled kernels")
