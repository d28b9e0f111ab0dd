"""`memtail study`: a command for each entry of `memtail.studies.STUDIES`, made of the parameters of the study's `prepare`."""

import inspect
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from memtail.cli.arguments import DEFAULT_STORE, Json, Store, interruptible, open_existing
from memtail.studies import STUDIES

if TYPE_CHECKING:
    from memtail.storage import ObjectStore
    from memtail.studies.result import StudyResult
    from memtail.studies.study import Study, Training

Submit = Annotated[
    bool, typer.Option("--submit", help="Let the services train missing models; run the command again to evaluate once they are trained.")
]


class _Studies(TyperGroup):
    """Group that imports a study when its command is used, so that listing all commands stays fast."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Make the command of a study; None if there is no such study."""
        return _command(cmd_name) if cmd_name in STUDIES else None

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """List the studies by the first sentence of their help."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, f"{study.help.partition('. ')[0].rstrip('.')}.") for name, study in STUDIES.items()])


app = typer.Typer(
    cls=_Studies,
    help="Run follow-up studies on an experiment's scores. Results and their figures stay in the store.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
for _name, _study in STUDIES.items():
    app.command(_name, help=_study.help)(lambda: None)  # known to typer by name; `_Studies` makes the command


def _command(name: str) -> Any:
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name, help=STUDIES[name].help)(_runner(STUDIES[name]))
    return typer.main.get_command(single)


def _runner(study: "Study") -> Callable[..., None]:
    """Make the function behind a command: the study's own parameters, then those that all studies have."""
    prepare = study.load()

    def run(store: str, json_: bool, submit: bool = False, **arguments: Any) -> None:
        from memtail.cli import display

        opened = open_existing(store)
        with display.working("preparing the study", quiet=json_):
            prepared = prepare(opened, **arguments)
        if prepared.training is not None and not _train(opened, store, prepared.training, submit, json_):
            return
        with display.working("evaluating the study", quiet=json_):
            result = prepared.evaluate()
        _show(result, json_)

    _, *own = inspect.signature(prepare).parameters.values()
    common: list[tuple[str, Any, Any]] = [("submit", Submit, False)] if study.trains else []
    common += [("store", Store, DEFAULT_STORE), ("json_", Json, False)]
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind) for name, kind, default in common
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _train(opened: "ObjectStore", store: str, training: "Training", submit: bool, json_: bool) -> bool:
    """Train the models of a study on this machine, or submit them to the services; False if they are not trained yet."""
    from memtail.studies.retraining import is_finished

    experiment = training.experiment
    if is_finished(opened, experiment):
        return True
    from memtail import logs
    from memtail.cli import display
    from memtail.cli.run_progress import RunProgress

    logs.configure()
    if submit:
        from memtail.execution.submit import submit as submit_experiment

        submission = submit_experiment(experiment, opened, dataset=training.dataset())
        if json_:
            print(json.dumps({"experiment": experiment.name, "trials": experiment.subsets.trials, "trained": False}, indent=1))
        else:
            display.show_submission(submission, opened.address)
            print("run the same command again once it is trained: it evaluates the study")
        return False
    from memtail.execution.embedded import run

    with interruptible(), RunProgress(quiet=json_) as progress:
        run(experiment, store, dataset=training.dataset(), on_progress=progress.update)
    return True


def _show(result: "StudyResult", json_: bool) -> None:
    from memtail.cli import display

    if json_:
        print(json.dumps(result.to_json(), indent=1))
        return
    print(f"\n{result.name}: {result.title}\n")
    for finding in result.findings:
        print(f"* {finding}")
    print(f"\nfigure.svg, figure.png, result.json and result.parquet in {result.store.address}/{result.prefix.rstrip('/')}")
    for summary in result.of_few_trials():
        display.warn_of_few_trials(summary)
