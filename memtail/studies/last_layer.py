"""How much of the memorization is left if only the last layer is trained (the paper: 38 memorized examples instead of 18,099).

One model is trained on everything and frozen; what it makes of the images is a dataset (see `memtail.studies.features`). On that a linear
model is trained on the very subsets of the experiment, by its recipe without augmentation: an ordinary experiment of its own.
"""

from typing import TYPE_CHECKING, Any

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
from memtail.studies.names import derived_name
from memtail.studies.result import StudyResult, write_result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from memtail.studies.features import Features  # needs torch

_THRESHOLDS = np.arange(0.05, 1.0, 0.05).round(2)


def plan_last_layer(record: Record, features: "Features") -> Experiment:
    """The experiment that trains the last layer alone, on the features of an experiment's images.

    Raises:
        SpecError: its name would be too long.
    """
    experiment = record.experiment
    name = derived_name(experiment.name, "last-layer", features.dataset.fingerprint)
    declaration = experiment.model_dump(mode="json", exclude={"record"}) | {
        "name": name,
        "dataset": {"name": "arrays", "root": str(features.dataset.folder)},
        "model": {"name": "mlp", "hidden": []},
        "training": experiment.training.model_dump(mode="json") | {"augmentation": "none"},
        "subsets": experiment.subsets.model_dump(mode="json") | {"until": None},
    }
    return Experiment.parse(declaration, source=f"experiment '{name}' of the study")


def evaluate_last_layer(store: ObjectStore, name: str, planned: Experiment, features: "Features") -> StudyResult:
    """Compare the scores of the last layer alone with those of the whole model, and write the result into the store.

    Raises:
        ScoresError: either has no scores, or no example has an estimate.
        StoreError: the store cannot be read or written.
    """
    ExperimentStore(store, name).read_record()
    whole, alone = open_scores(store, name), open_scores(store, planned.name)
    counts = {label: _counts(scores) for label, scores in (("whole model", whole), ("last layer", alone))}
    place = int(np.flatnonzero(_THRESHOLDS == MEM_THRESHOLD)[0])
    facts = {label: _facts(scores, counts[label][place]) for label, scores in (("whole model", whole), ("last layer", alone))}
    findings = [
        f"Training the last layer alone memorizes {_memorized(facts['last layer'])} of {whole.summary.n_train} training examples "
        f"(mem >= {MEM_THRESHOLD}), training the whole model {_memorized(facts['whole model'])}.",
        f"High-influence pairs (infl >= {INFL_THRESHOLD}): {facts['last layer']['pairs']} of the last layer alone, "
        f"{facts['whole model']['pairs']} of the whole model.",
        *(
            f"{what}: {_percent(each, 'test_accuracy')} of the test examples are classified correctly, "
            f"{_percent(each, 'in_subset_accuracy')} of the training examples seen, {_percent(each, 'held_out_accuracy')} of those not "
            f"seen, by {each['trials']} models."
            for what, each in (("The last layer alone", facts["last layer"]), ("The whole model", facts["whole model"]))
        ),
        f"The features are of one model trained on all training examples, with a test accuracy of {features.test_accuracy:.2%}: those not "
        f"seen by a last layer were seen by its features.",
        "Behind each ± is a standard error: of accuracies over the models, of memorized examples over random halves of them.",
    ]
    result = StudyResult(
        store,
        name,
        "last-layer",
        "Memorization with only the last layer trained",
        findings,
        facts["whole model"]["trials"] + facts["last layer"]["trials"],
        [name, planned.name],
        {"scores": {name: whole.folder.name, planned.name: alone.folder.name}},
        facts,
    )
    table = {"threshold": _THRESHOLDS, "whole": counts["whole model"], "last_layer": counts["last layer"]}
    write_result(result, table, _draw(name, counts, facts))
    return result


def _counts(scores: Scores) -> list[int]:
    """How many examples reach each threshold of memorization."""
    return [int((scores.memorization["mem"] >= threshold).sum()) for threshold in _THRESHOLDS]


def _facts(scores: Scores, memorized: int) -> dict[str, Any]:
    summary = scores.summary
    errors = summary.accuracy_se
    if any(errors[accuracy] is None for accuracy in ACCURACIES):
        raise ScoresError(
            f"experiment '{summary.experiment}' has no accuracies with standard errors to compare: that takes two trials at least, and "
            f"training examples that some of them saw and others did not"
        )
    share_error = convergence(scores.statistics, [MEM_THRESHOLD], [0.5], np.array([-1.0, 1.0]))[-1].shares_se[0]
    facts = {
        "memorized": memorized,
        "memorized_error": float(share_error) * summary.n_train,
        "pairs": summary.pairs.count,
        "trials": summary.trials,
    }
    return facts | {each: summary[each] for each in ACCURACIES} | {f"{each}_error": errors[each] for each in ACCURACIES}


def _memorized(facts: dict[str, Any]) -> str:
    return f"{facts['memorized']} ± {facts['memorized_error']:.0f}"


def _percent(facts: dict[str, Any], accuracy: str) -> str:
    return f"{100 * facts[accuracy]:.2f} ± {100 * facts[f'{accuracy}_error']:.2f}%"


def _draw(name: str, counts: dict[str, list[int]], facts: dict[str, dict[str, Any]]) -> "Figure":
    from memtail.figures.style import drawing

    with drawing(5.5, 3.5) as figure:
        axes = figure.subplots()
        for (label, values), marker in zip(counts.items(), ("o", "s"), strict=True):
            axes.plot(_THRESHOLDS, values, marker=marker, markersize=4, label=f"{label}: test accuracy {facts[label]['test_accuracy']:.2%}")
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(bottom=0)
        axes.set(xlabel="threshold θ of memorization", ylabel="training examples of mem ≥ θ", title=f"{name}: which layers are trained")
        axes.legend()
    return figure
