"""Commands that read and write files of other tools: `import` and `export`."""

from pathlib import Path
from typing import Annotated

import typer

from memtail.cli.arguments import DEFAULT_STORE, Name, Store, open_existing, preparation, resolve_name
from memtail.errors import ScoresError


def export(
    name: Name = None,
    form: Annotated[
        str, typer.Option("--as", help="authors, infl-mem, cscores, datamodels, lira or zenodo.", metavar="FORMAT")
    ] = "authors",
    out: Annotated[Path, typer.Option(help="Folder to write to.", metavar="DIR")] = Path("export"),
    store: Store = DEFAULT_STORE,
) -> None:
    """Write trials and scores in the format of another tool."""
    from rich.console import Console
    from rich.filesize import decimal

    from memtail.cli.display import warn_of_few_trials
    from memtail.cli.run_progress import BytesProgress
    from memtail.exchange import exports

    if form not in exports.FORMATS:
        raise ScoresError(f"there is no format '{form}': give --as one of {', '.join(exports.FORMATS)}")
    opened = open_existing(store)
    name = resolve_name(opened, name)
    planned = exports.planned(opened, name, form)
    errors = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)  # standard output is the list of files
    errors.print(f"writing {decimal(planned.bytes)} to {out}")
    with BytesProgress(name, errors) as progress:
        written = planned.write(out, progress.update)
    for path in written:
        print(path)
    warn_of_few_trials(planned.summary)


def import_(
    name: Annotated[str, typer.Argument(help="Name of the experiment to make.")],
    paths: Annotated[list[Path], typer.Argument(help="Files and folders with trials.", metavar="FILE...")],
    dataset: Annotated[
        Path | None, typer.Option(help="An experiment file whose dataset the trials are of, for labels and pictures.", metavar="SPEC")
    ] = None,
    store: Store = DEFAULT_STORE,
) -> None:
    """Make an experiment of trials that were trained elsewhere, and publish its scores."""
    from memtail.cli.run_progress import CountProgress
    from memtail.datasets import prepare
    from memtail.exchange.imports import import_trials
    from memtail.spec import Experiment
    from memtail.storage.open import open_store

    spec, opened = None, None
    if dataset is not None:
        spec = Experiment.load(dataset).dataset
        with preparation(quiet=False) as on_preparation:
            opened = prepare(spec, on_preparation)
    with CountProgress("importing", "imported", "trials") as progress:
        record = import_trials(open_store(store), name, paths, opened, spec, progress.update)
    print(f"{name}: {record.experiment.subsets.trials} trials of {record.n_train} training and {record.n_test} test examples")
    print(f"next: memtail report {name} --store {store}")


def register(app: typer.Typer) -> None:
    """Add these commands to an application."""
    app.command()(export)
    app.command("import")(import_)
