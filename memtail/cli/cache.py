"""`memtail cache`: downloads the datasets of experiments before they are needed, as by workers with a GPU."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from memtail.cli.arguments import DEFAULT_STORE, Store, open_existing
from memtail.errors import DatasetError, SpecError, StoreError, UnreachableError

if TYPE_CHECKING:
    from memtail.datasets import Dataset
    from memtail.experiment_store import Record
    from memtail.storage import ObjectStore


def cache(
    names: Annotated[list[str] | None, typer.Argument(help="The experiments.", metavar="NAME...", show_default=False)] = None,
    all_: Annotated[bool, typer.Option("--all", help="All experiments that are not finished, paused or cancelled.")] = False,
    store: Store = DEFAULT_STORE,
) -> None:
    """Download the datasets, masks and weights of experiments into the cache, for workers that share it. Exits with 1 if one is missing."""
    from memtail import logs

    if bool(names) == all_:
        raise SpecError("give the names of experiments, or --all for those that are to be trained")
    logs.configure()
    opened = open_existing(store)
    held: list[Dataset] = []  # open, so that none is evicted for the next
    failed = False
    for name in names or _unfinished(opened):
        try:
            held.append(_cache(opened, name))
        except UnreachableError:
            raise
        except (DatasetError, StoreError) as error:
            print(f"memtail: {name}: {error}", file=sys.stderr, flush=True)
            failed = True
    if failed:
        sys.exit(1)


def _unfinished(store: "ObjectStore") -> list[str]:
    from memtail.experiment_store import ExperimentStore, experiment_names

    names = []
    for name in experiment_names(store):
        experiment_store = ExperimentStore(store, name)
        try:
            record = experiment_store.read_record()
            if experiment_store.control().state == "running" and experiment_store.finished(record) is None:
                names.append(name)
        except UnreachableError:
            raise
        except StoreError as error:  # of another version, or damaged
            print(f"memtail: {name}: {error}", file=sys.stderr, flush=True)
    return names


def _cache(store: "ObjectStore", name: str) -> "Dataset":
    from rich.filesize import decimal

    from memtail.cli.run_progress import BytesProgress
    from memtail.datasets.staged_dataset import fetch
    from memtail.datasets.staged_inputs import fetch_inputs
    from memtail.experiment_store import ExperimentStore
    from memtail.settings import Settings

    settings = Settings()
    record: Record = ExperimentStore(store, name).read_record()
    with BytesProgress(name) as download:
        dataset = fetch(store, record.canonical["dataset"]["fingerprint"], settings.cache, settings.cache_limit, download.update)
        fetch_inputs(record.experiment, record.canonical, store, settings.cache)
    size = sum(path.stat().st_size for path in dataset.folder.iterdir())
    how = "downloaded" if download.began else "there before"
    print(f"{name}: dataset {dataset.fingerprint[:8]}... of {decimal(size)} in {dataset.folder}, {how}", flush=True)
    return dataset


def register(app: typer.Typer) -> None:
    """Add the command to an application."""
    app.command()(cache)
