"""Makes a shard's trial batch from the results of its stacks."""

import platform
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version

import numpy as np
import numpy.typing as npt
import torch

from memtail.datasets import ImageDataset
from memtail.trainers.images.devices import cpu_name, device_name
from memtail.trainers.images.evaluation import SplitOutcomes
from memtail.trainers.images.profiling import Phases
from memtail.trainers.images.stack_trainer import StackResult
from memtail.trainers.outcomes import describe_trials
from memtail.trials import Provenance, TrialBatch, pack


def concatenate(results: Sequence[StackResult]) -> StackResult:
    """Join the results of several stacks, in order."""
    return StackResult(
        _concatenate_outcomes([result.train for result in results]),
        _concatenate_outcomes([result.test for result in results]),
        np.concatenate([result.loss for result in results]),
    )


def _concatenate_outcomes(outcomes: list[SplitOutcomes]) -> SplitOutcomes:
    margins = [outcome.margin for outcome in outcomes if outcome.margin is not None]
    return SplitOutcomes(
        np.concatenate([outcome.correct for outcome in outcomes]),
        np.concatenate([outcome.predicted_class for outcome in outcomes]),
        np.concatenate(margins) if margins else None,
        np.concatenate([outcome.finite for outcome in outcomes]),
    )


def make_trial_batch(
    dataset: ImageDataset, trials: Sequence[int], members: npt.NDArray[np.bool_], result: StackResult, provenance: Provenance
) -> TrialBatch:
    """Pack results into a trial batch.

    A trial whose loss or logits are not finite is diverged: all its correctness bits are 0, and it has no misclassifications.

    Args:
        dataset: the dataset of the k trials.
        trials: their indices.
        members: bool [k, n], their subsets.
        result: their outcomes and losses.
        provenance: as `describe_training` makes it.
    """
    diverged = ~(np.isfinite(result.loss) & result.train.finite & result.test.finite)
    train_correct = result.train.correct & ~diverged[:, None]
    test_correct = result.test.correct & ~diverged[:, None]
    return TrialBatch(
        trial=np.array(trials).astype(np.int32),
        membership=pack(members),
        train_correct=pack(train_correct),
        test_correct=pack(test_correct),
        n_train=dataset.n_train,
        n_test=dataset.n_test,
        metrics=describe_trials(trials, members, train_correct, test_correct, result.loss, diverged),
        provenance=provenance,
        train_margin=result.train.margin,
        test_margin=result.test.margin,
        train_mistakes=result.train.predicted_class[~train_correct & ~diverged[:, None]].astype(np.uint16),
    )


def describe_training(
    fingerprint: str, device: torch.device, kinds: Sequence[str], started: datetime, seconds: float, phases: Phases
) -> Provenance:
    """Return a batch's provenance: the experiment's fingerprint, software, host, devices, start and duration.

    Args:
        fingerprint: of the experiment.
        device: where the shard was trained, at the end.
        kinds: kinds of all its devices in the order of use; included if there were several, because it was resumed.
        started: when, with its time zone.
        seconds: how long it took.
        phases: the seconds by phase; included if they were measured.
    """
    return Provenance(
        fingerprint=fingerprint,
        memtail=version("memtail"),
        torch=str(torch.__version__),  # a plain string: reading it elsewhere needs no torch
        python=platform.python_version(),
        host=platform.node(),
        device=device_name(device),
        cpu=cpu_name(),
        devices=tuple(kinds) if len(kinds) > 1 else None,
        started=started.isoformat(timespec="seconds"),
        seconds=round(seconds, 3),
        phases={phase: round(spent, 3) for phase, spent in phases.seconds.items()} if phases.on else None,
    )
