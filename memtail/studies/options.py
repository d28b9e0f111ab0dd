"""Arguments and options that several studies have."""

from typing import Annotated

import typer

ExperimentName = Annotated[str, typer.Argument(help="The experiment.")]
Repeats = Annotated[int, typer.Option(min=2, help="Models per condition.", metavar="R")]
REPEATS = 20
