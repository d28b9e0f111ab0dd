"""The command line. Heavy imports wait until a command needs them, so that `--help` and `top` answer at once."""

import json
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memtail.cli import service as cli_service
from memtail.cli import study as cli_study
from memtail.cli.arguments import DEFAULT_STORE, Json, Name, SpecFile, Store, interruptible, open_existing, preparation, resolve_name
from memtail.errors import BatchesRefusedError, IncompleteRunError, MemtailError, ScoresError

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


def main() -> None:
    """Run the command line: exit code 2 and one line on bad input, 130 when interrupted, 143 when terminated."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app()
    except MemtailError as error:
        print(f"memtail: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1 if isinstance(error, BatchesRefusedError) else 2)
    except OSError as error:
        print(f"memtail: {error.filename or 'the system'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "torchvision", "sklearn", "scipy"):
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
    from memtail import logs
    from memtail.cli import display
    from memtail.execution.embedded import run as run_experiment
    from memtail.spec import Experiment

    logs.configure()
    experiment = Experiment.load(spec)
    if not json_:
        display.show_spec(experiment)
    failure = None
    try:
        with interruptible(), display.RunProgress(quiet=json_) as progress, preparation(quiet=json_) as on_preparation:
            summary: Mapping[str, Any] = run_experiment(
                experiment, store, on_progress=progress.update, on_preparation=on_preparation, profile=profile
            )
    except IncompleteRunError as error:
        if error.summary is None:
            raise
        summary, failure = error.summary, error
    if json_:
        print(json.dumps(dict(summary), indent=1))
    else:
        display.show_summary(_scores_of(open_existing(store), experiment.name), progress.seconds, store)
        if "profile" in summary:
            display.show_profile(summary["profile"])
    _draw_report(open_existing(store), experiment.name, quiet=json_)
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
    from memtail import logs
    from memtail.cli import display
    from memtail.execution.forecast import forecast
    from memtail.spec import Experiment

    logs.configure()
    experiment = Experiment.load(spec)
    with preparation(quiet=json_) as on_preparation:
        made = forecast(experiment, store, price=price, standard_error=standard_error, on_preparation=on_preparation)
    if json_:
        print(json.dumps(asdict(made), indent=1))
    else:
        display.show_plan(made)


@app.command()
def status(name: Name = None, store: Store = DEFAULT_STORE, json_: Json = False) -> None:
    """Show how far the experiments in a store are."""
    from memtail.cli import display
    from memtail.execution.progress import progress_of
    from memtail.experiment_store import experiment_names

    opened = open_existing(store)
    found = [progress_of(opened, each) for each in ([name] if name else experiment_names(opened))]
    if json_:
        print(json.dumps([progress.to_json() for progress in found], indent=1))
    elif found:
        display.show_status(found)
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
    opened = open_existing(store)
    scores = _scores_of(opened, name)
    if influencers_of is not None:
        table = scores.top_influencers(influencers_of, count)
    elif pairs:
        table = {column: values[:count] for column, values in scores.pairs.items()}
    else:
        table = scores.most_memorized(count)
    if json_:
        print(json.dumps([dict(zip(table, row, strict=True)) for row in zip(*(values.tolist() for values in table.values()), strict=True)]))
    else:
        from memtail.cli import display

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
    from memtail.scores.pointer import latest_version
    from memtail.storage import keys

    opened = open_existing(store)
    name = resolve_name(opened, name)
    pointer = latest_version(opened, name)
    if pointer is None:
        raise ScoresError(f"experiment '{name}' has no published scores yet: see memtail status")
    place = f"{opened.address}/{keys.scores(name, pointer.version).rstrip('/')}"
    if fetch is not None:
        fetch_scores(opened, name, pointer, fetch)
    if json_:
        print(json.dumps({**pointer.to_dict(), "folder": str(fetch or place)}, indent=1))
        return
    print(f"{name}: {pointer.summary.trials} trials, published {pointer.published}")
    for file in pointer.files:
        print(fetch / file if fetch else f"{place}/{file}")


@app.command()
def report(
    name: Name = None,
    store: Store = DEFAULT_STORE,
    fetch: Annotated[Path | None, typer.Option(help="Copy the page and its figures into this folder.", metavar="DIR")] = None,
    json_: Json = False,
) -> None:
    """Make the page that shows what an experiment found, and its figures."""
    from memtail.cli import display
    from memtail.report.publish import PAGE, fetch_report, publish_report
    from memtail.storage import keys

    opened = open_existing(store)
    name = resolve_name(opened, name)
    with display.working("drawing the report", quiet=json_):
        pointer = publish_report(opened, name)
    if fetch is not None:
        fetch_report(opened, name, pointer, fetch)
    place = str(fetch or f"{opened.address}/{keys.report(name, pointer['version']).rstrip('/')}")
    print(json.dumps({**pointer, "folder": place}, indent=1) if json_ else f"{place}/{PAGE}")


@app.command()
def explore(
    store: Store = DEFAULT_STORE,
    host: Annotated[str, typer.Option(help="The address to listen on. Others than this machine's own need a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0: any that is free.")] = 8080,
    open_: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
) -> None:
    """Look at the experiments in a store in a browser: images, scores, who helps and hurts whom."""
    import webbrowser

    from memtail import logs
    from memtail.explorer.server import address, listen, serve, token_for

    logs.configure()
    opened, token = open_existing(store), token_for(host)
    with listen(host, port) as listening:
        url = address(listening, token)
        print(f"{opened.address} at {url} until Ctrl-C", flush=True)
        if open_:
            webbrowser.open(url)
        with suppress(KeyboardInterrupt):
            serve(opened, token, listening)


@app.command()
def doctor(store: Store = DEFAULT_STORE, json_: Json = False) -> None:
    """Show what is installed, which devices there are, and what is missing."""
    from memtail import logs
    from memtail.cli import display
    from memtail.cli.doctor import examine

    logs.configure()
    checks = examine(store)
    if json_:
        print(json.dumps([vars(check) for check in checks], indent=1))
    else:
        display.show_checks(checks)
    if not all(check.fine for check in checks):
        sys.exit(1)


def _draw_report(store: "ObjectStore", name: str, quiet: bool) -> None:
    """The last step of a run, whose scores are there whatever becomes of it."""
    from memtail.cli import display
    from memtail.report.publish import PAGE, is_current, latest_report, publish_report
    from memtail.storage import keys

    try:
        with display.working("drawing the report", quiet=quiet):
            pointer = latest_report(store, name) if is_current(store, name) else publish_report(store, name)
    except Exception as error:
        print(f"memtail: the report could not be made ({error}): memtail report {name} tries again", file=sys.stderr)
        return
    if pointer is not None and not quiet:
        print(f"report: {store.address}/{keys.report(name, pointer['version'])}{PAGE}")


def _scores_of(store: "ObjectStore", name: str | None) -> "Scores":
    from memtail.scores.fetch import open_scores

    if name is not None:
        with suppress(ScoresError):  # quick: the experiment's declaration is not looked at
            return open_scores(store, name)
    return open_scores(store, resolve_name(store, name))


cli_service.register(app)
app.add_typer(cli_study.app, name="study")
