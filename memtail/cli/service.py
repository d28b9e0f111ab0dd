"""The commands for experiments that the services train. They need the bucket only: whatever they ask of the services, they write there."""

import json
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from memtail.cli.arguments import DEFAULT_STORE, Json, Name, SpecFile, Store, open_existing, preparation, resolve_name
from memtail.errors import StoreError
from memtail.settings import STORE_VARIABLE

if TYPE_CHECKING:
    from memtail.experiment_store import Control
    from memtail.trials import Shard

OneName = Annotated[str, typer.Argument(help="The experiment.")]


def stage(
    spec: SpecFile,
    store: Annotated[
        str | None, typer.Option(help="Also put it into this store, for workers to fetch.", envvar=STORE_VARIABLE, show_default=False)
    ] = None,
    json_: Json = False,
) -> None:
    """Prepare an experiment's dataset, and put it into a store."""
    from memtail import datasets, logs
    from memtail.cli import display
    from memtail.datasets.staged_dataset import stage as stage_dataset
    from memtail.spec import Experiment
    from memtail.storage.open import open_store

    logs.configure()
    experiment = Experiment.load(spec)
    opened = open_store(store) if store else None
    with preparation(quiet=json_) as on_preparation:
        dataset = datasets.prepare(experiment.dataset, on_preparation)
    facts: dict[str, Any] = {
        "dataset": experiment.dataset.name,
        "fingerprint": dataset.fingerprint,
        "train": dataset.n_train,
        "test": dataset.n_test,
        "classes": len(dataset.classes),
        "image": "x".join(str(side) for side in dataset.image_shape),
        "folder": str(dataset.folder),
    }
    staged = False
    if opened:
        with display.working("putting the dataset into the store", quiet=json_):
            staged = stage_dataset(dataset, opened)
        facts |= {"store": opened.address}
    if json_:
        print(json.dumps({**facts, "staged": staged} if opened else facts, indent=1))
        return
    if opened:
        facts["store"] = f"{opened.address}, {'put there' if staged else 'was there'}"
    print("\n".join(f"{key:<12} {value}" for key, value in facts.items()))


def submit(
    spec: SpecFile,
    priority: Annotated[
        int | None,
        typer.Option(help="Experiments with the highest are trained first; by default 0, or what it was.", metavar="N", show_default=False),
    ] = None,
    store: Store = DEFAULT_STORE,
    json_: Json = False,
) -> None:
    """Enter an experiment and its dataset in a store. The services train it; more trials extend it."""
    from memtail import datasets, logs
    from memtail.cli import display
    from memtail.execution.submit import submit as submit_experiment
    from memtail.spec import Experiment
    from memtail.storage.open import open_store

    logs.configure()
    experiment = Experiment.load(spec)
    opened = open_store(store)
    with preparation(quiet=json_) as on_preparation:
        datasets.prepare(experiment.dataset, on_preparation)
    with display.working("putting the dataset into the store", quiet=json_):
        made = submit_experiment(experiment, opened, priority=priority)
    if json_:
        facts = {
            "experiment": experiment.name,
            "fingerprint": made.record.fingerprint,
            "new": made.trials_before is None,
            "trials": made.record.experiment.subsets.trials,
            "trials_before": made.trials_before or 0,
            "shards": made.shards,
            "trials_per_shard": made.record.trials_per_shard,
            "dataset": made.dataset,
            "staged": made.staged,
            **asdict(made.control),
        }
        print(json.dumps(facts, indent=1))
    else:
        display.show_submission(made, opened.address)


def watch(name: Name = None, store: Store = DEFAULT_STORE) -> None:
    """Follow experiments until they are published. Exit code 1 if one cannot be without help."""
    from memtail.cli.watch import PATIENCE, TIMEOUT, follow
    from memtail.experiment_store import experiment_names
    from memtail.storage.open import is_url, open_store

    opened = open_store(store, verify=False, patience=PATIENCE, timeout=TIMEOUT) if is_url(store) else open_existing(store)
    names = [name] if name else experiment_names(opened)
    if not names:
        raise StoreError(f"there is no experiment in {store}: memtail submit SPEC enters one")
    try:
        well = follow(opened, names)
    except KeyboardInterrupt:
        sys.exit(130)
    if not well:
        sys.exit(1)


def failures(
    name: Name = None,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show each error's whole text.")] = False,
    store: Store = DEFAULT_STORE,
    json_: Json = False,
) -> None:
    """Show failed attempts, and what became of the shards."""
    from memtail.cli import display
    from memtail.execution.progress import progress_of
    from memtail.experiment_store import ExperimentStore

    opened = open_existing(store)
    name = resolve_name(opened, name)
    found = list(ExperimentStore(opened, name).failures())
    progress = progress_of(opened, name)
    if json_:
        rows = [{**asdict(each), "shard": each.shard.span, "now": progress.fate(each.shard)} for each in found]
        print(json.dumps(rows, indent=1))
    elif not found:
        print(f"{name}: no failed attempt is on record")
    else:
        display.show_failures(found, progress, traceback)


def retry(
    name: Name = None,
    shard: Annotated[
        str | None, typer.Option(help="Only this one, as memtail failures names it.", metavar="FIRST-LAST", show_default=False)
    ] = None,
    store: Store = DEFAULT_STORE,
) -> None:
    """Have failed shards tried again. Their failed attempts are forgotten."""
    from memtail.experiment_store import ExperimentStore

    opened = open_existing(store)
    name = resolve_name(opened, name)
    experiment_store = ExperimentStore(opened, name)
    count = experiment_store.clear_failures(_shard(shard) if shard else None)
    if not count:
        print(f"{name}: no failed attempt {f'at {shard} ' if shard else ''}is on record")
        return
    state = experiment_store.control().state
    held = "" if state == "running" else f" once memtail resume {name} lets it run: it is {state}"
    print(f"{name}: forgot {count} failed attempt{'s' * (count > 1)}; what is missing is tried again{held}")


def pause(name: OneName, store: Store = DEFAULT_STORE) -> None:
    """Begin no more shards of an experiment. Those in training are finished."""
    _control(store, name, state="paused")
    print(f"{name} is paused: what is being trained is finished, nothing new is begun; memtail resume {name} goes on")


def resume(name: OneName, store: Store = DEFAULT_STORE) -> None:
    """Go on with a paused or cancelled experiment."""
    control = _control(store, name, state="running")
    print(f"{name} is running, with priority {control.priority}")


def cancel(name: OneName, store: Store = DEFAULT_STORE) -> None:
    """Give an experiment up. What is committed stays."""
    _control(store, name, state="cancelled")
    print(f"{name} is cancelled: what is being trained is dropped, what is committed stays; memtail resume {name} goes on")


def priority(
    name: OneName,
    level: Annotated[int, typer.Argument(help="Experiments with the highest are trained first; may be negative.", metavar="N")],
    store: Store = DEFAULT_STORE,
) -> None:
    """Train an experiment before those of lower priority."""
    control = _control(store, name, priority=level)
    print(f"{name} has priority {level}" + ("" if control.state == "running" else f", and is {control.state}"))


def _control(
    store: str, name: str, *, state: Literal["running", "paused", "cancelled"] | None = None, priority: int | None = None
) -> "Control":
    from memtail.experiment_store import ExperimentStore

    experiment_store = ExperimentStore(open_existing(store), name)
    experiment_store.read_record()
    control = experiment_store.control()
    changed = replace(control, state=state or control.state, priority=control.priority if priority is None else priority)
    if changed != control:
        experiment_store.set_control(changed)
    return changed


def _shard(span: str) -> "Shard":
    from memtail.trials import Shard

    first, _, last = span.partition("-")
    if not (first.isascii() and first.isdecimal() and last.isascii() and last.isdecimal()):
        raise StoreError(f"--shard: '{span}' is no shard: give FIRST-LAST as memtail failures shows it, such as 0-49")
    return Shard(int(first), int(last))


def register(app: typer.Typer) -> None:
    """Add these commands."""
    for command in (stage, submit, watch, failures, retry, pause, resume, cancel):
        app.command()(command)
    app.command(context_settings={"ignore_unknown_options": True})(priority)  # -1 is a level and no option
