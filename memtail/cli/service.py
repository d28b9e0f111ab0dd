"""Commands for experiments that the services train. They need only the store, through which they control the services."""

import json
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from memtail.cli.arguments import DEFAULT_STORE, Changes, Json, Name, SpecFile, Store, open_existing, preparation, resolve_name
from memtail.errors import StoreError
from memtail.settings import STORE_VARIABLE

if TYPE_CHECKING:
    from memtail.experiment_store import Control
    from memtail.trials import Shard

OneName = Annotated[str, typer.Argument(help="The experiment.")]


def stage(
    spec: SpecFile,
    store: Annotated[
        str | None,
        typer.Option(help="Also stage it to this store, for the workers.", envvar=STORE_VARIABLE, show_default=False),
    ] = None,
    json_: Json = False,
) -> None:
    """Prepare the dataset of an experiment, and stage it to a store."""
    from memtail import datasets, logs
    from memtail.cli import display
    from memtail.datasets import ImageDataset
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
        **({"image": "x".join(map(str, dataset.image_shape))} if isinstance(dataset, ImageDataset) else {"kind": dataset.kind}),
        "folder": str(dataset.folder),
    }
    staged = False
    if opened:
        with display.working("staging the dataset", quiet=json_):
            staged = stage_dataset(dataset, opened)
        facts |= {"store": opened.address}
    if json_:
        print(json.dumps({**facts, "staged": staged} if opened else facts, indent=1))
        return
    if opened:
        facts["store"] = f"{opened.address}, {'staged' if staged else 'already staged'}"
    print("\n".join(f"{key:<12} {value}" for key, value in facts.items()))


def submit(
    spec: SpecFile,
    priority: Annotated[
        int | None,
        typer.Option(help="Higher priorities are trained first; by default 0, or as before.", metavar="N", show_default=False),
    ] = None,
    owner: Annotated[
        str | None,
        typer.Option(help="Who owns it; by default nobody is named, or as before.", metavar="NAME", show_default=False),
    ] = None,
    store: Store = DEFAULT_STORE,
    changes: Changes = None,
    json_: Json = False,
) -> None:
    """Submit an experiment and its dataset to the services. More trials extend it."""
    from memtail import datasets, logs
    from memtail.cli import display
    from memtail.execution.submit import submit as submit_experiment
    from memtail.spec import Experiment
    from memtail.storage.open import open_store

    logs.configure()
    experiment = Experiment.load(spec, changes or ())
    opened = open_store(store)
    with preparation(quiet=json_) as on_preparation:
        dataset = datasets.prepare(experiment.dataset, on_preparation)
    with display.working("staging the dataset", quiet=json_):
        submission = submit_experiment(experiment, opened, dataset=dataset, priority=priority, owner=owner)
    if json_:
        facts = {
            "experiment": experiment.name,
            "fingerprint": submission.record.fingerprint,
            "new": submission.trials_before is None,
            "trials": submission.record.experiment.subsets.trials,
            "trials_before": submission.trials_before or 0,
            "shards": submission.shards,
            "trials_per_shard": submission.record.trials_per_shard,
            "dataset": submission.dataset,
            "staged": submission.staged,
            "owner": submission.record.owner,
            **asdict(submission.control),
        }
        print(json.dumps(facts, indent=1))
    else:
        display.show_submission(submission, opened.address)


def watch(name: Name = None, store: Store = DEFAULT_STORE) -> None:
    """Follow experiments until their scores are published. Exits with 1 if one needs help."""
    from memtail.cli.watch import RETRY_SECONDS, TIMEOUT, follow
    from memtail.experiment_store import experiment_names
    from memtail.storage.open import is_url, open_store

    opened = open_store(store, verify=False, patience=RETRY_SECONDS, timeout=TIMEOUT) if is_url(store) else open_existing(store)
    names = [name] if name else experiment_names(opened)
    if not names:
        raise StoreError(f"there is no experiment in {store}: submit one with memtail submit SPEC")
    try:
        published = follow(opened, names)
    except KeyboardInterrupt:
        sys.exit(130)
    if not published:
        sys.exit(1)


def failures(
    name: Name = None,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show whole tracebacks.")] = False,
    store: Store = DEFAULT_STORE,
    json_: Json = False,
) -> None:
    """Show failed attempts, and the state of their shards."""
    from memtail.cli import display
    from memtail.execution.progress import progress_of
    from memtail.experiment_store import ExperimentStore

    opened = open_existing(store)
    name = resolve_name(opened, name)
    attempts = list(ExperimentStore(opened, name).failures())
    progress = progress_of(opened, name)
    if json_:
        rows = [{**asdict(each), "shard": each.shard.span, "now": progress.fate(each.shard)} for each in attempts]
        print(json.dumps(rows, indent=1))
    elif not attempts:
        print(f"{name}: no failed attempts")
    else:
        display.show_failures(attempts, progress, traceback)


def retry(
    name: Name = None,
    shard: Annotated[
        str | None, typer.Option(help="Only this shard, as shown by memtail failures.", metavar="FIRST-LAST", show_default=False)
    ] = None,
    store: Store = DEFAULT_STORE,
) -> None:
    """Retry failed shards. Their failed attempts are cleared."""
    from memtail.experiment_store import ExperimentStore, record_action

    opened = open_existing(store)
    name = resolve_name(opened, name)
    experiment_store = ExperimentStore(opened, name)
    count = experiment_store.retry(_shard(shard) if shard else None)
    if experiment_store.reopen("retried"):
        print(f"{name} was finished, and is open again: missing trials are trained")
    if not count:
        print(f"{name}: no failed attempts{f' of shard {shard}' if shard else ''}")
        return
    record_action(opened, name, "retry", f"{count} failed attempts{f' of shard {shard}' if shard else ''}")
    state = experiment_store.control().state
    when = "" if state == "running" else f" once it runs again: it is {state}, continue with memtail resume {name}"
    print(f"{name}: cleared {count} failed attempt{'s' * (count > 1)}, missing shards are retried{when}")


def discard(
    name: OneName,
    shard: Annotated[str, typer.Option(help="The shard whose trial batch is bad.", metavar="FIRST-LAST", show_default=False)],
    why: Annotated[str, typer.Option(help="The reason, which stays on record.", metavar="TEXT", show_default=False)],
    store: Store = DEFAULT_STORE,
) -> None:
    """Take bad trials out of an experiment. They are trained again."""
    from memtail.experiment_store import ExperimentStore, record_action

    opened = open_existing(store)
    experiment_store = ExperimentStore(opened, name)
    experiment_store.read_record()
    parsed = _shard(shard)
    experiment_store.discard(parsed, why)
    record_action(opened, name, "discard", f"{parsed}: {why}")
    print(f"{name}: discarded {parsed}; it is trained again by the services, or by memtail run")


def pause(name: OneName, store: Store = DEFAULT_STORE) -> None:
    """Pause an experiment. Shards in training are finished, no others start."""
    _control(store, name, "pause", state="paused")
    print(f"{name} is paused: shards in training are finished, no others start; continue with memtail resume {name}")


def resume(name: OneName, store: Store = DEFAULT_STORE) -> None:
    """Continue a paused or cancelled experiment, or train the missing trials of a finished one."""
    from memtail.experiment_store import ExperimentStore

    control = _control(store, name, "resume", state="running")
    if ExperimentStore(open_existing(store), name).reopen("resumed"):
        print(f"{name} was finished, and is open again: missing trials are trained")
    print(f"{name} is running, with priority {control.priority}")


def cancel(name: OneName, store: Store = DEFAULT_STORE) -> None:
    """Cancel an experiment. Committed trials are kept."""
    _control(store, name, "cancel", state="cancelled")
    print(f"{name} is cancelled: shards in training are dropped, committed trials are kept; continue with memtail resume {name}")


def priority(
    name: OneName,
    level: Annotated[int, typer.Argument(help="Experiments of higher priority are trained first; may be negative.", metavar="N")],
    store: Store = DEFAULT_STORE,
) -> None:
    """Set the priority of an experiment."""
    control = _control(store, name, "priority", priority=level)
    print(f"{name} has priority {level}" + ("" if control.state == "running" else f", and is {control.state}"))


def history(name: Name = None, store: Store = DEFAULT_STORE, json_: Json = False) -> None:
    """Show who submitted and changed an experiment, when and from where."""
    from memtail.cli import display
    from memtail.experiment_store import recorded_actions

    opened = open_existing(store)
    actions = list(recorded_actions(opened, name)) if name else []  # also those of an experiment that was removed
    if not actions:
        name = resolve_name(opened, name)
        actions = list(recorded_actions(opened, name))
    if json_:
        print(json.dumps([asdict(each) for each in actions], indent=1))
    elif not actions:
        print(f"{name}: no actions on record")
    else:
        display.show_history(actions)


def _control(
    store: str, name: str, action: str, *, state: Literal["running", "paused", "cancelled"] | None = None, priority: int | None = None
) -> "Control":
    from memtail.experiment_store import ExperimentStore, record_action

    opened = open_existing(store)
    experiment_store = ExperimentStore(opened, name)
    experiment_store.read_record()
    before, after = experiment_store.change_control(
        lambda held: replace(held, state=state or held.state, priority=held.priority if priority is None else priority)
    )
    if after != before:
        change = f"{before.state} -> {after.state}" if priority is None else f"{before.priority} -> {after.priority}"
        record_action(opened, name, action, change)
        experiment_store.mark_changed()
    return after


def _shard(span: str) -> "Shard":
    from memtail.trials import Shard

    first, _, last = span.partition("-")
    if not (first.isascii() and first.isdecimal() and last.isascii() and last.isdecimal()):
        raise StoreError(f"--shard: '{span}' is not a shard: use FIRST-LAST as shown by memtail failures, such as 0-49")
    return Shard(int(first), int(last))


def register(app: typer.Typer) -> None:
    """Add these commands to an application."""
    for command in (stage, submit, watch, failures, history, retry, discard, pause, resume, cancel):
        app.command()(command)
    app.command(context_settings={"ignore_unknown_options": True})(priority)  # -1 is a priority, not an option
