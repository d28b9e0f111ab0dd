"""Command line. Commands import what they need themselves, so that `--help` and `top` start fast."""

import json
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memtail.cli import cache as cli_cache
from memtail.cli import exchange as cli_exchange
from memtail.cli import retention as cli_retention
from memtail.cli import service as cli_service
from memtail.cli import study as cli_study
from memtail.cli import trainer as cli_trainer
from memtail.cli.arguments import (
    DEFAULT_STORE,
    Changes,
    Json,
    Name,
    SpecFile,
    Store,
    interruptible,
    open_existing,
    preparation,
    resolve_name,
)
from memtail.errors import BatchesRefusedError, IncompleteRunError, MemtailError, ScoresError, SpecError, StoreError, UnreachableError
from memtail.processes import resend_dropped

if TYPE_CHECKING:
    from memtail.scores.reader import Scores
    from memtail.storage import ObjectStore

app = typer.Typer(
    help="Measure what neural networks memorize, and which training examples influence which predictions.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"memtail {version('memtail')}")
        raise typer.Exit


@app.callback()
def options(
    version_: Annotated[
        bool, typer.Option("--version", "-V", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the program itself."""


def main() -> None:
    """Run the command line; exits with 2 and one line on invalid input, 130 when interrupted, 143 when terminated."""
    terminated = False

    def terminate(*_: object) -> None:
        nonlocal terminated
        terminated = True
        raise _TerminatedError(143)

    signal.signal(signal.SIGTERM, terminate)
    resend_dropped({_TerminatedError: signal.SIGTERM, KeyboardInterrupt: signal.SIGINT})
    try:
        _run_command()
    finally:
        if terminated:  # also if a library dropped the exception
            sys.exit(143)


class _TerminatedError(SystemExit):
    """The process received SIGTERM."""


def _run_command() -> None:
    try:
        app()
    except MemtailError as error:
        text = "\n".join(error.lines if isinstance(error, SpecError) else ()) or " ".join(str(error).split())
        print(f"memtail: {text}", file=sys.stderr)
        sys.exit(1 if isinstance(error, BatchesRefusedError) else 2)
    except OSError as error:
        print(f"memtail: {error.filename or 'the system'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "torchvision", "sklearn", "scipy"):
            raise
        print(f"memtail: {error.name} is not installed: pip install 'memtail[train]'", file=sys.stderr)
        sys.exit(2)


@app.command()
def run(
    spec: SpecFile,
    store: Store = DEFAULT_STORE,
    changes: Changes = None,
    trials: Annotated[int | None, typer.Option("--trials", help="Set subsets.trials.", metavar="N", show_default=False)] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Also show a profile of the trials.")] = False,
    json_: Json = False,
) -> None:
    """Run an experiment until its scores are published, or resume it."""
    from memtail.spec import Experiment

    number = [] if trials is None else [f"subsets.trials={trials}"]
    experiment = Experiment.load(spec, [*(changes or ()), *number])  # before torch is imported, so that a mistake is answered at once
    from memtail import logs
    from memtail.cli import display
    from memtail.cli.run_progress import RunProgress
    from memtail.execution.embedded import run as run_experiment

    logs.configure()
    if not json_:
        display.show_spec(experiment)
    failure = None
    try:
        with interruptible(), RunProgress(quiet=json_) as progress, preparation(quiet=json_) as on_preparation:
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
def validate(spec: SpecFile, changes: Changes = None) -> None:
    """Check an experiment file, and show it with its defaults. Data and networks are checked by memtail plan."""
    from memtail.spec import Experiment

    experiment = Experiment.load(spec, changes or ())
    from memtail.cli import display

    display.show_spec(experiment)


@app.command()
def plan(
    spec: SpecFile,
    store: Store = DEFAULT_STORE,
    changes: Changes = None,
    price: Annotated[float | None, typer.Option(help="Cost of one device per hour.", metavar="P")] = None,
    standard_error: Annotated[float | None, typer.Option(help="Standard error that no score should exceed.", metavar="E")] = None,
    overlap: Annotated[
        float | None,
        typer.Option(help="Overlap of what two runs select, memorized examples and pairs: from scores in the store.", metavar="J"),
    ] = None,
    json_: Json = False,
) -> None:
    """Forecast the time, memory, cost and standard errors of a run from a few seconds of training."""
    from memtail.spec import Experiment

    experiment = Experiment.load(spec, changes or ())  # as in `run`
    from memtail import logs
    from memtail.cli import display
    from memtail.execution.forecast import forecast as make_forecast

    logs.configure()
    with preparation(quiet=json_) as on_preparation:
        forecast = make_forecast(
            experiment, store, price=price, standard_error=standard_error, overlap=overlap, on_preparation=on_preparation
        )
    if json_:
        print(json.dumps(asdict(forecast), indent=1))
    else:
        display.show_forecast(forecast)


@app.command()
def status(name: Name = None, store: Store = DEFAULT_STORE, json_: Json = False) -> None:
    """Show the progress of the experiments in a store."""
    from memtail.cli import display
    from memtail.execution.progress import progress_of
    from memtail.experiment_store import experiment_names

    opened = open_existing(store)
    experiments, unreadable = [], {}
    for each in [name] if name else experiment_names(opened):
        try:
            experiments.append(progress_of(opened, each))
        except UnreachableError:
            raise
        except StoreError as error:
            if name:
                raise
            unreadable[each] = str(error)
    if json_:
        rows = [progress.to_json() for progress in experiments]
        print(json.dumps(rows + [{"experiment": each, "error": error} for each, error in unreadable.items()], indent=1))
    elif experiments or unreadable:
        display.show_status(experiments, unreadable)
        if name and experiments[0].pointer:
            display.warn_of_few_trials(experiments[0].pointer.summary)
    else:
        print(f"no experiment in {store}")


@app.command()
def top(
    name: Name = None,
    store: Store = DEFAULT_STORE,
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="Number of rows.")] = 10,
    pairs: Annotated[bool, typer.Option("--pairs", help="Show the selected pairs instead, confirmed ones first.")] = False,
    influencers_of: Annotated[
        int | None, typer.Option(min=0, help="Show the training examples of highest influence on test example J.", metavar="J")
    ] = None,
    json_: Json = False,
) -> None:
    """Show the most memorized training examples, or the selected pairs."""
    opened = open_existing(store)
    scores = _scores_of(opened, name)
    if (pairs or influencers_of is not None) and not scores.summary.n_test:
        raise ScoresError(f"experiment '{scores.summary.experiment}' has no test examples, and so neither influence nor pairs")
    if influencers_of is not None:
        table = scores.top_influencers(influencers_of, count)
    elif pairs:
        table = scores.strongest_pairs(count)
    else:
        table = scores.most_memorized(count)
    if json_:
        print(json.dumps([dict(zip(table, row, strict=True)) for row in zip(*(values.tolist() for values in table.values()), strict=True)]))
    else:
        from memtail.cli import display

        if pairs and not len(table["tr_idx"]):
            print(f"no selected pairs in the scores of {scores.summary.trials} trials")
        else:
            display.show_table(table)
        display.warn_of_few_trials(scores.summary)


@app.command()
def scores(
    name: Name = None,
    store: Store = DEFAULT_STORE,
    fetch: Annotated[Path | None, typer.Option(help="Copy the latest files into this folder.", metavar="DIR")] = None,
    json_: Json = False,
) -> None:
    """List the published score files, or copy them to a folder."""
    from memtail.cli import display
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
    display.warn_of_few_trials(pointer.summary)


@app.command()
def report(
    name: Name = None,
    store: Store = DEFAULT_STORE,
    fetch: Annotated[Path | None, typer.Option(help="Copy the page and its figures into this folder.", metavar="DIR")] = None,
    json_: Json = False,
) -> None:
    """Make the report of an experiment: a page and its figures."""
    from memtail.cli import display
    from memtail.report.publish import PAGE, fetch_report, publish_report
    from memtail.storage import keys

    opened = open_existing(store)
    name = resolve_name(opened, name)
    with display.working("drawing the report", quiet=json_):
        pointer = publish_report(opened, name)
    if fetch is not None:
        fetch_report(opened, name, pointer, fetch)
    place = str(fetch or f"{opened.address}/{keys.report(name, pointer.version).rstrip('/')}")
    print(json.dumps({**pointer.to_dict(), "folder": place}, indent=1) if json_ else f"{place}/{PAGE}")


@app.command()
def explore(
    store: Store = DEFAULT_STORE,
    host: Annotated[str, typer.Option(help="Address to listen on; any but the loopback address needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 is any free port.")] = 8080,
    open_: Annotated[bool, typer.Option("--open", help="Open a browser.")] = False,
) -> None:
    """Serve the explorer: images, scores and influences in a browser."""
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
    """Check the installation, the devices, the store and the broker."""
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
    """Make the report at the end of a run, without failing the run."""
    from memtail.cli import display
    from memtail.report.pointer import latest_report
    from memtail.report.publish import PAGE, is_current, publish_report
    from memtail.storage import keys

    try:
        with display.working("drawing the report", quiet=quiet):
            pointer = latest_report(store, name) if is_current(store, name) else publish_report(store, name)
    except Exception as error:
        print(f"memtail: the report failed ({error}): retry with memtail report {name}", file=sys.stderr)
        return
    if pointer is not None and not quiet:
        print(f"report: {store.address}/{keys.report(name, pointer.version)}{PAGE}")


def _scores_of(store: "ObjectStore", name: str | None) -> "Scores":
    from memtail.scores.fetch import open_scores

    if name is not None:
        with suppress(ScoresError):  # fast path: does not read the experiment's record
            return open_scores(store, name)
    return open_scores(store, resolve_name(store, name))


cli_service.register(app)
cli_cache.register(app)
cli_retention.register(app)
cli_exchange.register(app)
app.add_typer(cli_study.app, name="study")
app.add_typer(cli_trainer.app, name="trainer")
