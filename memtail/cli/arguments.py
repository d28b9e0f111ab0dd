"""What the commands share: their arguments, and how a store is opened for them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memtail.errors import StoreError
from memtail.settings import STORE_VARIABLE

if TYPE_CHECKING:
    from memtail.storage import ObjectStore

SpecFile = Annotated[Path, typer.Argument(help="The experiment file (YAML).", metavar="SPEC")]
Name = Annotated[str | None, typer.Argument(help="The experiment; may be left out if the store holds one only.")]
Store = Annotated[str, typer.Option(help="The folder, or s3://BUCKET/PREFIX, that holds the results.", envvar=STORE_VARIABLE)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
DEFAULT_STORE = "memtail-store"

# Seconds for which somebody who only wants to look waits for a server that does not answer.
_PATIENCE = 20.0


def open_existing(store: str) -> "ObjectStore":
    """A store that is there, to read from."""
    from memtail.storage.open import is_url, open_store

    if is_url(store):
        from memtail import logs  # slow to import, and a folder has nothing to log

        logs.configure()
        return open_store(store, verify=False, patience=_PATIENCE)
    if not Path(store).is_dir():
        raise StoreError(f"there is no store at {store}: memtail run SPEC makes one, --store names another")
    return open_store(store)


def resolve_name(store: "ObjectStore", name: str | None) -> str:
    """The named experiment, or the only one there is."""
    from memtail.experiment_store import ExperimentStore, experiment_names

    if name is not None:
        ExperimentStore(store, name).read_record()
        return name
    names = experiment_names(store)
    if len(names) != 1:
        raise StoreError(f"the store {store.address} holds {len(names)} experiments ({', '.join(names) or 'none'}): name one")
    return names[0]


@contextmanager
def interruptible() -> Iterator[None]:
    """Training that Ctrl-C stops without loss; the exit code is then 130."""
    try:
        yield
    except KeyboardInterrupt:
        print("memtail: stopped; run the same command again to go on, nothing committed is lost", file=sys.stderr)
        sys.exit(130)


@contextmanager
def preparation(quiet: bool) -> Iterator[Any]:
    """A progress bar for a folder of images, shown once there is something to do."""
    from memtail.cli import display

    if quiet:
        yield None
        return
    with display.PreparationProgress() as progress:
        yield progress.update
