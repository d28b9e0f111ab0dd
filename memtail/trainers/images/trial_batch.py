"""Makes a shard's trial batch from the results of its stacks."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from memtail.datasets import DatasetLabels
from memtail.trainers.images.evaluation import SplitOutcomes
from memtail.trainers.images.stack_trainer import StackResult
from memtail.trainers.trial_batch import pack_trials
from memtail.trials import Provenance, TrialBatch, pack


def concatenate(results: Sequence[StackResult]) -> StackResult:
    """Join the results of several stacks, in order."""
    return StackResult(
        _concatenate_outcomes([result.train for result in results]),
        _concatenate_outcomes([result.test for result in results]),
        np.concatenate([result.loss for result in results]),
        {epoch: np.concatenate([result.snapshots[epoch] for result in results]) for epoch in results[0].snapshots},
    )


def _concatenate_outcomes(outcomes: list[SplitOutcomes]) -> SplitOutcomes:
    margins = [outcome.margin for outcome in outcomes if outcome.margin is not None]
    scores = [outcome.score for outcome in outcomes if outcome.score is not None]
    return SplitOutcomes(
        np.concatenate([outcome.correct for outcome in outcomes]),
        np.concatenate([outcome.predicted_class for outcome in outcomes]),
        np.concatenate(margins) if margins else None,
        np.concatenate(scores) if scores else None,
        np.concatenate([outcome.finite for outcome in outcomes]),
    )


def make_trial_batch(
    dataset: DatasetLabels, trials: Sequence[int], members: npt.NDArray[np.bool_], result: StackResult, provenance: Provenance
) -> TrialBatch:
    """Pack results into a trial batch.

    A trial whose loss or logits are not finite is diverged: all its correctness bits are 0, and it has no misclassifications.

    Args:
        dataset: the dataset of the k trials.
        trials: their indices.
        members: bool [k, n], their subsets.
        result: their outcomes and losses.
        provenance: of the batch.
    """
    diverged = ~(np.isfinite(result.loss) & result.train.finite & result.test.finite)
    batch = pack_trials(
        dataset,
        trials,
        members,
        result.train.correct,
        result.test.correct,
        result.loss,
        diverged,
        provenance,
        train_margin=result.train.margin,
        test_margin=result.test.margin,
        train_score=result.train.score,
        test_score=result.test.score,
        train_predicted=result.train.predicted_class,
    )
    if not result.snapshots:
        return batch
    correct = np.stack([pack(correct & ~diverged[:, None]) for correct in result.snapshots.values()])
    return replace(batch, snapshot_epochs=np.array(list(result.snapshots), np.int32), snapshot_correct=correct)
