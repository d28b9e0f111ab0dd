"""Checks outcomes of training code of the user's own, and packs them into trial batches."""

import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import numpy.typing as npt

from memtail.datasets import DatasetLabels
from memtail.errors import OutcomeError
from memtail.trainers.task import Outcome
from memtail.trials import Provenance, TrialBatch, TrialMetrics, pack

#: Largest difference between in-subset and held-out accuracy, in standard errors, at which outcomes look like those of another order.
_SAME = 2.0


def check_outcome(outcome: object, dataset: DatasetLabels, margins: bool) -> tuple[dict[str, npt.NDArray[Any]], dict[str, float]]:
    """Check what a trainer returned, and return its arrays (`train_correct`, `test_correct`, the margins if recorded) and its metrics.

    Args:
        outcome: what the trainer returned.
        dataset: the dataset of the trial.
        margins: whether the experiment records margins.

    Raises:
        OutcomeError: it is no outcome, an array has another length or type, or the labels or ids are not the dataset's in its order.
    """
    if not isinstance(outcome, Outcome):
        raise OutcomeError(f"the trainer returned {type(outcome).__name__}, not a memtail.Outcome: return one")
    try:
        metrics = {str(name): float(value) for name, value in outcome.metrics.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise OutcomeError(f"metrics are not numbers by name ({error}): return a dict of floats") from None
    arrays: dict[str, npt.NDArray[Any]] = {}
    for split, size in (("train", dataset.n_train), ("test", dataset.n_test)):
        arrays[f"{split}_correct"] = _correct(f"{split}_correct", getattr(outcome, f"{split}_correct"), size)
        if margins:
            arrays[f"{split}_margin"] = _margins(f"{split}_margin", getattr(outcome, f"{split}_margin"), size)
        _check_same(f"{split}_labels", getattr(outcome, f"{split}_labels"), getattr(dataset, f"{split}_labels"))
        files = getattr(dataset, f"{split}_files")
        ids = None if files is None else np.char.decode(files, "utf-8", "surrogateescape")
        _check_same(f"{split}_ids", getattr(outcome, f"{split}_ids"), ids)
    return arrays, metrics


def _array(name: str, values: Any, size: int) -> npt.NDArray[Any]:
    if values is None:
        raise OutcomeError(f"{name} is missing: return one value for each of the {size} examples")
    with suppress(AttributeError):  # of a tensor that needs a gradient or is on another device
        values = values.detach().cpu()
    try:
        array = np.asarray(values)
    except Exception as error:  # array-likes may raise anything
        raise OutcomeError(f"{name} is a {type(values).__name__} that numpy cannot read ({error}): return an array") from None
    if array.shape != (size,):
        raise OutcomeError(
            f"{name} has shape {list(array.shape)}, expected is [{size}]: return a value for every example of the dataset, in its order, "
            "not only for those of the subset"
        )
    return array


def _correct(name: str, values: Any, size: int) -> npt.NDArray[np.bool_]:
    array = _array(name, values, size)
    if array.dtype != np.bool_ and not (array.dtype.kind in "iuf" and np.isin(array, (0, 1)).all()):
        raise OutcomeError(f"{name} is {array.dtype} with other values than 0 and 1: return booleans, such as `predicted == labels`")
    return array.astype(np.bool_)


def _margins(name: str, values: Any, size: int) -> npt.NDArray[np.float16]:
    if values is None:
        raise OutcomeError(f"{name} is missing, and the experiment records margins: return it, or remove record.margins")
    array = _array(name, values, size)
    if array.dtype.kind not in "iuf":
        raise OutcomeError(f"{name} is {array.dtype}: return floats")
    largest = float(np.finfo(np.float16).max)
    margins: npt.NDArray[np.float16] = np.clip(array, -largest, largest).astype(np.float16)
    return margins


def _check_same(name: str, returned: Any, expected: npt.NDArray[Any] | None) -> None:
    if returned is None:
        return
    if expected is None:
        raise OutcomeError(f"{name} was returned, but the dataset has none: return labels instead")
    array = _array(name, returned, len(expected))
    same = array.astype(str) == expected if expected.dtype.kind == "U" else array == expected
    if not np.all(same):
        first = int(np.argmin(same))
        raise OutcomeError(
            f"{name} differs from the dataset at {int((~same).sum())} of {len(expected)} examples, first at {first} "
            f"({array[first]}, in the dataset {expected[first]}): the outcomes are in another order; evaluate "
            "without shuffling"
        )


def looks_permuted(members: npt.NDArray[np.bool_], train_correct: npt.NDArray[np.bool_]) -> bool:
    """Return whether outcomes are probably not in the order of the dataset: a model that fails on some of its subset is no better on it.

    Args:
        members: bool [k, n].
        train_correct: bool [k, n].
    """
    inside, outside = train_correct[members], train_correct[~members]
    if not len(inside) or not len(outside) or inside.all():
        return False
    error = np.sqrt(inside.var() / len(inside) + outside.var() / len(outside))
    return bool(inside.mean() - outside.mean() <= _SAME * error)


def make_batch(
    dataset: DatasetLabels,
    trials: Sequence[int],
    members: npt.NDArray[np.bool_],
    arrays: Sequence[Mapping[str, npt.NDArray[Any]]],
    metrics: Sequence[Mapping[str, float]],
    provenance: Provenance,
) -> TrialBatch:
    """Pack the outcomes of some trials into a batch. A trial whose loss or margins are not numbers is diverged: its bits are 0.

    Args:
        dataset: the dataset of the k trials.
        trials: their indices.
        members: bool [k, n], their subsets.
        arrays: of each trial, as `check_outcome` returns them.
        metrics: of each trial, as the trainer returned them.
        provenance: of the batch.
    """
    stacked = {name: np.stack([each[name] for each in arrays]) for name in arrays[0]}
    losses = [each.get("loss") for each in metrics]
    diverged = np.array([loss is not None and not np.isfinite(loss) for loss in losses])
    for name in ("train_margin", "test_margin"):
        if name in stacked:
            diverged |= np.isnan(stacked[name]).any(1)
    train_correct = stacked["train_correct"] & ~diverged[:, None]
    test_correct = stacked["test_correct"] & ~diverged[:, None]
    further = [{name: float(value) for name, value in each.items() if name != "loss" and np.isfinite(value)} for each in metrics]
    known = np.array([np.nan if loss is None else loss for loss in losses], dtype=np.float64)
    return TrialBatch(
        trial=np.array(trials).astype(np.int32),
        membership=pack(members),
        train_correct=pack(train_correct),
        test_correct=pack(test_correct),
        n_train=dataset.n_train,
        n_test=dataset.n_test,
        metrics=describe_trials(trials, members, train_correct, test_correct, known, diverged, further),
        provenance=provenance,
        train_margin=stacked.get("train_margin"),
        test_margin=stacked.get("test_margin"),
    )


def describe_trials(
    trials: Sequence[int],
    members: npt.NDArray[np.bool_],
    train_correct: npt.NDArray[np.bool_],
    test_correct: npt.NDArray[np.bool_],
    losses: npt.NDArray[np.float64],
    diverged: npt.NDArray[np.bool_],
    further: Sequence[dict[str, float]] = (),
) -> list[TrialMetrics]:
    """Return the metrics of some trials.

    Args:
        trials: their k indices.
        members: bool [k, n].
        train_correct: bool [k, n].
        test_correct: bool [k, q].
        losses: float64 [k]; NaN where unknown.
        diverged: bool [k].
        further: of each trial, numbers that the trainer returned.
    """
    return [
        TrialMetrics(
            trial=int(trial),
            diverged=bool(diverged[row]),
            loss=float(losses[row]) if np.isfinite(losses[row]) else None,
            in_subset_accuracy=float(train_correct[row, members[row]].mean()),
            held_out_accuracy=None if members[row].all() else float(train_correct[row, ~members[row]].mean()),
            test_accuracy=float(test_correct[row].mean()),
            further=(further[row] or None) if further else None,
        )
        for row, trial in enumerate(trials)
    ]


def describe_training(fingerprint: str, device: str, cpu: str, started: datetime, seconds: float) -> Provenance:
    """Return a batch's provenance.

    Args:
        fingerprint: of the experiment.
        device: name of the device.
        cpu: kind of processor.
        started: when, with its time zone.
        seconds: how long it took.
    """
    torch = None
    with suppress(PackageNotFoundError):  # reading it from the module would import torch, which the trainer may not need
        torch = version("torch")
    return Provenance(
        fingerprint=fingerprint,
        memtail=version("memtail"),
        torch=torch,
        python=platform.python_version(),
        host=platform.node(),
        device=device,
        cpu=cpu,
        started=started.isoformat(timespec="seconds"),
        seconds=round(seconds, 3),
    )
