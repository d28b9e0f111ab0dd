"""`memtail study`: the follow-up experiments of the paper."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from memtail.cli.arguments import DEFAULT_STORE, Json, Store, interruptible, open_existing
from memtail.errors import SpecError
from memtail.studies import REPEATS, THETAS

if TYPE_CHECKING:
    from collections.abc import Callable

    from memtail.datasets import ImageDataset
    from memtail.spec import Experiment
    from memtail.storage import ObjectStore
    from memtail.studies.features import Features
    from memtail.studies.result import StudyResult

app = typer.Typer(
    help="What the scores of an experiment are worth, and what follows from them. Results stay in the store, with a figure each.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

OneName = Annotated[str, typer.Argument(help="The experiment.")]
Submit = Annotated[
    bool, typer.Option("--submit", help="Have the services train what is missing; the same command evaluates it when they are done.")
]

Repeats = Annotated[int, typer.Option(min=2, help="Models per condition.", metavar="R")]


@app.command()
def removal(
    name: OneName,
    theta: Annotated[
        list[float] | None,
        typer.Option(
            help=f"Remove the examples of at least this memorization; may be given again. By default {', '.join(map(str, THETAS))}.",
            metavar="T",
            show_default=False,
        ),
    ] = None,
    pairs: Annotated[bool, typer.Option("--pairs", help="Remove the training examples of the high-influence pairs instead.")] = False,
    repeats: Repeats = REPEATS,
    submit: Submit = False,
    store: Store = DEFAULT_STORE,
    json_: Json = False,
) -> None:
    """Retrain without the memorized examples.

    And without as many random ones, to compare with.
    """
    from memtail.studies.removal import evaluate_removal, plan_removal

    if pairs and theta:
        raise SpecError(f"--theta {theta[0]:g} and --pairs exclude each other: leave one out")
    opened = open_existing(store)
    planned = plan_removal(opened, name, thetas=None if pairs else theta or THETAS, repeats=repeats)
    if _trained(opened, store, planned.experiment, lambda: _dataset(opened, name), submit, json_):
        _show(evaluate_removal(opened, planned), json_)


@app.command()
def stability(
    name: OneName,
    wanted: Annotated[
        float, typer.Option(min=0.01, max=0.999, help="Tell the trials that an overlap of this (0 to 1) takes.", metavar="J")
    ] = 0.9,
    store: Store = DEFAULT_STORE,
    json_: Json = False,
) -> None:
    """Compare the scores of halves of the trials.

    And tell from that how many trials it takes for two runs to agree.
    """
    from memtail.studies.stability import study_stability

    opened = open_existing(store)
    _show(study_stability(opened, name, wanted=wanted), json_)


@app.command()
def architectures(
    names: Annotated[list[str], typer.Argument(help="Experiments on one dataset, two or more.", metavar="NAME...")],
    store: Store = DEFAULT_STORE,
    json_: Json = False,
) -> None:
    """Compare the scores of different models.

    The result is kept under the first experiment.
    """
    from memtail.studies.architectures import study_architectures

    _show(study_architectures(open_existing(store), names), json_)


@app.command()
def last_layer(name: OneName, submit: Submit = False, store: Store = DEFAULT_STORE, json_: Json = False) -> None:
    """Compare with training the last layer alone.

    The other layers are those of one model, trained on everything and frozen; that one is trained here, also with --submit.
    """
    from memtail.studies.last_layer import evaluate_last_layer, plan_last_layer
    from memtail.studies.retraining import require_finished

    opened = open_existing(store)
    record = require_finished(opened, name)
    features = _features(opened, name, json_)
    planned = plan_last_layer(record, features)
    if _trained(opened, store, planned, lambda: features.dataset, submit, json_):
        _show(evaluate_last_layer(opened, name, planned, features), json_)


@app.command()
def duplicates(
    name: OneName,
    nearness: Annotated[
        float,
        typer.Option(min=0, help="Near-duplicates are at most this share of the median distance to the nearest apart.", metavar="S"),
    ] = 0.33,
    repeats: Repeats = REPEATS,
    submit: Submit = False,
    store: Store = DEFAULT_STORE,
    json_: Json = False,
) -> None:
    """Find near-duplicates, and what pairs owe them.

    Images are compared by their pixels, and by the features of one model, trained here on everything.
    """
    from memtail.cli import display
    from memtail.scores.fetch import open_scores
    from memtail.studies.removal import plan_removal

    opened = open_existing(store)
    planned = plan_removal(opened, name, thetas=None, repeats=repeats) if len(open_scores(opened, name).pairs["tr_idx"]) else None
    if planned and not _trained(opened, store, planned.experiment, lambda: _dataset(opened, name), submit, json_):
        return
    from memtail.studies.duplicates import study_duplicates

    features = _features(opened, name, json_)
    with display.working("comparing images", quiet=json_):
        result = study_duplicates(opened, name, _dataset(opened, name), features, planned, nearness=nearness)
    _show(result, json_)


def _trained(
    opened: "ObjectStore", store: str, experiment: "Experiment", dataset: "Callable[[], ImageDataset]", submit: bool, json_: bool
) -> bool:
    """See that the models of a study are trained, here or by the services; False if they are yet to be."""
    from memtail.studies.retraining import is_finished

    if is_finished(opened, experiment):
        return True
    from memtail import logs
    from memtail.cli import display

    logs.configure()
    if submit:
        from memtail.execution.submit import submit as submit_experiment

        made = submit_experiment(experiment, opened, dataset=dataset())
        if json_:
            print(json.dumps({"experiment": experiment.name, "trials": experiment.subsets.trials, "trained": False}, indent=1))
        else:
            display.show_submission(made, opened.address)
            print("when it is done, the same command again evaluates it")
        return False
    from memtail.execution.embedded import run

    with interruptible(), display.RunProgress(quiet=json_) as progress:
        run(experiment, store, dataset=dataset(), on_progress=progress.update)
    return True


def _dataset(opened: "ObjectStore", name: str) -> "ImageDataset":
    """The images of an experiment, from the cache or else from the store."""
    from memtail.datasets.staged_dataset import fetch
    from memtail.experiment_store import ExperimentStore
    from memtail.settings import Settings

    settings = Settings()
    fingerprint = ExperimentStore(opened, name).read_record().canonical["dataset"]["fingerprint"]
    return fetch(opened, fingerprint, settings.cache, settings.cache_limit)


def _features(opened: "ObjectStore", name: str, json_: bool) -> "Features":
    """What one model makes of the images of an experiment, which is trained here unless it was."""
    from memtail.cli import display
    from memtail.experiment_store import ExperimentStore
    from memtail.studies.features import features_of

    with display.working("training one model on everything", quiet=json_):
        return features_of(opened, ExperimentStore(opened, name).read_record(), lambda: _dataset(opened, name))


def _show(result: "StudyResult", json_: bool) -> None:
    if json_:
        print(json.dumps(result.to_json(), indent=1))
        return
    print(f"\n{result.name}: {result.title}\n")
    for finding in result.findings:
        print(f"* {finding}")
    print(f"\nfigure.svg, figure.png, result.json and result.parquet in {result.store.address}/{result.prefix.rstrip('/')}")
