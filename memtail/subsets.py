"""Subset designs: trial index -> membership, a pure function of the experiment's declaration.

For n training examples and subsets of m = round(fraction * n) of them:

* `uniform`: independent uniform subsets of size m, as in the paper.
* `balanced`: trial k takes the k-th run of m examples from an endless sequence of random permutations of all n. In every prefix of the
  trials all examples are members equally often, to within one.
* `stratified`: balanced within each class, with the class's share of m.
* `explicit`: masks from a file, one row per trial.

Any machine computes the membership of any trial without that of the trials before it. Adding a design takes a function in `DESIGNS` and its
name in `memtail.spec.SubsetsSpec.design`.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from memtail.errors import SpecError
from memtail.randomness import Purpose, random_keys
from memtail.spec import SubsetsSpec

Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
#: Takes the declared design, the training labels and indices of trials; returns and raises as `membership` does.
Design = Callable[[SubsetsSpec, Indices, Sequence[int]], Mask]


def membership(subsets: SubsetsSpec, labels: Indices, trials: Sequence[int]) -> Mask:
    """Compute the membership of some trials.

    Args:
        subsets: the declared design.
        labels: int64 [n], the training labels in original order.
        trials: indices of the trials, in any order; empty to check the design only.

    Returns:
        bool [len(trials), n]; True where the example is in the trial's subset.

    Raises:
        SpecError: the design does not fit the dataset.
    """
    return DESIGNS[subsets.design](subsets, labels, trials)


def subset_size(fraction: float, n: int) -> int:
    """Return m, the size of a subset with this fraction of n examples: at least 1, at most n - 1."""
    return min(max(round(fraction * n), 1), n - 1)


def check_trials(subsets: SubsetsSpec, labels: Indices) -> None:
    """Refuse a design that leaves some example without an estimate, in the subset of every trial or of none, and a ranking of all examples.

    Masks from a file are exempt: a study may leave examples out on purpose.

    Args:
        subsets: the declared design and number of trials.
        labels: int64 [n], the training labels in original order.

    Raises:
        SpecError: the design, or the ranking of `until`, does not fit the dataset; or there are too few trials, and then the message says
            how many are enough.
    """
    membership(subsets, labels, [])
    if subsets.until is not None and (ranking := subsets.until.ranking) is not None and ranking.top >= len(labels):
        raise SpecError(f"subsets.until.ranking.top: is {ranking.top}, and there are {len(labels)} training examples: choose fewer of them")
    if subsets.masks is not None:
        return
    n, t = len(labels), subsets.trials
    f = subset_size(subsets.fraction, n) / n
    if n * (f**t + (1 - f) ** t) < 1e-9:  # the expected number of such examples
        return
    counts = np.zeros(n, dtype=np.int64)
    for trial in range(t):
        counts += membership(subsets, labels, [trial])[0]
    undefined = int(np.count_nonzero((counts == 0) | (counts == t)))
    if undefined:
        enough = next(k for k in range(t + 1, 10**7) if n * (f**k + (1 - f) ** k) < 0.01)
        raise SpecError(
            f"subsets.trials: with {t} trials {undefined} of {n} training examples are in every subset or in none, so that they "
            f"have no estimate: {enough} trials are enough at a fraction of {f:g} (design 'balanced' needs fewer)"
        )


def _uniform(subsets: SubsetsSpec, labels: Indices, trials: Sequence[int]) -> Mask:
    n, m = len(labels), subset_size(subsets.fraction, len(labels))
    members = np.zeros((len(trials), n), dtype=np.bool_)
    for row, trial in zip(members, trials, strict=True):
        keys = random_keys(n, subsets.seed, Purpose.SUBSET, trial)
        row[np.argpartition(keys, m - 1)[:m]] = True
    return members


def _balanced(subsets: SubsetsSpec, labels: Indices, trials: Sequence[int]) -> Mask:
    n = len(labels)
    return _balanced_within([(np.arange(n), subset_size(subsets.fraction, n))], n, subsets.seed, trials)


def _stratified(subsets: SubsetsSpec, labels: Indices, trials: Sequence[int]) -> Mask:
    return _balanced_within(_class_shares(subsets.fraction, labels), len(labels), subsets.seed, trials)


def _explicit(subsets: SubsetsSpec, labels: Indices, trials: Sequence[int]) -> Mask:
    return np.asarray(_masks(subsets.masks, len(labels), subsets.trials)[list(trials)])


#: The designs by name.
DESIGNS: dict[str, Design] = {"uniform": _uniform, "balanced": _balanced, "stratified": _stratified, "explicit": _explicit}


def _class_shares(fraction: float, labels: Indices) -> list[tuple[Indices, int]]:
    """Each class's examples, and the number of them in a subset; the numbers add up to m.

    Raises:
        SpecError: a class is too small to be split.
    """
    n = len(labels)
    m = subset_size(fraction, n)
    classes, counts = np.unique(labels, return_counts=True)
    share = m * counts / n
    sizes = np.floor(share).astype(np.int64)
    # what flooring leaves over goes to the largest remainders
    sizes[np.argsort(sizes - share, kind="stable")[: m - sizes.sum()]] += 1
    for label, count, size in zip(classes, counts, sizes, strict=True):
        if not 0 < size < count:
            raise SpecError(
                f"subsets.design: 'stratified' at a fraction of {fraction:g} takes {size} of the {count} training examples "
                f"of class {label} into every subset, which leaves them no estimate: use design 'balanced' or 'uniform'"
            )
    return [(np.flatnonzero(labels == label), int(size)) for label, size in zip(classes, sizes, strict=True)]


def _balanced_within(strata: list[tuple[Indices, int]], n: int, seed: int, trials: Sequence[int]) -> Mask:
    """Membership that is balanced within each stratum: its examples, and the number of them in a subset."""
    members = np.zeros((len(trials), n), dtype=np.bool_)
    for row, trial in zip(members, trials, strict=True):
        for stratum, (examples, size) in enumerate(strata):
            row[examples[_balanced_subset(seed, stratum, trial, len(examples), size)]] = True
    return members


def _balanced_subset(seed: int, stratum: int, trial: int, n: int, m: int) -> Indices:
    """The members of one trial: m of n indices."""
    if 2 * m <= n:
        return _run(seed, stratum, trial, n, m)
    # Choosing the non-members instead keeps runs at most half a permutation long, so that each boundary can be drawn by itself.
    mask = np.ones(n, dtype=np.bool_)
    mask[_run(seed, stratum, trial, n, n - m)] = False
    return np.flatnonzero(mask)


def _run(seed: int, stratum: int, trial: int, n: int, m: int) -> Indices:
    """Run number `trial` of m <= n / 2 indices from an endless sequence of permutations of n.

    A run across the boundary of two permutations is the tail of one and the head of the next.
    """
    permutation, position = divmod(trial * m, n)
    if position + m > n:
        return np.concatenate(_boundary(seed, stratum, permutation, n, m))
    head, tail = _boundary(seed, stratum, permutation - 1, n, m)[1], _boundary(seed, stratum, permutation, n, m)[0]
    middle = _shuffled(_without(n, head, tail), seed, Purpose.SUBSET_PERMUTATION, stratum, permutation)
    start = position - len(head)
    return middle[start : start + m]


@lru_cache(maxsize=64)
def _boundary(seed: int, stratum: int, permutation: int, n: int, m: int) -> tuple[Indices, Indices]:
    """The tail of a permutation and the head of the next that make up one run; both empty where a run ends with the permutation.

    Head and tail of one permutation must be disjoint, and so must both parts of a run. Boundaries after even permutations are drawn freely,
    and those after odd ones avoid their two neighbours, so none depends on more than two others.
    """
    tail_size = ((permutation + 1) * n) % m if permutation >= 0 else 0
    if tail_size == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    draw = (seed, Purpose.SUBSET_BOUNDARY, stratum, permutation)
    if permutation % 2 == 0:
        run = _shuffled(np.arange(n), *draw)[:m]
        return run[:tail_size], run[tail_size:]
    head_before = _boundary(seed, stratum, permutation - 1, n, m)[1]
    tail_after = _boundary(seed, stratum, permutation + 1, n, m)[0]
    tail = _shuffled(_without(n, head_before), *draw, 0)[:tail_size]
    head = _shuffled(_without(n, tail_after, tail), *draw, 1)[: m - tail_size]
    return tail, head


def _shuffled(items: Indices, seed: int, purpose: Purpose, *ids: int) -> Indices:
    return items[np.argsort(random_keys(len(items), seed, purpose, *ids), kind="stable")]


def _without(n: int, *taken: Indices) -> Indices:
    free = np.ones(n, dtype=np.bool_)
    for items in taken:
        free[items] = False
    return np.flatnonzero(free)


@lru_cache(maxsize=4)
def _masks(path: Path | None, n: int, trials: int) -> Mask:
    """Bool [at least `trials`, n], the masks of an explicit design, memory-mapped.

    Raises:
        SpecError: the file is missing, unreadable, of another shape or type, has too few rows, or an empty one.
    """
    if path is None:
        raise SpecError("subsets.masks: design 'explicit' needs a .npy file of booleans [trials, n]")
    try:
        masks = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(masks, np.ndarray):
            raise ValueError("it is an .npz file")
    except (OSError, ValueError, EOFError) as error:
        raise SpecError(f"subsets.masks: {path} cannot be read as a .npy file ({error})") from None
    if masks.dtype != np.bool_ or masks.ndim != 2 or masks.shape[1] != n:
        raise SpecError(f"subsets.masks: {path} holds {masks.dtype} {list(masks.shape)}, needed is bool [trials, {n}]")
    if len(masks) < trials:
        raise SpecError(f"subsets.masks: {path} has {len(masks)} rows for {trials} trials: lower subsets.trials")
    if not masks.any(axis=1).all():
        raise SpecError(f"subsets.masks: row {int(np.argmin(masks.any(axis=1)))} of {path} is empty: a trial needs an example")
    return np.asarray(masks)
