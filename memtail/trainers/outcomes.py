"""Checks outcomes of training code of the user's own."""

from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from memtail.datasets import DatasetLabels
from memtail.errors import OutcomeError
from memtail.spec import RecordedOutcomes
from memtail.trainers.task import Outcome
from memtail.trials import recorded_margins

#: Largest difference between in-subset and held-out outcomes, in standard errors, at which outcomes look like those of another order.
_SAME = 2.0


def recorded_arrays(record: RecordedOutcomes) -> set[str]:
    """Return the names of the arrays of a trial."""
    recorded = {"correct": not record.scores_only, "margin": record.margins, "score": record.keeps_scores}
    return {f"{split}_{name}" for split in ("train", "test") for name, kept in recorded.items() if kept}


def check_outcome(
    outcome: object, dataset: DatasetLabels, record: RecordedOutcomes
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, float]]:
    """Check what a trainer returned, and return its arrays (correctness, margins and scores, as far as they are recorded) and its metrics.

    Args:
        outcome: what the trainer returned.
        dataset: the dataset of the trial.
        record: what the experiment records.

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
        correct, margin, score = (getattr(outcome, f"{split}_{name}") for name in ("correct", "margin", "score"))
        if not record.scores_only:
            arrays[f"{split}_correct"] = _correct(f"{split}_correct", correct if size or correct is not None else (), size)
        elif correct is not None:
            raise OutcomeError(
                f"{split}_correct was returned, and the experiment records scores only: remove it, or declare record: {{scores: true}}"
            )
        if record.margins:
            arrays[f"{split}_margin"] = _margins(f"{split}_margin", margin if size or margin is not None else (), size)
        if record.keeps_scores:
            arrays[f"{split}_score"] = _scores(f"{split}_score", score if size or score is not None else (), size, record.scores_only)
        labels = getattr(dataset, f"{split}_labels") if dataset.labelled else None
        _check_same(f"{split}_labels", getattr(outcome, f"{split}_labels"), labels)
        files = getattr(dataset, f"{split}_files")
        ids = None if files is None else np.char.decode(files, "utf-8", "surrogateescape")
        _check_same(f"{split}_ids", getattr(outcome, f"{split}_ids"), ids)
    return arrays, metrics


def _array(name: str, values: Any, size: int) -> npt.NDArray[Any]:
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
    if values is None:
        raise OutcomeError(
            f"{name} is missing: return one value for each of the {size} examples, or scores alone, with record: {{scores: only}}"
        )
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
    return recorded_margins(array)


def _scores(name: str, values: Any, size: int, alone: bool) -> npt.NDArray[np.float32]:
    if values is None:
        kept, instead = ("scores only", "return correctness and remove") if alone else ("scores", "remove")
        raise OutcomeError(f"{name} is missing, and the experiment records {kept}: return it, or {instead} record.scores")
    array = _array(name, values, size)
    if array.dtype.kind not in "biuf":
        raise OutcomeError(f"{name} is {array.dtype}: return floats from 0 to 1")
    outside = (array < 0) | (array > 1)  # not NaN, which makes the trial diverged
    if outside.any():
        first = int(np.argmax(outside))
        raise OutcomeError(f"{name} is {array[first]} at {first}: return scores from 0 to 1, such as the probability of the label")
    scores: npt.NDArray[np.float32] = array.astype(np.float32)
    return scores


def _check_same(name: str, returned: Any, expected: npt.NDArray[Any] | None) -> None:
    if returned is None:
        return
    if expected is None:
        instead = "labels" if name.endswith("_ids") else "ids, if it has those, or neither"
        raise OutcomeError(f"{name} was returned, but the dataset has none: return {instead}")
    array = _array(name, returned, len(expected))
    same = array.astype(str) == expected if expected.dtype.kind == "U" else array == expected
    if not np.all(same):
        first = int(np.argmin(same))
        raise OutcomeError(
            f"{name} differs from the dataset at {int((~same).sum())} of {len(expected)} examples, first at {first} "
            f"({array[first]}, in the dataset {expected[first]}): the outcomes are in another order; evaluate "
            "without shuffling"
        )


def looks_permuted(members: npt.NDArray[np.bool_], train: npt.NDArray[np.bool_ | np.floating[Any]]) -> bool:
    """Return whether outcomes are probably not in the order of the dataset: a model that fails on some of its subset is no better on it.

    Args:
        members: bool [k, n].
        train: [k, n], correctness, or scores from 0 to 1.
    """
    if (train[members] == 1).all() or members.all() or not members.any():
        return False
    if len(train) > 1:
        train = train - train.mean(0)  # without what makes one example easier than another
    difference, error = _difference(members, train)
    return difference <= _SAME * error


def says_enough(members: npt.NDArray[np.bool_], train: npt.NDArray[np.bool_ | np.floating[Any]]) -> bool:
    """Return whether trials would show that models err a tenth less on their subsets than elsewhere; a single trial is often too noisy.

    Args:
        members: bool [k, n], neither all nor none.
        train: [k, n], correctness, or scores from 0 to 1.
    """
    return len(train) > 1 or _SAME * _difference(members, train)[1] <= 0.1 * (1 - float(train[~members].mean()))


def _difference(members: npt.NDArray[np.bool_], train: npt.NDArray[np.bool_ | np.floating[Any]]) -> tuple[float, float]:
    """Mean outcome inside the subsets less that outside, and its standard error."""
    inside, outside = train[members], train[~members]
    error = np.sqrt(inside.var() / len(inside) + outside.var() / len(outside))
    return float(inside.mean() - outside.mean()), float(error)
