"""Rows about statistics: all influences, one row, one column, accumulation of shards, and publication at the size of ImageNet."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from memtail.datasets import DatasetLabels
from memtail.estimators import false_discovery, high_influence_pairs, influence, memorization, top_influencers
from memtail.estimators.adjusted import select_pairs
from memtail.estimators.overlap import expected_pair_overlap
from memtail.scores.files import write_scores
from memtail.scores.reader import largest
from memtail.statistics import Statistics, cooccurrence
from memtail.statistics.accumulator import PackedTrials
from memtail.statistics.soft import PLANES
from memtail.trials import TrialBatch, TrialMetrics, pack
from tests.benchmarks import baselines
from tests.benchmarks.bench import Row

REPETITIONS = 5
_LARGE_NOTE = "t = 4000, n = 50,000, q = 10,000, 100 classes, a third memorized; peak is above the input"


def _packed(rng: np.random.Generator, trials: int, n: int, q: int) -> PackedTrials:
    """Draw random statistics."""
    last = np.uint64(2 ** (trials % 64 or 64) - 1)

    def words(columns: int) -> np.ndarray:
        drawn = rng.integers(0, 2**64, (-(-trials // 64), columns), dtype=np.uint64)
        drawn[-1] &= last
        return drawn

    counted = np.full(-(-trials // 64), 2**64 - 1, np.uint64)
    counted[-1] = last
    return PackedTrials(words(n), words(n), words(q), counted)


def _timed(work: Callable[[], object]) -> float:
    time.sleep(0.2)  # idle threads of the previous work spin for a while
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _status_mib(name: str) -> float:
    """Return a memory figure of this process in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def influence_small() -> list[Row]:
    """Measure all influences against the float products of the authors' demo, after checking that the counts are equal."""
    trials, n, q = 2000, 8000, 4000
    packed = _packed(np.random.default_rng(0), trials, n, q)

    def bits(words: np.ndarray) -> np.ndarray:
        return np.unpackbits(words.T.copy().view(np.uint8), axis=1, bitorder="little")[:, :trials].T.astype(bool)

    membership, correct = bits(packed.membership), bits(packed.test_correct)
    everything = influence(packed, slice(None), slice(None))  # compiles
    assert (everything.both == (membership.T.astype(np.float32) @ correct.astype(np.float32)).astype(np.int32)).all(), "the counts differ"
    np.testing.assert_allclose(baselines.masked_products(membership, correct), everything.value, atol=1e-5)
    counts, ours, baseline = [], [], []
    for _ in range(REPETITIONS):
        counts.append(_timed(lambda: cooccurrence(packed.membership, packed.test_correct)))
        ours.append(_timed(lambda: influence(packed, slice(None), slice(None)).value))
        baseline.append(_timed(lambda: baselines.masked_products(membership, correct)))
    note = "t = 2000, n = 8,000, q = 4,000; counts equal to the bit"
    return [
        Row("influence-small", "matrix", "25x", counts, baseline, "(c)", None, f"{note}; ours is the counts"),
        Row("influence-small", "matrix", "", ours, baseline, "(c)", None, f"{note}; ours is float64 influences"),
    ]


def influence_large() -> list[Row]:
    """Measure a pass over all influences in blocks: the pairs, and the top 10 of every test example."""

    def passing(packed: PackedTrials, labels: Labels) -> None:
        top_influencers(packed, 10)
        high_influence_pairs(packed, memorization(packed), *labels)

    times, peak = _at_large_size(passing)
    note = f"{_LARGE_NOTE}; pairs, and the top 10 of each test example"
    return [Row("influence-large", "pass", "10 s, 500 MiB", times, peak_mib=peak, note=note)]


def selection() -> list[Row]:
    """Measure the selection of pairs by adjusted influence, against the selection by thresholds with its false discovery rates."""

    def by_rule(packed: PackedTrials, labels: Labels) -> None:
        select_pairs(packed, memorization(packed).value, *labels)

    def by_thresholds(packed: PackedTrials, labels: Labels) -> None:
        mem = memorization(packed)
        pairs = high_influence_pairs(packed, mem, *labels)
        false_discovery(packed, mem.value, *labels, pairs.train, pairs.test)

    (times, peak), (baseline, _) = _at_large_size(by_rule), _at_large_size(by_thresholds)
    note = f"{_LARGE_NOTE}; adjusted influence of 1.7 million pairs"
    return [Row("selection", "pass", "", times, baseline, "thresholds and Fisher's test", peak, note)]


def stopping() -> list[Row]:
    """Measure the decision of `subsets.until: pairs`: the pairs of two random halves, twice."""
    times, peak = _at_large_size(lambda packed, labels: expected_pair_overlap(packed, *labels))
    return [Row("until-pairs", "round", "", times, peak_mib=peak, note=_LARGE_NOTE)]


Labels = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


def _large(trials: int, n: int, q: int) -> tuple[PackedTrials, Labels]:
    """Draw statistics with scores, in which a third of the training examples is memorized, as in CIFAR-100, and labels of 100 classes."""
    rng = np.random.default_rng(0)
    packed = _packed(rng, trials, n, q)
    packed.train_correct[:, ::3] |= packed.membership[:, ::3]
    planes = rng.integers(0, 2**64, (PLANES, len(packed.counted), q), dtype=np.uint64)
    planes[:, -1] &= packed.counted[-1]
    return replace(packed, test_score=planes), (np.arange(n) % 100, np.arange(q) % 100)


def _at_large_size(work: Callable[[PackedTrials, Labels], object]) -> tuple[list[float], float]:
    """Return the seconds of three calls of work on statistics, and its peak memory in MiB above these.

    It is compiled at a small size: memory that is freed would stay with the process, and hide what the work takes.
    """
    work(*_large(128, 400, 200))
    given = _large(4000, 50_000, 10_000)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status_mib("VmRSS")
    times = [_timed(lambda: work(*given)) for _ in range(3)]
    return times, _status_mib("VmHWM") - before


def row_and_column() -> list[Row]:
    """Measure the top 100 of one row and of one column at the size of ImageNet."""
    packed = _packed(np.random.default_rng(0), 2000, 1_280_000, 50_000)

    def column(test: int) -> None:
        block = influence(packed, slice(None), np.array([test]))
        top = largest(block.value[:, 0], 100)
        block.standard_error_at(top, np.zeros_like(top))

    def row(train: int) -> None:
        block = influence(packed, np.array([train]), slice(None))
        top = largest(block.value[0], 100)
        block.standard_error_at(np.zeros_like(top), top)

    column(0), row(0)  # compiles, and computes the column sums, which are cached
    note = "t = 2000, n = 1.28 M, q = 50,000; top 100 with standard errors"
    return [
        Row("column", "query", "50 ms", [_timed(lambda test=test: column(test)) for test in range(1, 12)], note=note),
        Row("row", "query", "50 ms", [_timed(lambda train=train: row(train)) for train in range(1, 12)], note=note),
    ]


def fold() -> list[Row]:
    """Measure the accumulation of a shard of 64 trials into statistics of 100,000 trials, against statistics of 1,000."""
    n, q, size = 5000, 1000, 64
    rng = np.random.default_rng(0)
    bits = [pack(rng.random((size, count)) < 0.7) for count in (n, n, q)]

    def batch(first: int) -> TrialBatch:
        metrics = [TrialMetrics(trial, False, 0.0, 1.0, 1.0, 1.0) for trial in range(first, first + size)]
        return TrialBatch(np.arange(first, first + size, dtype=np.int32), bits[0], bits[1], bits[2], n, q, metrics)

    statistics = Statistics(n, q)
    times = [_timed(lambda first=first: statistics.accumulate(batch(first))) for first in range(0, 100_000, size)]
    early, late = times[10:26], times[-16:]
    return [
        Row("fold", "shard", "1x", late, early, "at 1,000 trials", None, "64 trials of n = 5,000, q = 1,000; ours is at 100,000 trials")
    ]


def imagenet() -> list[Row]:
    """Measure the work of the aggregator for ImageNet: accumulating trials one by one, and writing a version of the scores."""
    trials, n, q, classes = 2000, 1_281_167, 50_000, 1000
    rng = np.random.default_rng(0)
    memorized = rng.random(n) < 1 / 3

    def batch(trial: int) -> TrialBatch:
        members, correct = rng.random(n, np.float32) < 0.7, rng.random(n, np.float32) < 0.8
        bits = [pack(each[None]) for each in (members, np.where(memorized, members, correct), rng.random(q, np.float32) < 0.75)]
        return TrialBatch(np.array([trial], np.int32), bits[0], bits[1], bits[2], n, q, [TrialMetrics(trial, False, 0.0, 1.0, 1.0, 1.0)])

    labels, names = (np.arange(n) % classes, np.arange(q) % classes), tuple(map(str, range(classes)))
    dataset = DatasetLabels(Path(), "", names, labels[0], labels[1], None, None)
    statistics = Statistics(n, q)
    folds = []
    for trial in range(trials):
        made = batch(trial)
        began = time.perf_counter()
        statistics.accumulate(made)
        folds.append(time.perf_counter() - began)
    held = _status_mib("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        times = [_timed(lambda: write_scores(Path(folder), "imagenet", "", statistics, dataset)) for _ in range(2)]
        size = sum(path.stat().st_size for path in Path(folder).iterdir()) / 2**20
    note = f"t = {trials}, n = {n:,}, q = {q:,}, {classes} classes"
    return [
        Row("imagenet-fold", "trial", "", folds, peak_mib=held, note=f"{note}; memory after all trials"),
        Row("imagenet-publish", "version", "", times, peak_mib=_status_mib("VmHWM"), note=f"{note}; {size:.0f} MiB of files"),
    ]


ROWS: dict[str, Callable[[], list[Row]]] = {
    "influence-small": influence_small,
    "influence-large": influence_large,
    "selection": selection,
    "until-pairs": stopping,
    "row-and-column": row_and_column,
    "fold": fold,
    "imagenet": imagenet,
}
