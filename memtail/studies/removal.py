"""Removal study: loss of test accuracy without the memorized examples, and without equally many random ones (the paper's figure 2).

In the study of the pairs, the loss is split into the loss on the test examples of the pairs and the loss on the rest. The pairs are
those by the paper's thresholds, so that results compare with its own. See `memtail.studies.removal_design` for the conditions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import numpy.typing as npt
import typer

from memtail.errors import SpecError
from memtail.estimators.pairs import INFL_THRESHOLD
from memtail.storage import ObjectStore
from memtail.studies.intervals import CONFIDENCE, Interval, difference, mean
from memtail.studies.options import REPEATS, ExperimentName, Repeats
from memtail.studies.removal_design import Condition, Removal, declare_removal
from memtail.studies.result import StudyResult, write_result
from memtail.studies.study import Prepared
from memtail.subsets import Mask

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Default thresholds of memorization.
THETAS = (0.1, 0.25, 0.5, 0.75, 0.9)

_METHOD = f"± is half of a {CONFIDENCE:.0%} confidence interval over the models (Student's t; Welch's for differences)."


def prepare(
    store: ObjectStore,
    name: ExperimentName,
    *,
    theta: Annotated[
        list[float] | None,
        typer.Option(
            help=f"Remove the examples of at least this memorization; may be repeated. By default {', '.join(map(str, THETAS))}.",
            metavar="T",
            show_default=False,
        ),
    ] = None,
    pairs: Annotated[
        bool, typer.Option("--pairs", help="Remove the training examples of the high-influence pairs, by the paper's thresholds, instead.")
    ] = False,
    repeats: Repeats = REPEATS,
) -> Prepared:
    """Prepare the study.

    Args:
        store: holds the experiment.
        name: the experiment.
        theta: thresholds of memorization, `THETAS` by default.
        pairs: whether to remove the training examples of the high-influence pairs instead.
        repeats: models per condition, at least 2.

    Raises:
        SpecError: both thresholds and pairs are asked for.
        ScoresError: there are no scores, or they are not final, or the study would remove no example or all of them.
        StoreError: there is no such experiment, or the store cannot be read.
    """
    if pairs and theta:
        raise SpecError(f"--theta {theta[0]:g} and --pairs exclude each other: leave one out")
    removal = declare_removal(store, name, thetas=None if pairs else theta or THETAS, repeats=repeats)
    return Prepared(lambda: _evaluate(store, removal), removal.training(store))


def _evaluate(store: ObjectStore, removal: Removal) -> StudyResult:
    """Measure the losses and write the result. Raises: ScoresError: too many models diverged; StoreError."""
    correct, counted = removal.read_outcomes(store)
    if removal.influenced is None:
        result, figure = _of_thresholds(store, removal, correct, counted)
    else:
        result, figure = _of_pairs(store, removal, correct, counted, removal.influenced)
    write_result(result, _table(removal, correct, counted), figure)
    return result


@dataclass(frozen=True)
class _Loss:
    """Accuracies of the models of one condition, and their loss against the models trained on all examples."""

    condition: Condition
    accuracies: npt.NDArray[np.float64]
    loss: Interval


def _losses(removal: Removal, correct: npt.NDArray[np.bool_], counted: Mask, among: npt.NDArray[np.bool_] | None = None) -> list[_Loss]:
    """Losses on some of the test examples, as shares of all test examples."""
    accuracies = (correct if among is None else correct[:, among]).sum(1) / correct.shape[1]
    groups = removal.split(accuracies, counted)
    return [_Loss(condition, values, difference(groups[0], values)) for condition, values in zip(removal.conditions, groups, strict=True)]


def _table(removal: Removal, correct: npt.NDArray[np.bool_], counted: Mask) -> dict[str, Any]:
    """One row per model."""
    conditions = [condition for condition in removal.conditions for _ in range(removal.repeats)]
    table: dict[str, Any] = {
        "trial": np.arange(len(conditions)),
        "arm": [condition.arm for condition in conditions],
        "theta": np.array([np.nan if condition.theta is None else condition.theta for condition in conditions]),
        "removed": [condition.removed for condition in conditions],
        "remaining": [1 - condition.removed / removal.record.n_train for condition in conditions],
        "diverged": ~counted,
        "test_accuracy": correct.mean(1),
    }
    if removal.influenced is not None:
        table["influenced_accuracy"] = correct[:, removal.influenced].mean(1)
    return table


def _result(
    store: ObjectStore, removal: Removal, counted: Mask, study: str, title: str, findings: list[str], measured: dict[str, Any]
) -> StudyResult:
    thetas = sorted({condition.theta for condition in removal.conditions if condition.theta is not None} | {*removal.unreached})
    settings = {"scores": removal.scores, "repeats": removal.repeats, **({"thetas": thetas} if thetas else {})}
    findings = [*findings, *_remarks(removal, counted), _METHOD]
    return StudyResult(store, removal.name, study, title, findings, int(counted.sum()), [removal.experiment.name], settings, measured)


def _remarks(removal: Removal, counted: Mask) -> Iterator[str]:
    """Yield the limitations of the losses, as sentences."""
    for condition in removal.conditions:
        if condition.emptied:
            labels = ", ".join(map(str, condition.emptied))
            removed = "of the pairs" if condition.theta is None else f"of mem >= {condition.theta:g}"
            plural = "" if len(condition.emptied) == 1 else "s"
            yield f"Without the examples {removed}, no training example of label{plural} {labels} is left."
    for theta in removal.unreached:
        yield f"No example has mem >= {theta:g}."
    if diverged := int((~counted).sum()):
        yield f"{diverged} of {len(counted)} models diverged and are left out."


def _baseline(removal: Removal, everything: _Loss, accuracy: Interval) -> str:
    return f"The test accuracy of {len(everything.accuracies)} models trained on all {removal.record.n_train} examples is {accuracy}%."


def _of_thresholds(store: ObjectStore, removal: Removal, correct: npt.NDArray[np.bool_], counted: Mask) -> tuple[StudyResult, "Figure"]:
    everything, *rest = _losses(removal, correct, counted)
    baseline = mean(everything.accuracies)
    findings = [_baseline(removal, everything, baseline)]
    steps = []
    for chosen, random in zip(rest[::2], rest[1::2], strict=True):
        more, removed = difference(random.accuracies, chosen.accuracies), chosen.condition.removed
        findings.append(
            f"Without the {removed} examples of mem >= {chosen.condition.theta:g} ({removed / removal.record.n_train:.1%}) models lose "
            f"{chosen.loss} points of accuracy, without equally many random examples {random.loss}: a difference of {more} points."
        )
        step = {"theta": chosen.condition.theta, "removed": removed, "memorized": chosen.loss, "random": random.loss, "difference": more}
        steps.append({key: vars(value) if isinstance(value, Interval) else value for key, value in step.items()})
    measured = {"accuracy": vars(baseline), "losses": steps}
    title = "Accuracy without the memorized examples"
    return _result(store, removal, counted, "removal", title, findings, measured), _draw_thresholds(removal, baseline, rest)


def _of_pairs(
    store: ObjectStore, removal: Removal, correct: npt.NDArray[np.bool_], counted: Mask, influenced: npt.NDArray[np.int64]
) -> tuple[StudyResult, "Figure"]:
    is_influenced = np.isin(np.arange(correct.shape[1]), influenced)
    parts = {
        name: _losses(removal, correct, counted, among)
        for name, among in (("all", None), ("influenced", is_influenced), ("rest", ~is_influenced))
    }
    baseline = mean(parts["all"][0].accuracies)
    chosen, random = ({name: losses[place].loss for name, losses in parts.items()} for place in (1, 2))
    removed, count = removal.conditions[1].removed, len(influenced)
    findings = [
        f"Without the {removed} training examples of the pairs of infl >= {INFL_THRESHOLD} models lose {chosen['all']} points of accuracy: "
        f"{chosen['influenced']} on the {count} influenced test examples, {chosen['rest']} on the other {correct.shape[1] - count}.",
        f"Without equally many random examples they lose {random['all']} points: {random['influenced']} on the influenced test examples, "
        f"{random['rest']} on the others.",
        _baseline(removal, parts["all"][0], baseline),
    ]
    measured = {
        "accuracy": vars(baseline),
        "removed": removed,
        "influenced": count,
        "losses": {arm: {part: vars(loss) for part, loss in losses.items()} for arm, losses in (("pairs", chosen), ("random", random))},
    }
    title = "Accuracy without the training examples of the high-influence pairs"
    return _result(store, removal, counted, "removal-pairs", title, findings, measured), _draw_pairs(removal, count, chosen, random)


def _draw_thresholds(removal: Removal, baseline: Interval, rest: list[_Loss]) -> "Figure":
    from memtail.figures.style import GREY, drawing

    thetas = [loss.condition.theta for loss in rest[::2]]
    with drawing(6, 4.8) as figure:
        accuracy, remaining = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        accuracy.axhline(100 * baseline.value, color=GREY, linestyle="--", label="nothing removed")
        for first, label, marker in ((0, "mem ≥ θ removed", "o"), (1, "equally many at random", "s")):
            bands = [mean(loss.accuracies) for loss in rest[first::2]]
            centre, half = (100 * np.array([getattr(band, part) for band in bands]) for part in ("value", "half"))
            line, *_ = accuracy.errorbar(thetas, centre, half, marker=marker, capsize=3, label=label)  # a single theta has no band
            accuracy.fill_between(thetas, centre - half, centre + half, color=line.get_color(), alpha=0.2, linewidth=0)
        accuracy.set(
            ylabel="test accuracy (%)", title=f"{removal.name}: {removal.repeats} models each, bands are {CONFIDENCE:.0%} intervals"
        )
        figure.legend(loc="outside lower center", ncols=3)
        shares = [100 * (1 - loss.condition.removed / removal.record.n_train) for loss in rest[::2]]
        remaining.plot(thetas, shares, marker="o", color=GREY)
        remaining.set(xlabel="threshold θ of memorization", ylabel="remaining (%)", ylim=(min(0.95 * min(shares), 90), 101))
    return figure


def _draw_pairs(removal: Removal, influenced: int, chosen: dict[str, Interval], random: dict[str, Interval]) -> "Figure":
    from memtail.figures.style import GREY, drawing

    labels = ["all test examples", f"the {influenced} influenced", "the rest"]
    places = np.arange(len(labels))
    with drawing(6, 2.8) as figure:
        axes = figure.subplots()
        for losses, label, shift, colour in ((chosen, "of the pairs", -0.2, None), (random, "random", 0.2, GREY)):
            values, halves = (100 * np.array([getattr(loss, part) for loss in losses.values()]) for part in ("value", "half"))
            axes.barh(places + shift, values, 0.38, xerr=halves, color=colour, label=label, error_kw={"capsize": 3, "linewidth": 1})
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(places, labels)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        removed, n = removal.conditions[1].removed, removal.record.n_train
        axes.set(xlabel="points of test accuracy lost", title=f"{removal.name}: {removed} of {n} training examples removed")
        axes.legend(title="removed examples", loc="lower right")
    return figure
