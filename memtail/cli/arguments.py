"""Arguments and helpers that several commands share."""

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
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", help="Set a key of the file, such as training.epochs=5; repeatable.", metavar="KEY=VALUE", show_default=False),
]
Name = Annotated[str | None, typer.Argument(help="The experiment; optional if the store holds only one.")]
Store = Annotated[str, typer.Option(help="Store of the results: a folder, or s3://BUCKET/PREFIX.", envvar=STORE_VARIABLE)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
DEFAULT_STORE = "memtail-store"

# Timeout of read-only commands, in seconds.
_TIMEOUT = 20.0


def open_existing(store: str) -> "ObjectStore":
    """Open an existing store for reading. Raises: StoreError: there is none, or it cannot be read."""
    from memtail.storage.open import is_url, open_store

    if is_url(store):
        from memtail import logs  # slow to import, and only a bucket logs

        logs.configure()
        return open_store(store, verify=False, patience=_TIMEOUT)
    if not Path(store).is_dir():
        raise StoreError(f"there is no store at {store}: memtail run SPEC makes one, --store names another")
    return open_store(store)


def resolve_name(store: "ObjectStore", name: str | None) -> str:
    """Return the name of an existing experiment, or of the only one in the store. Raises: StoreError: there is no such experiment."""
    from memtail.experiment_store import ExperimentStore, experiment_names

    if name is not None:
        ExperimentStore(store, name).read_record()
        return name
    names = experiment_names(store)
    if len(names) != 1:
        raise StoreError(f"the store {store.address} holds {len(names)} experiments ({', '.join(names) or 'none'}): give the name of one")
    return names[0]


@contextmanager
def interruptible() -> Iterator[None]:
    """Exit with code 130 when Ctrl-C stops training, which loses nothing committed."""
    try:
        yield
    except KeyboardInterrupt:
        print("memtail: stopped, committed trials are kept: run the same command again to resume", file=sys.stderr)
        sys.exit(130)


@contextmanager
def preparation(quiet: bool) -> Iterator[Any]:
    """Show a progress bar while a folder of images is prepared; yields the callback, or None if quiet."""
    from memtail.cli.run_progress import CountProgress

    if quiet:
        yield None
        return
    with CountProgress("preparing", "prepared", "examples") as progress:
        yield progress.update
