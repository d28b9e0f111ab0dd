"""The selected pairs: columns of their table, adjusted influence beside the influence that they have, and their summary."""

from collections.abc import Callable
from typing import Any

import numpy as np

from memtail.estimators import Memorization
from memtail.estimators.adjusted import RATE, select_pairs
from memtail.estimators.binomial import Floats, normal_interval, normal_tail, share
from memtail.estimators.false_discovery import mid_p
from memtail.estimators.influence import correct_in_at, influence_interval, influence_standard_error
from memtail.estimators.pairs import MEM_THRESHOLD, Indices
from memtail.estimators.soft import soft_influence_at
from memtail.scores.names import OUTCOMES
from memtail.scores.summary import SelectionSummary
from memtail.statistics.accumulator import PackedTrials

# Largest probability, without influence, of an influence as large as that of a confirmed pair.
_CONFIRMED = 0.05


def selected_pairs(
    packed: PackedTrials, mem: Memorization, train_labels: Indices, test_labels: Indices, progress: Callable[[], object]
) -> tuple[dict[str, Any], SelectionSummary]:
    """Select pairs by adjusted influence, and estimate their influence.

    Args:
        packed: the statistics.
        mem: memorization, estimated from them.
        train_labels: int64 [n].
        test_labels: int64 [q].
        progress: called after each piece of work.

    Returns:
        The columns of `pairs.parquet`, see `memtail.scores.files`; and their summary.
    """
    pairs = select_pairs(packed, mem.value, train_labels, test_labels, progress=progress)
    names = OUTCOMES["score" if packed.scores_only else "correct"]
    value, error, interval, tail = (_on_scores if packed.scores_only else _on_correctness)(packed, pairs.train, pairs.test)
    confirmed = tail <= _CONFIRMED
    columns = {
        "tr_idx": pairs.train,
        "tt_idx": pairs.test,
        "infl_adjusted": pairs.value,
        "z": pairs.z,
        "q_value": pairs.rate,
        "confirmed": confirmed,
        names.infl: value,
        names.infl_se: error,
        "infl_lo": interval[0],
        "infl_hi": interval[1],
        names.mem: mem.value[pairs.train],
        names.mem_se: mem.standard_error[pairs.train],
    }
    summary = SelectionSummary(
        mem_threshold=MEM_THRESHOLD,
        infl_threshold=pairs.threshold,
        false_discovery_rate=RATE,
        count=len(pairs),
        confirmed=int(confirmed.sum()),
        train_examples=len(np.unique(pairs.train)),
        test_examples=len(np.unique(pairs.test)),
    )
    return columns, summary


def _on_correctness(packed: PackedTrials, train: Indices, test: Indices) -> tuple[Floats, Floats, tuple[Floats, Floats], Floats]:
    """Influences, their standard errors and intervals, and the mid-p of Fisher's exact test, one-sided: half of P(X = x) counts."""
    both = correct_in_at(packed, train, test)
    k_in, correct_on, t = packed.k_in[train], packed.correct_on_test[test], packed.trials
    value = share(both, k_in) - share(correct_on - both, t - k_in)
    error, interval = influence_standard_error(both, k_in, correct_on, t), influence_interval(both, k_in, correct_on, t)
    return value, error, interval, mid_p(packed, train, test)


def _on_scores(packed: PackedTrials, train: Indices, test: Indices) -> tuple[Floats, Floats, tuple[Floats, Floats], Floats]:
    """Influences on scores, their standard errors and intervals, and the upper tail of their normal distribution without influence."""
    value, error = soft_influence_at(packed, train, test) or (np.empty(0), np.empty(0))
    with np.errstate(divide="ignore", invalid="ignore"):
        return value, error, normal_interval(value, error), normal_tail(value / error)
