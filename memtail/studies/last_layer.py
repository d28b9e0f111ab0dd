"""Last-layer study: memorization with only the last layer trained (the paper: 38 memorized examples instead of 18,099).

One model is trained on all examples and frozen, and its features of the images become a dataset (see `memtail.studies.features`). A linear
model is trained on that dataset, on the subsets and with the recipe of the experiment but without augmentation.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from memtail.errors import ScoresError
from memtail.estimators import convergence
from memtail.estimators.pairs import INFL_THRESHOLD, MEM_THRESHOLD
from memtail.experiment_store import ExperimentStore, Record
from memtail.scores.fetch import open_scores
from memtail.scores.reader import Scores
from memtail.scores.summary import ACCURACIES
from memtail.spec import Experiment
from memtail.storage import ObjectStore
from memtail.studies.experiment_names import derived_name
from memtail.studies.options import ExperimentName
from memtail.studies.result import StudyResult, write_result
from memtail.studies.retraining import dataset_of, require_built_in, require_finished, require_test_set
from memtail.studies.study import Prepared, Training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from memtail.studies.features import Features  # needs torch

_THRESHOLDS = np.arange(0.05, 1.0, 0.05).round(2)
_PAPER_THRESHOLD = int(np.flatnonzero(_THRESHOLDS == MEM_THRESHOLD)[0])


def prepare(store: ObjectStore, name: ExperimentName) -> Prepared:
    """Prepare the study: make the features, and declare the experiment on them.

    Args:
        store: holds the experiment.
        name: the experiment.

    Raises:
        SpecError: the trainer is not the built-in one, there are no test examples, the model does not end with a linear layer, or the
            derived name is too long.
        ScoresError: the scores are not final, or the model of the features diverged.
        StoreError: there is no such experiment, or the store cannot be read or written.
    """
    from memtail.studies.features import features_of

    record = require_finished(store, name)
    require_built_in(record, "last-layer")
    require_test_set(record, "last-layer")
    features = features_of(store, record, lambda: dataset_of(store, record))
    experiment = _derive(record, features)
    return Prepared(lambda: _evaluate(store, name, experiment, features), Training(experiment, lambda: features.dataset))


@dataclass(frozen=True)
class _Facts:
    """Numbers of one of the two experiments.

    Attributes:
        memorized, memorized_error: number of memorized examples, and its standard error over random halves of the trials.
        pairs: number of pairs by the paper's thresholds.
        selected_pairs: number of selected pairs; None in scores of a memtail that did not select them.
        trials: number of trials.
        in_subset_accuracy, held_out_accuracy, test_accuracy: mean accuracies over the trials, with their standard errors.
    """

    memorized: int
    memorized_error: float
    pairs: int
    selected_pairs: int | None
    trials: int
    in_subset_accuracy: float
    held_out_accuracy: float
    test_accuracy: float
    in_subset_accuracy_error: float
    held_out_accuracy_error: float
    test_accuracy_error: float


def _derive(record: Record, features: "Features") -> Experiment:
    """Declare the experiment that trains the last layer alone."""
    experiment = record.experiment
    name = derived_name(experiment.name, "last-layer", features.dataset.fingerprint)
    declaration = experiment.model_dump(mode="json") | {
        "name": name,
        "dataset": {"name": "arrays", "root": str(features.dataset.folder)},
        "model": {"name": "mlp", "hidden": []},
        "training": experiment.training.model_dump(mode="json") | {"augmentation": "none"},
        "subsets": experiment.subsets.model_dump(mode="json") | {"until": None},
        "record": {"scores": experiment.record.keeps_scores},  # so that pairs of both are selected alike
    }
    return Experiment.parse(declaration, source=f"experiment '{name}' of the study")


def _evaluate(store: ObjectStore, name: str, experiment: Experiment, features: "Features") -> StudyResult:
    """Compare the scores of the last layer alone with those of the whole model, and write the result. Raises: ScoresError, StoreError."""
    ExperimentStore(store, name).read_record()
    whole_scores, last_scores = open_scores(store, name), open_scores(store, experiment.name)
    whole_counts, last_counts = _counts(whole_scores), _counts(last_scores)
    whole, last = _facts(whole_scores, whole_counts), _facts(last_scores, last_counts)
    findings = [
        f"Training the last layer alone memorizes {_memorized(last)} of {whole_scores.summary.n_train} training examples "
        f"(mem >= {MEM_THRESHOLD}), training the whole model {_memorized(whole)}.",
        _pairs(last, whole),
        _accuracies("The last layer alone", last),
        _accuracies("The whole model", whole),
        f"The features are those of one model trained on all training examples, with a test accuracy of {features.test_accuracy:.2%}: "
        f"examples held out from a last layer were seen by its features.",
        "Numbers after ± are standard errors: of accuracies over the models, of memorized examples over random halves of the models.",
    ]
    result = StudyResult(
        store,
        name,
        "last-layer",
        "Memorization with only the last layer trained",
        findings,
        whole.trials + last.trials,
        [name, experiment.name],
        {"scores": {name: whole_scores.folder.name, experiment.name: last_scores.folder.name}},
        {"whole model": asdict(whole), "last layer": asdict(last)},
    )
    table = {"threshold": _THRESHOLDS, "whole": whole_counts, "last_layer": last_counts}
    write_result(result, table, _draw(name, {"whole model": (whole_counts, whole), "last layer": (last_counts, last)}))
    return result


def _counts(scores: Scores) -> list[int]:
    """Count the examples that reach each threshold of memorization."""
    return [int((scores.memorization["mem"] >= threshold).sum()) for threshold in _THRESHOLDS]


def _facts(scores: Scores, counts: list[int]) -> _Facts:
    summary = scores.summary
    errors = {accuracy: se for accuracy, se in summary.accuracy_se.items() if se is not None}
    if not errors.keys() >= {*ACCURACIES}:
        raise ScoresError(
            f"experiment '{summary.experiment}' has no accuracies with standard errors to compare: train at least two trials, and "
            f"choose subsets so that some trials see a training example and others do not"
        )
    share_error = convergence(scores.statistics, [MEM_THRESHOLD], [0.5], np.array([-1.0, 1.0]))[-1].shares_se[0]
    return _Facts(
        memorized=counts[_PAPER_THRESHOLD],
        memorized_error=float(share_error) * summary.n_train,
        pairs=summary.pairs.count,
        selected_pairs=None if summary.selected_pairs is None else summary.selected_pairs.count,
        trials=summary.trials,
        **{accuracy: summary[accuracy] for accuracy in ACCURACIES},
        **{f"{accuracy}_error": errors[accuracy] for accuracy in ACCURACIES},
    )


def _memorized(facts: _Facts) -> str:
    return f"{facts.memorized} ± {facts.memorized_error:.0f}"


def _pairs(last: _Facts, whole: _Facts) -> str:
    paper = f"{last.pairs} with the last layer alone, {whole.pairs} with the whole model."
    if last.selected_pairs is None or whole.selected_pairs is None:
        return f"High-influence pairs (infl >= {INFL_THRESHOLD}): {paper}"
    selected = f"{last.selected_pairs} with the last layer alone, {whole.selected_pairs} with the whole model"
    return f"Selected pairs: {selected}. By the paper's thresholds (infl >= {INFL_THRESHOLD}): {paper}"


def _accuracies(trained: str, facts: _Facts) -> str:
    return (
        f"{trained}: test accuracy {_percent(facts.test_accuracy, facts.test_accuracy_error)}, in-subset accuracy "
        f"{_percent(facts.in_subset_accuracy, facts.in_subset_accuracy_error)}, held-out accuracy "
        f"{_percent(facts.held_out_accuracy, facts.held_out_accuracy_error)}, of {facts.trials} models."
    )


def _percent(value: float, error: float) -> str:
    return f"{100 * value:.2f} ± {100 * error:.2f}%"


def _draw(name: str, trained: dict[str, tuple[list[int], _Facts]]) -> "Figure":
    from memtail.figures.style import drawing

    with drawing(5.5, 3.5) as figure:
        axes = figure.subplots()
        for (label, (counts, facts)), marker in zip(trained.items(), ("o", "s"), strict=True):
            axes.plot(_THRESHOLDS, counts, marker=marker, markersize=4, label=f"{label}: test accuracy {facts.test_accuracy:.2%}")
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(bottom=0)
        axes.set(xlabel="threshold θ of memorization", ylabel="training examples of mem ≥ θ", title=f"{name}: layers trained")
        axes.legend()
    return figure
