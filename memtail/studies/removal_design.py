"""Design of a removal study: the conditions, and the experiment that retrains without the removed examples.

For each threshold theta, the models of the "chosen" arm are trained without all examples of mem >= theta. The models of the "random" arm
are trained without a random set of the same size, drawn for each repeat. With pairs, the chosen arm leaves out the training examples of
the high-influence pairs instead. A first condition removes nothing. No two models have the same seed.

Condition c, repeat r is trial c * repeats + r of one experiment (see `memtail.studies.retraining`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from memtail.errors import ScoresError
from memtail.estimators.pairs import INFL_THRESHOLD, MEM_THRESHOLD
from memtail.experiment_store import Record
from memtail.randomness import Purpose, random_keys
from memtail.scores.fetch import open_scores
from memtail.spec import Experiment
from memtail.storage import ObjectStore
from memtail.studies import retraining
from memtail.studies.study import Training
from memtail.subsets import Mask

Arm = Literal["none", "chosen", "random"]


@dataclass(frozen=True)
class Condition:
    """One condition of the study.

    Attributes:
        arm: "none" (nothing is removed), "chosen" (the study's examples) or "random" (equally many).
        theta: threshold of memorization; None with pairs, and where nothing is removed.
        removed: number of removed examples.
        emptied: labels of the classes without any example left.
    """

    arm: Arm
    theta: float | None
    removed: int
    emptied: tuple[int, ...] = ()


@dataclass(frozen=True)
class Removal:
    """A removal study, declared.

    Attributes:
        record: the experiment studied.
        scores: version of its scores.
        experiment: the experiment that trains the models.
        conditions: the conditions, in the order of the trials.
        repeats: models per condition.
        influenced: int64, the test examples of the pairs; None in a study of thresholds.
        unreached: requested thresholds that no example reaches.
    """

    record: Record
    scores: str
    experiment: Experiment
    conditions: list[Condition]
    repeats: int
    influenced: npt.NDArray[np.int64] | None
    unreached: list[float]

    @property
    def name(self) -> str:
        """Name of the experiment studied."""
        return self.record.experiment.name

    def training(self, store: ObjectStore) -> Training:
        """Return the models to train, on the dataset of the experiment studied."""
        return Training(self.experiment, lambda: retraining.dataset_of(store, self.record))

    def split(self, values: npt.NDArray[Any], counted: Mask) -> list[npt.NDArray[Any]]:
        """Split values of the trials by condition, leaving out trials that do not count."""
        starts = range(0, len(self.conditions) * self.repeats, self.repeats)
        return [values[start : start + self.repeats][counted[start : start + self.repeats]] for start in starts]

    def read_outcomes(self, store: ObjectStore) -> tuple[npt.NDArray[np.bool_], Mask]:
        """Read the outcomes of the trained models (see `retraining.read_outcomes`).

        Raises:
            ScoresError: fewer than two models of a condition count.
            StoreError: the store cannot be read.
        """
        correct, counted = retraining.read_outcomes(store, self.experiment)
        for condition, of_condition in zip(self.conditions, self.split(counted, counted), strict=True):
            if len(of_condition) < 2:
                raise ScoresError(
                    f"study of '{self.name}': of {self.repeats} models with {condition.removed} examples removed "
                    f"{self.repeats - len(of_condition)} diverged: give more --repeats"
                )
        return correct, counted


def declare_removal(store: ObjectStore, name: str, *, thetas: Sequence[float] | None, repeats: int) -> Removal:
    """Declare the study from the scores of an experiment; equal scores give equal declarations.

    Args:
        store: holds the experiment.
        name: the experiment.
        thetas: thresholds of memorization; those that no example reaches are left out. None removes the training examples of the
            high-influence pairs instead.
        repeats: models per condition, at least 2.

    Raises:
        SpecError: there are no test examples, or only scores are recorded.
        ScoresError: there are no scores, or they are not final, or the study would remove no example or all of them.
        StoreError: there is no such experiment, or the store cannot be read.
    """
    record = retraining.require_finished(store, name)
    retraining.require_test_set(record, "removal")
    retraining.require_correctness(record, "removal")
    scores = open_scores(store, name)
    n, seed = record.n_train, record.experiment.subsets.seed
    if thetas is None:
        chosen: dict[float | None, Mask] = {None: np.isin(np.arange(n), scores.pairs["tr_idx"])}
        lacking = f"no high-influence pairs (infl >= {INFL_THRESHOLD}, mem >= {MEM_THRESHOLD}): train more trials"
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
            raise ScoresError(f"experiment '{name}': all examples have mem >= {theta}, so none is left to train on: give higher --theta")
        random = np.ones((repeats, n), np.bool_)
        for repeat, order in enumerate(orders):
            random[repeat, order[:removed]] = False
        labels = scores.train_labels
        emptied = tuple(np.setdiff1d(labels, labels[~out]).tolist())
        conditions += [Condition("chosen", theta, removed, emptied), Condition("random", theta, removed)]
        masks += [np.tile(~out, (repeats, 1)), random]
    experiment = retraining.derive_experiment(record, "removal", np.concatenate(masks))
    influenced = np.unique(scores.pairs["tt_idx"]) if thetas is None else None
    return Removal(record, scores.folder.name, experiment, conditions, repeats, influenced, unreached)
