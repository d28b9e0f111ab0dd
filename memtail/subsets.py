"""Which training examples each trial sees: trial index -> membership, a pure function of the declaration.

Designs, for n examples and subsets of m = round(fraction * n):

* `uniform`: independent uniform subsets of size m, as in the paper.
* `balanced`: like cards dealt from shuffled decks. The trials take m cards each, one after the other; when a deck is used up, a
  newly shuffled one follows. In every prefix of the trials each example has then been dealt equally often, to within one.
* `stratified`: balanced within each class, each with its own share of the subset.
* `explicit`: masks given in a file, one row per trial.

Any machine recomputes the membership of any trial without the ones before it.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from memtail.errors import SpecError
from memtail.randomness import Purpose, random_keys
from memtail.spec import SubsetsSpec

Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def membership(subsets: SubsetsSpec, labels: npt.NDArray[np.int64], trials: Sequence[int]) -> Mask:
    """Membership of the given trials.

    Args:
        subsets: the declared design.
        labels: int64 [n], the training labels in original order.
        trials: indices of the trials, in any order.

    Returns:
        bool [len(trials), n]; True where the example is in the trial's subset.

    Raises:
        SpecError: the design does not fit the dataset.
    """
    n = len(labels)
    if subsets.design == "explicit":
        assert subsets.masks is not None
        return np.asarray(_masks(subsets.masks, n, subsets.trials)[list(trials)])
    members = np.zeros((len(trials), n), dtype=np.bool_)
    strata = _strata(subsets, labels)
    for row, trial in zip(members, trials, strict=True):
        for stratum, (examples, size) in enumerate(strata):
            if subsets.design == "uniform":
                keys = random_keys(n, subsets.seed, Purpose.SUBSET, trial)
                row[np.argpartition(keys, size - 1)[:size]] = True
            else:
                row[examples[_balanced(subsets.seed, stratum, trial, len(examples), size)]] = True
    return members


def subset_size(fraction: float, n: int) -> int:
    """m, the number of examples in a subset of the given fraction of n: at least 1, at most n - 1."""
    return min(max(round(fraction * n), 1), n - 1)


def check_trials(subsets: SubsetsSpec, labels: npt.NDArray[np.int64]) -> None:
    """Refuse a design of too few trials, in which some example would be always in or always out and so have no estimate.

    `explicit` masks are exempt: a study may leave examples out on purpose.

    Raises:
        SpecError: names how many examples are without an estimate, and the number of trials that mends it.
    """
    n, t = len(labels), subsets.trials
    f = subset_size(subsets.fraction, n) / n
    if subsets.design == "explicit":
        assert subsets.masks is not None
        _masks(subsets.masks, n, t)
        return
    _strata(subsets, labels)
    if n * (f**t + (1 - f) ** t) < 1e-9:
        return
    counts = np.zeros(n, dtype=np.int64)
    for trial in range(t):
        counts += membership(subsets, labels, [trial])[0]
    lacking = int(np.count_nonzero((counts == 0) | (counts == t)))
    if lacking:
        enough = next(k for k in range(t + 1, 10**7) if n * (f**k + (1 - f) ** k) < 0.01)
        raise SpecError(
            f"subsets.trials: with {t} trials {lacking} of {n} training examples are in every subset or in none, so that they "
            f"have no estimate: {enough} trials are enough at a fraction of {f:g} (design 'balanced' needs fewer)"
        )


def _strata(subsets: SubsetsSpec, labels: npt.NDArray[np.int64]) -> list[tuple[Indices, int]]:
    """The groups that are dealt separately, each as (its examples, how many of them a subset takes)."""
    n = len(labels)
    m = subset_size(subsets.fraction, n)
    if subsets.design != "stratified":
        return [(np.arange(n), m)]
    classes, counts = np.unique(labels, return_counts=True)
    share = m * counts / n
    sizes = np.floor(share).astype(np.int64)
    # the largest remainders take what flooring left over, so that the sizes add up to m
    sizes[np.argsort(sizes - share, kind="stable")[: m - sizes.sum()]] += 1
    for label, count, size in zip(classes, counts, sizes, strict=True):
        if not 0 < size < count:
            raise SpecError(
                f"subsets.design: 'stratified' at a fraction of {subsets.fraction:g} takes {size} of the {count} training examples "
                f"of class {label} into every subset, which leaves them no estimate: use design 'balanced' or 'uniform'"
            )
    return [(np.flatnonzero(labels == label), int(size)) for label, size in zip(classes, sizes, strict=True)]


def _balanced(seed: int, stratum: int, trial: int, n: int, m: int) -> Indices:
    """The members of one trial of the balanced design: m of n indices."""
    if 2 * m <= n:
        return _dealt(seed, stratum, trial, n, m)
    # Dealing who stays out keeps decks longer than two hands, which is what makes every boundary dealable on its own.
    mask = np.ones(n, dtype=np.bool_)
    mask[_dealt(seed, stratum, trial, n, n - m)] = False
    return np.flatnonzero(mask)


def _dealt(seed: int, stratum: int, trial: int, n: int, m: int) -> Indices:
    """Hand `trial` of m <= n / 2 cards, dealt from endless shuffled decks of n cards.

    A hand that straddles the boundary of two decks is the tail of one and the head of the next.
    """
    deck, position = divmod(trial * m, n)
    if position + m > n:
        return np.concatenate(_boundary(seed, stratum, deck, n, m))
    head, tail = _boundary(seed, stratum, deck - 1, n, m)[1], _boundary(seed, stratum, deck, n, m)[0]
    middle = _shuffled(_without(n, head, tail), seed, Purpose.SUBSET_DECK, stratum, deck)
    start = position - len(head)
    return middle[start : start + m]


@lru_cache(maxsize=64)
def _boundary(seed: int, stratum: int, deck: int, n: int, m: int) -> tuple[Indices, Indices]:
    """(tail of `deck`, head of the next one) that make up one hand; both empty where a hand ends with the deck.

    Within a deck head and tail must not meet, nor may the two parts of a hand. Boundaries after even decks are drawn freely,
    those after odd ones around their two neighbours, so that none depends on more than those.
    """
    tail_size = ((deck + 1) * n) % m if deck >= 0 else 0
    if tail_size == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    draw = (seed, Purpose.SUBSET_BOUNDARY, stratum, deck)
    if deck % 2 == 0:
        hand = _shuffled(np.arange(n), *draw)[:m]
        return hand[:tail_size], hand[tail_size:]
    head_before = _boundary(seed, stratum, deck - 1, n, m)[1]
    tail_after = _boundary(seed, stratum, deck + 1, n, m)[0]
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
def _masks(path: Path, n: int, trials: int) -> Mask:
    """The masks of an explicit design, memory-mapped, checked against the dataset and the number of trials."""
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
