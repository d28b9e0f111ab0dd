"""The command line. Heavy imports wait until a command needs them, so that `--help` and `top` answer at once."""

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memtail.errors import MemtailError, ScoresError, StoreError
from memtail.settings import STORE_VARIABLE

if TYPE_CHECKING:
    from memtail.scores.reader import Scores
    from memtail.storage import ObjectStore

app = typer.Typer(
    help="What neural networks memorize, and which examples they owe it to.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

SpecFile = Annotated[Path, typer.Argument(help="The experiment file (YAML).", metavar="SPEC")]
Name = Annotated[str | None, typer.Argument(help="The experiment; may be left out if the store holds one only.")]
Store = Annotated[str, typer.Option(help="The folder, or s3://BUCKET/PREFIX, that holds the results.", envvar=STORE_VARIABLE)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
DEFAULT_STORE = "memtail-store"


def main() -> None:
    """Run the command line: exit code 2 and one line on bad input, 130 when interrupted, 143 when terminated."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app()
    except MemtailError as error:
        print(f"memtail: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"memtail: {error.filename or 'the system'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "torchvision", "sklearn"):
            raise
        print(f"memtail: this needs {error.name}, which is not installed: pip install 'memtail[train]'", file=sys.stderr)
        sys.exit(2)


@app.command()
def run(
    spec: SpecFile,
    store: Store = DEFAULT_STORE,
    profile: Annotated[bool, typer.Option("--profile", help="Also show where the time of the trials went.")] = False,
    json_: Json = False,
) -> None:
    """Run an experiment to its scores, or go on with it where it stopped."""
    from memtail import display, logs
    from memtail.experiment import Experiment
    from memtail.runner import ShardsFailedError
    from memtail.runner import run as run_experiment

    logs.configure()
    experiment = Experiment.load(spec)
    if not json_:
        display.show_spec(experiment)
    failure = None
    try:
        with display.RunProgress(quiet=json_) as progress, _preparation(quiet=json_) as on_preparation:
            summary = run_experiment(experiment, store, on_progress=progress.update, on_preparation=on_preparation, profile=profile)
    except ShardsFailedError as error:
        if error.summary is None:
            raise
        summary, failure = error.summary, error
    except KeyboardInterrupt:
        print("memtail: stopped; run the same command again to go on, nothing committed is lost", file=sys.stderr)
        sys.exit(130)
    if json_:
        print(json.dumps(summary, indent=1))
    else:
        display.show_summary(summary, _scores_of(_open(store), experiment.name), progress.seconds, store)
        if "profile" in summary:
            display.show_profile(summary["profile"])
    if failure is not None:
        raise failure


@app.command()
def plan(
    spec: SpecFile,
    store: Store = DEFAULT_STORE,
    price: Annotated[float | None, typer.Option(help="What a device costs per hour.", metavar="P")] = None,
    standard_error: Annotated[float | None, typer.Option(help="The standard error wanted of every score.", metavar="E")] = None,
    json_: Json = False,
) -> None:
    """Train for a few seconds, then say what a run would take: time, memory, bytes, cost, and how exact its scores will be."""
    from memtail import display, logs
    from memtail.experiment import Experiment
    from memtail.planning import plan as plan_experiment

    logs.configure()
    experiment = Experiment.load(spec)
    with _preparation(quiet=json_) as on_preparation:
        made = plan_experiment(experiment, store, price=price, standard_error=standard_error, on_preparation=on_preparation)
    if json_:
        print(json.dumps(asdict(made), indent=1))
    else:
        display.show_plan(made)


@app.command()
def status(name: Name = None, store: Store = DEFAULT_STORE, json_: Json = False) -> None:
    """Show how far the experiments in a store are."""
    from memtail import display
    from memtail.archive import experiment_names

    opened = _open(store)
    rows = [_status(opened, each) for each in ([name] if name else experiment_names(opened))]
    if json_:
        print(json.dumps(rows, indent=1))
    elif rows:
        display.show_status(rows)
    else:
        print(f"no experiment in {store}")


@app.command()
def top(
    name: Name = None,
    store: Store = DEFAULT_STORE,
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="How many to show.")] = 10,
    pairs: Annotated[bool, typer.Option("--pairs", help="The high-influence pairs instead.")] = False,
    influencers_of: Annotated[
        int | None, typer.Option(min=0, help="The training examples that help test example J most.", metavar="J")
    ] = None,
    json_: Json = False,
) -> None:
    """Show the most memorized training examples, or the pairs of greatest influence."""
    opened = _open(store)
    scores = _scores_of(opened, _only(opened, name))
    if influencers_of is not None:
        table = scores.top_influencers(influencers_of, count)
    elif pairs:
        table = {column: values[:count] for column, values in scores.pairs.items()}
    else:
        table = scores.most_memorized(count)
    if json_:
        print(json.dumps([dict(zip(table, row, strict=True)) for row in zip(*(values.tolist() for values in table.values()), strict=True)]))
    else:
        from memtail import display

        display.show_table(table)


@app.command()
def scores(
    name: Name = None,
    store: Store = DEFAULT_STORE,
    fetch: Annotated[Path | None, typer.Option(help="Copy the latest files into this folder.", metavar="DIR")] = None,
    json_: Json = False,
) -> None:
    """List the published score files, or copy them out."""
    from memtail.scores.fetch import fetch_scores
    from memtail.scores.publish import latest_version
    from memtail.storage import keys

    opened = _open(store)
    name = _only(opened, name)
    pointer = latest_version(opened, name)
    if pointer is None:
        raise ScoresError(f"experiment '{name}' has no published scores yet: see memtail status")
    place = f"{opened.address}/{keys.scores(name, pointer['version']).rstrip('/')}"
    if fetch is not None:
        fetch_scores(opened, name, pointer, fetch)
    if json_:
        print(json.dumps({**pointer, "folder": str(fetch or place)}, indent=1))
        return
    print(f"{name}: {pointer['summary']['trials']} trials, published {pointer['published']}")
    for file in pointer["files"]:
        print(fetch / file if fetch else f"{place}/{file}")


@app.command()
def stage(spec: SpecFile, json_: Json = False) -> None:
    """Prepare the dataset of an experiment, without training."""
    from memtail import datasets
    from memtail.experiment import Experiment

    experiment = Experiment.load(spec)
    with _preparation(quiet=json_) as on_preparation:
        dataset = datasets.prepare(experiment.dataset, on_preparation)
    facts = {
        "dataset": experiment.dataset.name,
        "fingerprint": dataset.fingerprint,
        "train": dataset.n_train,
        "test": dataset.n_test,
        "classes": len(dataset.classes),
        "image": "x".join(str(side) for side in dataset.image_shape),
        "folder": str(dataset.folder),
    }
    print(json.dumps(facts, indent=1) if json_ else "\n".join(f"{key:<12} {value}" for key, value in facts.items()))


@app.command()
def doctor(store: Store = DEFAULT_STORE, json_: Json = False) -> None:
    """Show what is installed, which devices there are, and what is missing."""
    from memtail import display, logs
    from memtail.doctor import examine

    logs.configure()
    checks = examine(store)
    if json_:
        print(json.dumps([vars(check) for check in checks], indent=1))
    else:
        display.show_checks(checks)
    if not all(check.fine for check in checks):
        sys.exit(1)


def _open(store: str) -> "ObjectStore":
    """A store that is there, to read from."""
    from memtail import logs
    from memtail.storage.opening import is_url, open_store

    if is_url(store):
        logs.configure()
    elif not Path(store).is_dir():
        raise StoreError(f"there is no store at {store}: memtail run SPEC makes one, --store names another")
    return open_store(store, prove=False)


def _only(store: "ObjectStore", name: str | None) -> str:
    """The named experiment, or the only one there is."""
    from memtail.archive import ExperimentArchive, experiment_names

    if name is not None:
        ExperimentArchive(store, name).record()
        return name
    names = experiment_names(store)
    if len(names) != 1:
        raise StoreError(f"the store {store.address} holds {len(names)} experiments ({', '.join(names) or 'none'}): name one")
    return names[0]


def _scores_of(store: "ObjectStore", name: str) -> "Scores":
    from memtail.scores.fetch import open_scores

    return open_scores(store, name)


def _status(store: "ObjectStore", name: str) -> dict[str, Any]:
    from memtail.archive import ExperimentArchive
    from memtail.scores.publish import latest_version

    archive = ExperimentArchive(store, name)
    record = archive.record()
    pointer = latest_version(store, name)
    return {
        "experiment": name,
        "trials": len({trial for shard in archive.committed() for trial in shard.trials}),
        "wanted": record.experiment.subsets.trials,
        "failed_attempts": sum(1 for _ in archive.failures()),
        "published_trials": pointer["summary"]["trials"] if pointer else 0,
        "published": pointer["published"] if pointer else None,
        "test_accuracy": pointer["summary"]["test_accuracy"] if pointer else None,
        "fingerprint": record.fingerprint,
    }


@contextmanager
def _preparation(quiet: bool) -> Iterator[Any]:
    """A progress bar for a folder of images, shown once there is something to do."""
    from memtail import display

    if quiet:
        yield None
        return
    with display.PreparationProgress() as progress:
        yield progress.update
