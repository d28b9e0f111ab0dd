"""A statistical row: how often confidence intervals contain the truth, and how many of the pairs kept are false, on synthetic trials.

The membership of the trials is that of each design of `memtail.subsets`. Given membership, each trial is assumed to classify an
example correctly with a known probability, by whether the example is in its subset, and independently of the other trials: other examples
act as noise. So the numbers of correct models are binomial given k_in and k_out, and are drawn as such. Equal seeds give equal tables.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from memtail.confidence import Z
from memtail.estimators import false_discovery, high_influence_pairs, memorization
from memtail.estimators.binomial import Floats
from memtail.estimators.memorization import Memorization, from_counts
from memtail.spec import SubsetsSpec
from memtail.statistics.accumulator import PackedTrials, pack_words
from memtail.subsets import membership
from tests.benchmarks.bench import Row

TRIALS = (32, 64, 128, 256, 512, 1000, 2000)
DESIGNS = ("uniform", "balanced", "stratified", "explicit")
#: Trials from which on the targets hold: mean coverage of 93 to 97%, and at least 90% at each pair of rates.
FEWEST = 64
MEAN, LOWEST = (0.93, 0.97), 0.90
#: The nominal false discovery rate.
RATE = 0.05

_RATES = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)
#: p_in >= p_out: pairs of rates inside (0, 1), and those with a rate of 0 or 1.
INSIDE = [(p_in, p_out) for p_in in _RATES for p_out in _RATES if p_in >= p_out]
AT_ENDS = [(1.0, p) for p in _RATES] + [(p, 0.0) for p in _RATES] + [(1.0, 1.0), (0.0, 0.0), (1.0, 0.0)]
# Examples per pair of rates, subsets of the trials, and outcomes drawn for each of these: 13,000 intervals per pair of rates.
_EXAMPLES, _SUBSETS, _OUTCOMES = 13, 4, 250
# Pairs: training examples, test examples and classes; the first test examples each have one training example that influences them.
_TRAIN, _TEST, _CLASSES, _INFLUENCED, _INFLUENCE = 100, 60, 2, 20, 0.4
# Draws for each design.
_REPETITIONS = 50

Counts = npt.NDArray[np.int64]
Contains = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Coverage:
    """Of one interval, in shares of the intervals: the mean over the rates inside (0, 1) and the lowest there, and at the ends likewise."""

    mean: float
    lowest: float
    ends: float
    lowest_end: float


class Discovery(NamedTuple):
    """Of pairs: false ones among those kept at `RATE` and among those of the fixed thresholds, and true ones found at `RATE`."""

    false: float
    fixed: float
    found: float


def plug_in(mem: Memorization, true: Floats) -> Contains:
    """Whether mem +- 1.96 standard errors from the observed rates contains the true difference."""
    variance = mem.p_in * (1 - mem.p_in) / mem.k_in + mem.p_out * (1 - mem.p_out) / mem.k_out
    return np.abs(mem.value - true) <= Z * np.sqrt(variance) + 1e-12


def agresti_caffo(mem: Memorization, true: Floats) -> Contains:
    """Whether memtail's interval contains the true difference."""
    low, high = mem.interval
    return (low - 1e-12 <= true) & (true <= high + 1e-12)


def newcombe_interval(p_in: Floats, k_in: Counts, p_out: Floats, k_out: Counts) -> tuple[Floats, Floats]:
    """Combine Wilson's intervals of the two shares (Newcombe, Statistics in Medicine 17, 1998, 873-890, method 10)."""

    def wilson(p: Floats, k: Counts) -> tuple[Floats, Floats]:
        centre, half = p + Z**2 / 2 / k, Z * np.sqrt(p * (1 - p) / k + Z**2 / 4 / k**2)
        return (centre - half) / (1 + Z**2 / k), (centre + half) / (1 + Z**2 / k)

    (low_in, high_in), (low_out, high_out) = wilson(p_in, k_in), wilson(p_out, k_out)
    value = p_in - p_out
    return value - np.hypot(p_in - low_in, high_out - p_out), value + np.hypot(high_in - p_in, p_out - low_out)


def newcombe(mem: Memorization, true: Floats) -> Contains:
    """Whether Newcombe's interval contains the true difference."""
    low, high = newcombe_interval(mem.p_in, mem.k_in, mem.p_out, mem.k_out)
    return (low - 1e-12 <= true) & (true <= high + 1e-12)


def miettinen_nurminen_score(p_in: Floats, k_in: Counts, p_out: Floats, k_out: Counts, difference: Floats) -> Floats:
    """Return the score of a difference, in standard errors under it (Miettinen and Nurminen, Statistics in Medicine 4, 1985, 213-226).

    The rates under the difference are those of the largest likelihood, the root of a cubic equation in closed form (Farrington and
    Manning, Statistics in Medicine 9, 1990). The ends of the interval are where the score is +-1.96; they have no closed form.
    """
    ratio = k_out / k_in
    a = 1 + ratio
    b = -(1 + ratio + p_in + ratio * p_out + difference * (ratio + 2))
    c = difference**2 + difference * (2 * p_in + ratio + 1) + p_in + ratio * p_out
    d = -p_in * difference * (1 + difference)
    v = b**3 / (3 * a) ** 3 - b * c / (6 * a**2) + d / (2 * a)
    u = np.where(v < 0, -1, 1) * np.sqrt(np.maximum((b / (3 * a)) ** 2 - c / (3 * a), 1e-30))
    angle = (np.pi + np.arccos(np.clip(v / u**3, -1, 1))) / 3
    under_in = np.clip(2 * u * np.cos(angle) - b / (3 * a), 0, 1)
    under_out = np.clip(under_in - difference, 0, 1)
    n = k_in + k_out
    variance = (under_in * (1 - under_in) / k_in + under_out * (1 - under_out) / k_out) * n / (n - 1)
    score: Floats = (p_in - p_out - difference) / np.sqrt(np.maximum(variance, 1e-24))
    return score


def miettinen_nurminen(mem: Memorization, true: Floats) -> Contains:
    """Whether Miettinen and Nurminen's interval contains the true difference."""
    return np.abs(miettinen_nurminen_score(mem.p_in, mem.k_in, mem.p_out, mem.k_out, true)) <= Z + 1e-9


#: The intervals that were candidates, ours first.
INTERVALS: dict[str, Callable[[Memorization, Floats], Contains]] = {
    "Agresti-Caffo": agresti_caffo,
    "Newcombe": newcombe,
    "Miettinen-Nurminen": miettinen_nurminen,
    "plug-in": plug_in,
}


def subsets(design: str, seed: int, n: int, trials: int) -> Contains:
    """Bool [trials, n], membership by a design of `memtail.subsets`; explicit masks have examples in 30 to 90% of them."""
    labels = np.arange(n) % 10
    with tempfile.TemporaryDirectory() as folder:
        masks = None
        if design == "explicit":
            rng = np.random.default_rng(seed)
            masks = Path(folder) / "masks.npy"
            np.save(masks, rng.random((trials, n)) < rng.uniform(0.3, 0.9, n))
        spec = SubsetsSpec.model_validate({"design": design, "trials": trials, "seed": seed, "masks": masks})
        return membership(spec, labels, range(trials)).copy()


def estimates(design: str, trials: tuple[int, ...], outcomes: int, seed: int = 0) -> Iterator[tuple[int, list[Memorization]]]:
    """Draw outcomes at `INSIDE` and `AT_ENDS`, and estimate memorization from each prefix of the trials.

    Args:
        design: of the subsets.
        trials: lengths of prefixes, ascending.
        outcomes: number of draws for each of the subsets.
        seed: of subsets and outcomes.

    Yields:
        The length, and estimates [outcomes, rates, examples] for each of the subsets.
    """
    p_in, p_out = np.array(INSIDE + AT_ENDS).T[:, :, None]
    members = [subsets(design, seed + each, p_in.size * _EXAMPLES, trials[-1]) for each in range(_SUBSETS)]
    for number in trials:
        rng = np.random.default_rng([seed, number])
        result = []
        for each in members:
            k_in = each[:number].sum(0, dtype=np.int64).reshape(_EXAMPLES, p_in.size).T
            k_out, shape = number - k_in, (outcomes, *k_in.shape)
            result.append(from_counts(k_in, k_out, rng.binomial(k_in, p_in, shape), rng.binomial(k_out, p_out, shape)))
        yield number, result


def coverage(contains: Callable[[Memorization, Floats], Contains], drawn: list[Memorization]) -> Coverage:
    """Measure the coverage of an interval; examples without an estimate have none."""
    true = np.array([p_in - p_out for p_in, p_out in INSIDE + AT_ENDS])[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        held = np.concatenate([np.where(np.isnan(mem.value), np.nan, contains(mem, true)) for mem in drawn])
    rates = np.nanmean(held, (0, 2))
    inside, ends = rates[: len(INSIDE)], rates[len(INSIDE) :]
    return Coverage(float(inside.mean()), float(inside.min()), float(ends.mean()), float(ends.min()))


def error_ratios(drawn: list[Memorization]) -> Floats:
    """float64 [rates], the root mean square of the standard errors over that of the true errors, at `INSIDE`."""
    true = np.array([p_in - p_out for p_in, p_out in INSIDE])[:, None]
    inside = slice(len(INSIDE))
    reported = np.concatenate([mem.standard_error[:, inside] for mem in drawn])
    deviation = np.concatenate([mem.value[:, inside] - true for mem in drawn])
    return np.sqrt(np.nanmean(reported**2, (0, 2)) / np.nanmean(deviation**2, (0, 2)))


def discoveries(design: str, number: int, influenced: int, repetitions: int, seed: int = 0) -> Discovery:
    """Draw outcomes in which the first test examples are each influenced by one training example, and select pairs.

    Args:
        design: of the subsets.
        number: of trials.
        influenced: number of these test examples; without any, each pair that is kept is a false one.
        repetitions: number of draws.
        seed: of subsets and outcomes.
    """
    rng = np.random.default_rng([seed, number, influenced])
    train_labels, test_labels = np.arange(_TRAIN) % _CLASSES, np.arange(_TEST) % _CLASSES
    false, fixed, found = [], [], []
    for repetition in range(repetitions):
        if repetition % (repetitions // _SUBSETS or 1) == 0:
            members = subsets(design, seed + repetition, _TRAIN, number)
        correct = rng.random(members.shape) < np.where(members, 0.95, 0.35)
        rates = rng.uniform(0.05, 0.95, _TEST)
        rates[:influenced] = rng.uniform(0.05, 0.95 - _INFLUENCE, influenced)
        probability = np.broadcast_to(rates, (number, _TEST)).copy()
        probability[:, :influenced] += _INFLUENCE * members[:, :influenced]
        packed = _packed(members, correct, rng.random(probability.shape) < probability)
        mem = memorization(packed)
        pairs = high_influence_pairs(packed, mem, train_labels, test_labels)
        kept = false_discovery(packed, mem.value, train_labels, test_labels, pairs.train, pairs.test).rate <= RATE
        true = (pairs.train == pairs.test) & (pairs.test < influenced)
        false.append((kept & ~true).sum() / max(1, kept.sum()))
        fixed.append((~true).sum() / max(1, len(true)))
        found.append((kept & true).sum() / max(1, influenced))
    return Discovery(float(np.mean(false)), float(np.mean(fixed)), float(np.mean(found)))


def _packed(*bits: Contains) -> PackedTrials:
    trials = len(bits[0])
    padded = [np.zeros((64 * -(-trials // 64), each.shape[1]), np.bool_) for each in (*bits, np.ones((trials, 1), np.bool_))]
    for rows, each in zip(padded, (*bits, True), strict=True):
        rows[:trials] = each
    members, correct, on_test, counted = (np.ascontiguousarray(pack_words(rows.T.copy()).T) for rows in padded)
    return PackedTrials(members, correct, on_test, counted[:, 0])


def bench() -> list[Row]:
    """Print the tables."""
    began = time.perf_counter()
    intervals = Table(title="95% intervals: mean coverage / lowest of a pair of rates; with rates of 0 or 1", title_justify="left")
    pairs = Table(title="Pairs kept at a false discovery rate of 5%, mean of the designs", title_justify="left")
    for column in ("design", "trials", *INTERVALS, "SE / true error"):
        intervals.add_column(column)
    for column in ("trials", "false, no influence", "false, planted", "planted pairs found", "false, thresholds alone"):
        pairs.add_column(column)
    within = []
    for design in DESIGNS:
        for number, drawn in estimates(design, TRIALS, _OUTCOMES):
            each = [coverage(contains, drawn) for contains in INTERVALS.values()]
            ratios = error_ratios(drawn)
            cells = [f"{_percent(one.mean, one.lowest)}; {_percent(one.ends, one.lowest_end)}" for one in each]
            intervals.add_row(design, f"{number:,}", *cells, f"{ratios.min():.2f} to {ratios.max():.2f}")
            within += [each[0]] if number >= FEWEST else []
    for number in TRIALS:
        null, planted = (
            np.mean([discoveries(design, number, influenced, _REPETITIONS) for design in DESIGNS], 0) for influenced in (0, _INFLUENCED)
        )
        pairs.add_row(f"{number:,}", *(f"{share:.1%}" for share in (null[0], planted[0], planted[2], planted[1])))
    Console(width=180).print(intervals, pairs)
    means, lowest = [one.mean for one in within], min(one.lowest for one in within)
    met = MEAN[0] <= min(means) <= max(means) <= MEAN[1] and lowest >= LOWEST
    note = f"from {FEWEST} trials on: mean {_percent(min(means), max(means))}, lowest {lowest:.1%}: targets {'met' if met else 'MISSED'}"
    return [Row("coverage", "table", "mean 93 to 97%, lowest 90%", [time.perf_counter() - began], note=note)]


def _percent(*shares: float) -> str:
    return " / ".join(f"{100 * share:.1f}" for share in shares)


ROWS: dict[str, Callable[[], list[Row]]] = {"coverage": bench}
