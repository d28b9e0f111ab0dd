"""`memtail trainer`: commands for training code of the user's own."""

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from memtail.cli.arguments import DEFAULT_STORE, Json, SpecFile, interruptible, preparation
from memtail.errors import TrainerError
from memtail.settings import STORE_VARIABLE

app = typer.Typer(help="Check training code of your own.", no_args_is_help=True, rich_markup_mode=None)

# Most lines of the output of faulty code that a check shows.
_OUTPUT_LINES = 50


@app.callback()
def _group() -> None:
    """Keep `check` a command of its own, although it is the only one."""


@app.command()
def check(
    spec: SpecFile,
    trial: Annotated[int, typer.Option(min=0, help="Index of the trial.", metavar="K")] = 0,
    once: Annotated[bool, typer.Option("--once", help="Train the trial once only: do not check that its outcomes are repeatable.")] = False,
    store: Annotated[str, typer.Option(help="Store that is kept from the code; it is not opened.", envvar=STORE_VARIABLE)] = DEFAULT_STORE,
    json_: Json = False,
) -> None:
    """Train one trial by the experiment's function or command, without a store, and show what came back and how long it took.

    The trial is trained a second time to see whether its outcomes are the same.
    """
    from memtail import logs
    from memtail.cli import display
    from memtail.execution.trainer_check import TrainerChecker
    from memtail.spec import Experiment, ImagesTrainer

    logs.configure()
    experiment = Experiment.load(spec)
    if isinstance(experiment.trainer, ImagesTrainer):
        print(f"{experiment.name}: the built-in trainer needs no check: memtail plan {spec} measures a run")
        return
    try:
        with (
            interruptible(),
            preparation(quiet=json_) as on_preparation,
            TrainerChecker(experiment, trial, on_preparation, store) as checker,
        ):
            first = checker.check()
            if not json_:
                display.show_trainer_check(first)
            second = None if once else checker.repeat()
    except TrainerError as error:
        if error.__cause__ is not None:
            _show(str(error.__cause__))
        print(f"memtail: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    seconds = first.all_seconds((second or first).seconds)
    if json_:
        repetition = None if second is None else asdict(second)
        shown = {**asdict(first), "outcome": first.outcome.to_dict(), "repetition": repetition, "all_seconds": seconds}
        print(json.dumps(shown, indent=1))
    else:
        display.show_repetition(first, second, seconds)


def _show(cause: str) -> None:
    """Print the traceback of a fault, and the last lines of the output."""
    from memtail.trainers.process import OUTPUT_HEADING

    trace, heading, output = cause.strip("\n").partition(OUTPUT_HEADING)
    print(trace + heading + "\n".join(output.splitlines()[-_OUTPUT_LINES:]), file=sys.stderr)
