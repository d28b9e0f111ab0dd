"""What memorized examples do for the accuracy: retraining without them, and without as many random ones (the paper's figure 2).

For each threshold theta the models of one arm are trained without every example of mem >= theta, those of the other without a random
set of the same size, a new one for each repeat. In the study of the pairs the first arm leaves out the training side of the
high-influence pairs instead, and the loss of accuracy is split into that on the test examples of the pairs and that on the rest. Some
models are trained on everything, to compare with. No two models have the same seed.

All of them are the trials of one experiment (see `memtail.studies.retraining`): condition c, repeat r is trial c * repeats + r.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from memtail.errors import ScoresError
from memtail.estimators.pairs import INFL_THRESHOLD, MEM_THRESHOLD
from memtail.randomness import Purpose, random_keys
from memtail.scores.fetch import open_scores
from memtail.spec import Experiment
from memtail.storage import ObjectStore
from memtail.studies import retraining
from memtail.studies.intervals import CONFIDENCE, Interval, difference, mean
from memtail.studies.result import StudyResult, write_result
from memtail.subsets import Mask

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Arm = Literal["none", "chosen", "random"]


@dataclass(frozen=True)
class Condition:
    """What some of the models are trained without.

    Attributes:
        arm: "none" (nothing is removed), "chosen" (what the study is about), or "random" (as many).
        theta: the threshold of memorization; None with pairs, and where nothing is removed.
        removed: how many examples.
        emptied: the labels of the classes of which no example is left.
    """

    arm: Arm
    theta: float | None
    removed: int
    emptied: tuple[int, ...] = ()


@dataclass(frozen=True)
class Removal:
    """A removal study, planned.

    Attributes:
        name: the experiment that it is of.
        scores: the version of the scores that it starts from.
        experiment: what is to be trained.
        conditions: in the order of its trials, `repeats` of each.
        n_train: n.
        influenced: int64, the test examples of the pairs; None in the study of thresholds.
        unreached: the thresholds asked for that no example reaches.
    """

    name: str
    scores: str
    experiment: Experiment
    conditions: list[Condition]
    repeats: int
    n_train: int
    influenced: npt.NDArray[np.int64] | None
    unreached: list[float]


def plan_removal(store: ObjectStore, name: str, *, thetas: Sequence[float] | None, repeats: int) -> Removal:
    """Plan the study from the scores of an experiment. The same scores give the same plan.

    Args:
        store, name: the experiment.
        thetas: thresholds of memorization; those that no example reaches are left out. None: remove the training side of the
            high-influence pairs instead.
        repeats: models per condition, at least 2.

    Raises:
        ScoresError: there are no scores, or they are to change, or nothing would be removed, or everything.
    """
    record = retraining.require_finished(store, name)
    scores = open_scores(store, name)
    n, seed = record.n_train, record.experiment.subsets.seed
    if thetas is None:
        chosen: dict[float | None, Mask] = {None: np.isin(np.arange(n), scores.pairs["tr_idx"])}
        lacking = f"no high-influence pairs (infl >= {INFL_THRESHOLD}, mem >= {MEM_THRESHOLD}): more trials may find some"
    else:
        mem = scores.memorization["mem"]
        chosen = {theta: mem >= theta for theta in sorted(set(thetas))}
        lacking = f"no example of mem >= {min(thetas)}: give lower --theta"
    unreached = [theta for theta, out in chosen.items() if theta is not None and not out.any()]
    chosen = {theta: out for theta, out in chosen.items() if out.any()}
    if not chosen:
        raise ScoresError(f"experiment '{name}' has {lacking}")
    conditions, masks = [Condition("none", None, 0)], [np.ones((repeats, n), np.bool_)]
    orders = [np.argsort(random_keys(n, seed, Purpose.REMOVAL, repeat), kind="stable") for repeat in range(repeats)]
    for theta, out in chosen.items():
        removed = int(out.sum())
        if removed == n:
            raise ScoresError(
                f"experiment '{name}': every example has mem >= {theta}, so that none is left to train on: give higher --theta"
            )
        random = np.ones((repeats, n), np.bool_)
        for repeat, order in enumerate(orders):
            random[repeat, order[:removed]] = False
        labels = scores.memorization["label"]
        emptied = tuple(np.setdiff1d(labels, labels[~out]).tolist())
        conditions += [Condition("chosen", theta, removed, emptied), Condition("random", theta, removed)]
        masks += [np.tile(~out, (repeats, 1)), random]
    experiment = retraining.derive_experiment(record, "removal", np.concatenate(masks))
    influenced = np.unique(scores.pairs["tt_idx"]) if thetas is None else None
    return Removal(name, scores.folder.name, experiment, conditions, repeats, n, influenced, unreached)


def evaluate_removal(store: ObjectStore, planned: Removal) -> StudyResult:
    """Measure what the retrained models lost, and write the result into the store.

    Raises:
        ScoresError: too many of the models diverged.
        StoreError: the store cannot be read or written.
    """
    correct, counted = outcomes(store, planned)
    result, figure = (_of_thresholds if planned.influenced is None else _of_pairs)(store, planned, correct, counted)
    write_result(result, _table(planned, correct, counted), figure)
    return result


def outcomes(store: ObjectStore, planned: Removal) -> tuple[npt.NDArray[np.bool_], Mask]:
    """What the retrained models get right, and which of them count, as `retraining.correctness` gives them.

    Raises:
        ScoresError: of some condition fewer than two models count.
        StoreError: the store cannot be read.
    """
    correct, counted = retraining.correctness(store, planned.experiment)
    for place, condition in enumerate(planned.conditions):
        left = int(counted[place * planned.repeats :][: planned.repeats].sum())
        if left < 2:
            raise ScoresError(
                f"study of '{planned.name}': of {planned.repeats} models with {condition.removed} examples removed "
                f"{planned.repeats - left} diverged: give more --repeats"
            )
    return correct, counted


@dataclass(frozen=True)
class _Lost:
    """Of one condition: its models' accuracies and what they lost beside those trained on everything."""

    condition: Condition
    accuracies: npt.NDArray[np.float64]
    loss: Interval


def _losses(planned: Removal, correct: npt.NDArray[np.bool_], counted: Mask, among: npt.NDArray[np.bool_] | None = None) -> list[_Lost]:
    """The losses on some of the test examples, as shares of all."""
    right = (correct if among is None else correct[:, among]).sum(1) / correct.shape[1]
    groups = [right[place : place + planned.repeats][counted[place : place + planned.repeats]] for place in _places(planned)]
    return [_Lost(condition, values, difference(groups[0], values)) for condition, values in zip(planned.conditions, groups, strict=True)]


def _places(planned: Removal) -> range:
    return range(0, len(planned.conditions) * planned.repeats, planned.repeats)


def _table(planned: Removal, correct: npt.NDArray[np.bool_], counted: Mask) -> dict[str, Any]:
    """One row per model."""
    of = [condition for condition in planned.conditions for _ in range(planned.repeats)]
    table: dict[str, Any] = {
        "trial": np.arange(len(of)),
        "arm": [condition.arm for condition in of],
        "theta": np.array([np.nan if condition.theta is None else condition.theta for condition in of]),
        "removed": [condition.removed for condition in of],
        "remaining": [1 - condition.removed / planned.n_train for condition in of],
        "diverged": ~counted,
        "test_accuracy": correct.mean(1),
    }
    if planned.influenced is not None:
        table["influenced_accuracy"] = correct[:, planned.influenced].mean(1)
    return table


_HOW = "± is half of a {:.0%} confidence interval over the models (Student's t; of differences, Welch's)."


def _result(
    store: ObjectStore, planned: Removal, counted: Mask, study: str, title: str, findings: list[str], measured: dict[str, Any]
) -> StudyResult:
    thetas = sorted({condition.theta for condition in planned.conditions if condition.theta is not None} | {*planned.unreached})
    settings = {"scores": planned.scores, "repeats": planned.repeats, **({"thetas": thetas} if thetas else {})}
    findings = [*findings, *_remarks(planned, counted), _HOW.format(CONFIDENCE)]
    return StudyResult(store, planned.name, study, title, findings, int(counted.sum()), [planned.experiment.name], settings, measured)


def _remarks(planned: Removal, counted: Mask) -> Iterator[str]:
    """What to know before the losses are believed."""
    for condition in planned.conditions:
        if condition.emptied:
            which = ", ".join(map(str, condition.emptied))
            of = "the pairs'" if condition.theta is None else f"those of mem >= {condition.theta:g}"
            yield f"Without {of} no training example is left of {'label' if len(condition.emptied) == 1 else 'labels'} {which}."
    for theta in planned.unreached:
        yield f"No example has mem >= {theta:g}."
    if diverged := int((~counted).sum()):
        yield f"{diverged} of {len(counted)} models diverged, and are left out."


def _baseline(planned: Removal, everything: _Lost, accuracy: Interval) -> str:
    models = len(everything.accuracies)
    return f"{models} models trained on all {planned.n_train} examples classify {accuracy}% of the test examples correctly."


def _of_thresholds(store: ObjectStore, planned: Removal, correct: npt.NDArray[np.bool_], counted: Mask) -> tuple[StudyResult, "Figure"]:
    everything, *rest = _losses(planned, correct, counted)
    baseline = mean(everything.accuracies)
    findings = [_baseline(planned, everything, baseline)]
    steps = []
    for chosen, random in zip(rest[::2], rest[1::2], strict=True):
        more, removed = difference(random.accuracies, chosen.accuracies), chosen.condition.removed
        findings.append(
            f"Without the {removed} examples of mem >= {chosen.condition.theta:g} ({removed / planned.n_train:.1%}) models lose "
            f"{chosen.loss} points of accuracy, without as many random ones {random.loss}: memorized examples are worth {more} points more."
        )
        step = {"theta": chosen.condition.theta, "removed": removed, "memorized": chosen.loss, "random": random.loss, "difference": more}
        steps.append({key: vars(value) if isinstance(value, Interval) else value for key, value in step.items()})
    measured = {"accuracy": vars(baseline), "losses": steps}
    title = "Accuracy without the memorized examples"
    return _result(store, planned, counted, "removal", title, findings, measured), _draw_thresholds(planned, baseline, rest)


def _of_pairs(store: ObjectStore, planned: Removal, correct: npt.NDArray[np.bool_], counted: Mask) -> tuple[StudyResult, "Figure"]:
    assert planned.influenced is not None
    influenced = np.isin(np.arange(correct.shape[1]), planned.influenced)
    parts = {
        name: _losses(planned, correct, counted, among)
        for name, among in (("all", None), ("influenced", influenced), ("rest", ~influenced))
    }
    baseline = mean(parts["all"][0].accuracies)
    chosen, random = ({name: losses[place].loss for name, losses in parts.items()} for place in (1, 2))
    removed, count = planned.conditions[1].removed, int(influenced.sum())
    findings = [
        f"Without the {removed} training examples of the high-influence pairs models lose {chosen['all']} points of accuracy: "
        f"{chosen['influenced']} on the {count} influenced test examples, {chosen['rest']} on the other {len(influenced) - count}.",
        f"Without as many random ones they lose {random['all']} points: {random['influenced']} on the influenced test examples, "
        f"{random['rest']} on the others.",
        _baseline(planned, parts["all"][0], baseline),
    ]
    measured = {
        "accuracy": vars(baseline),
        "removed": removed,
        "influenced": count,
        "losses": {arm: {part: vars(loss) for part, loss in losses.items()} for arm, losses in (("pairs", chosen), ("random", random))},
    }
    title = "Accuracy without the training examples of the high-influence pairs"
    return _result(store, planned, counted, "removal-pairs", title, findings, measured), _draw_pairs(planned, chosen, random)


def _draw_thresholds(planned: Removal, baseline: Interval, rest: list[_Lost]) -> "Figure":
    from memtail.figures.style import GREY, drawing

    thetas = [lost.condition.theta for lost in rest[::2]]
    with drawing(6, 4.8) as figure:
        accuracy, remaining = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        accuracy.axhline(100 * baseline.value, color=GREY, linestyle="--", label="nothing removed")
        for first, label, marker in ((0, "mem ≥ θ removed", "o"), (1, "as many at random", "s")):
            bands = [mean(lost.accuracies) for lost in rest[first::2]]
            centre, half = (100 * np.array([getattr(band, part) for band in bands]) for part in ("value", "half"))
            line, *_ = accuracy.errorbar(thetas, centre, half, marker=marker, capsize=3, label=label)  # a single theta has no band
            accuracy.fill_between(thetas, centre - half, centre + half, color=line.get_color(), alpha=0.2, linewidth=0)
        accuracy.set(
            ylabel="test accuracy (%)", title=f"{planned.name}: {planned.repeats} models each, bands are {CONFIDENCE:.0%} intervals"
        )
        figure.legend(loc="outside lower center", ncols=3)
        shares = [100 * (1 - lost.condition.removed / planned.n_train) for lost in rest[::2]]
        remaining.plot(thetas, shares, marker="o", color=GREY)
        remaining.set(xlabel="threshold θ of memorization", ylabel="remaining (%)", ylim=(min(0.95 * min(shares), 90), 101))
    return figure


def _draw_pairs(planned: Removal, chosen: dict[str, Interval], random: dict[str, Interval]) -> "Figure":
    from memtail.figures.style import GREY, drawing

    assert planned.influenced is not None
    labels = ["all test examples", f"the {len(planned.influenced)} influenced", "the rest"]
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
        removed = planned.conditions[1].removed
        axes.set(xlabel="points of test accuracy lost", title=f"{planned.name}: {removed} of {planned.n_train} training examples removed")
        axes.legend(title="removed examples", loc="lower right")
    return figure
