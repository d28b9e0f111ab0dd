"""Command that writes files of other tools."""

from pathlib import Path
from typing import Annotated

import typer

from memtail.cli.arguments import DEFAULT_STORE, Name, Store, open_existing, resolve_name
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
    from memtail.exchange import exports

    if form not in exports.FORMATS:
        raise ScoresError(f"there is no format '{form}': give --as one of {', '.join(exports.FORMATS)}")
    opened = open_existing(store)
    for path in exports.export(opened, resolve_name(opened, name), form, out):
        print(path)


def register(app: typer.Typer) -> None:
    """Add this command to an application."""
    app.command()(export)
