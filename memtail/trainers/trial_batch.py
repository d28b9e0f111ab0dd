"""Packs the outcomes of the trials of a shard into a trial batch, for every trainer."""

import platform
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt

from memtail.datasets import DatasetLabels
from memtail.errors import OutcomeError
from memtail.statistics.soft import ONE
from memtail.trials import Provenance, TrialBatch, TrialMetrics, pack

_Bools = npt.NDArray[np.bool_]


def pack_trials(
    dataset: DatasetLabels,
    trials: Sequence[int],
    members: _Bools,
    train_correct: _Bools | None,
    test_correct: _Bools | None,
    losses: npt.NDArray[np.float64],
    diverged: _Bools,
    provenance: Provenance,
    *,
    further: Sequence[dict[str, float]] | None = None,
    train_margin: npt.NDArray[np.float16] | None = None,
    test_margin: npt.NDArray[np.float16] | None = None,
    train_score: npt.NDArray[np.uint8] | None = None,
    test_score: npt.NDArray[np.uint8] | None = None,
    train_predicted: npt.NDArray[np.integer[Any]] | None = None,
) -> TrialBatch:
    """Make a batch. The correctness bits and scores of a diverged trial are 0, and it has no misclassifications.

    Args:
        dataset: the dataset of the k trials.
        trials: their indices.
        members: bool [k, n], their subsets.
        train_correct: bool [k, n]; None where only scores are recorded, which then take its place in the metrics.
        test_correct: bool [k, q]; None likewise.
        losses: float64 [k]; NaN or infinite where there is none.
        diverged: bool [k].
        provenance: of the batch.
        further: of each trial, numbers that training code of the user's own returned.
        train_margin: float16 [k, n], where margins are recorded.
        test_margin: float16 [k, q].
        train_score: uint8 [k, n], where scores are recorded.
        test_score: uint8 [k, q].
        train_predicted: integers [k, n], predicted classes, if they are known.
    """
    counted = ~diverged[:, None]
    train_correct = None if train_correct is None else train_correct & counted
    test_correct = None if test_correct is None else test_correct & counted
    train_score = None if train_score is None else train_score * counted
    test_score = None if test_score is None else test_score * counted
    train = train_score / ONE if train_correct is None and train_score is not None else train_correct
    test = test_score / ONE if test_correct is None and test_score is not None else test_correct
    if train is None or test is None:
        raise OutcomeError("the trials have neither correctness nor scores: record one of them")
    metrics = [
        TrialMetrics(
            trial=int(trial),
            diverged=bool(diverged[row]),
            loss=float(losses[row]) if np.isfinite(losses[row]) else None,
            in_subset_accuracy=float(train[row, members[row]].mean()),
            held_out_accuracy=None if members[row].all() else float(train[row, ~members[row]].mean()),
            test_accuracy=float(test[row].mean()) if dataset.n_test else None,
            further=(further[row] or None) if further else None,
        )
        for row, trial in enumerate(trials)
    ]
    mistakes = None
    if train_predicted is not None and train_correct is not None:
        mistakes = train_predicted[~train_correct & counted].astype(np.uint16)
    return TrialBatch(
        trial=np.array(trials).astype(np.int32),
        membership=pack(members),
        train_correct=None if train_correct is None else pack(train_correct),
        test_correct=None if test_correct is None else pack(test_correct),
        n_train=dataset.n_train,
        n_test=dataset.n_test,
        metrics=metrics,
        provenance=provenance,
        train_margin=train_margin,
        test_margin=test_margin,
        train_score=train_score,
        test_score=test_score,
        train_mistakes=mistakes,
    )


def describe_training(fingerprint: str, device: str, cpu: str, started: datetime, seconds: float) -> Provenance:
    """Return a batch's provenance: the experiment's fingerprint, software, host, device, start and duration.

    Args:
        fingerprint: of the experiment.
        device: name of the device, that of the end.
        cpu: kind of processor.
        started: when, with its time zone.
        seconds: how long it took.
    """
    import torch  # not for callers that pack trials of others

    return Provenance(
        fingerprint=fingerprint,
        memtail=version("memtail"),
        torch=str(torch.__version__),  # a plain string: reading it elsewhere needs no torch
        python=platform.python_version(),
        host=platform.node(),
        device=device,
        cpu=cpu,
        started=started.isoformat(timespec="seconds"),
        seconds=round(seconds, 3),
    )
