"""Output of the command line: summaries and tables."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.bar import Bar
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from memtail.figures.numbers import percent

if TYPE_CHECKING:
    from memtail.cli.doctor import Check
    from memtail.execution.forecast import DeviceForecast, Forecast
    from memtail.execution.progress import ExperimentProgress
    from memtail.execution.submit import Submission
    from memtail.execution.trainer_check import Repetition, TrainerCheck
    from memtail.experiment_store import Action, Failure, Origin
    from memtail.scores.pointer import ScorePointer
    from memtail.scores.reader import Column, Scores
    from memtail.scores.summary import ScoreSummary
    from memtail.spec import Experiment

console = Console(highlight=False, soft_wrap=True, markup=False)
if not console.is_terminal:
    console.width = 200  # without a window, nothing is cut

_BAR_WIDTH = 40
_WIDEST = 1000
# Left-aligned columns of tables.
_TEXTS = ("experiment", "filename", "tr_filename", "tt_filename", "state", "owner")


def show_spec(experiment: "Experiment") -> None:
    """Print the resolved declaration."""
    if console.is_terminal:
        from rich.syntax import Syntax  # slow to import

        console.print(Syntax(experiment.to_yaml(), "yaml", background_color="default"))
    else:
        console.print(experiment.to_yaml())


def show_summary(scores: "Scores", seconds: float, store: str) -> None:
    """Print the summary of a run, the five most memorized examples, and the folder of the files."""
    trained = f" in {seconds:.1f} s" if seconds else ", all from the store"
    summary = scores.summary
    console.print(f"\n{summary.experiment}: {summary.trials} trials{trained}", style="bold")
    se = summary.mem_se_quantile(0.95)
    names = summary.names
    facts = [(f"test {names.mean}", percent(summary.test_accuracy, 2, "-"))] if summary.n_test else []
    facts += [
        (f"in-subset {names.mean}", percent(summary.in_subset_accuracy, 2, "-")),
        (f"held-out {names.mean}", percent(summary.held_out_accuracy, 2, "-")),
        (f"memorized ({names.mem} >= 0.25)", f"{percent(summary.mem_share(0.25), 2, '-')} of {summary.n_train} training examples"),
        (f"standard error of {names.mem}", f"95% of examples at most {se:.3f}" if se is not None else "none"),
    ]
    if summary.n_test:
        facts.append(_pairs(summary))
    if summary.without_estimate:
        facts.append(("without an estimate", f"{summary.without_estimate} examples, in every subset or in none"))
    if summary.diverged:
        facts.append(("diverged", f"{summary.diverged} trials, left out"))
    for name, value in facts:
        console.print(f"  {name:<24} {value}")
    console.print("\nmost memorized")
    show_table(scores.most_memorized(5))
    if summary.few_trials:
        console.print(f"\n{summary.few_trials}", style="yellow")
    console.print(f"\nfiles in {scores.folder}")
    console.print(f"next: memtail top {summary.experiment} {'--pairs ' if summary.shown_pairs.count else ''}--store {store}")


def _pairs(summary: "ScoreSummary") -> tuple[str, str]:
    """Name the pairs that are shown, and count them."""
    selected, paper = summary.selected_pairs, summary.pairs
    examples = f"{summary.shown_pairs.train_examples} training and {summary.shown_pairs.test_examples} test examples"
    if selected is None:
        return "high-influence pairs", f"{paper.count} ({summary.names.infl} >= {paper.infl_threshold}), {examples}"
    rate = f"at a false discovery rate of {selected.false_discovery_rate:.0%}"
    return "selected pairs", f"{selected.count} {rate}, {selected.confirmed} confirmed; {examples}"


def warn_of_few_trials(summary: "ScoreSummary") -> None:
    """Print the warning of few trials to the error stream, if these are few."""
    if summary.few_trials:
        print(f"{summary.experiment}: {summary.few_trials}", file=sys.stderr)


def show_profile(profile: dict[str, Any]) -> None:
    """Print the device-seconds of a run by phase, with their shares as bars, and the share of computation of each device."""
    seconds, devices, phases = profile["seconds"], profile["devices"], profile["phases"]
    whole = sum(phases.values()) or 1.0
    console.print(f"\nprofile of {seconds:.1f} s on {devices} {'device' if devices == 1 else 'devices'}", style="bold")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for column in ("phase", "share", "seconds"):
        table.add_column(column, justify="left" if column == "phase" else "right", no_wrap=True)
    table.add_column("bar", width=_BAR_WIDTH)
    for phase, spent in phases.items():
        table.add_row(f"  {phase}", f"{spent / whole:.1%}", f"{spent:.1f} s", Bar(whole, 0, spent, width=_BAR_WIDTH))
    console.print(table, soft_wrap=False, crop=False)
    shares = ", ".join(f"{device} {share:.1%}" for device, share in profile["computation"].items())
    console.print(f"  computation during training: {shares}")


def show_forecast(forecast: "Forecast") -> None:
    """Print the forecast of a run line by line, and its duration on other numbers of devices."""
    from memtail.confidence import Z

    left = "" if forecast.trials_to_train == forecast.trials else f", {forecast.trials_to_train} of them to train"
    round_ = "" if forecast.until is None else " in this round"
    console.print(f"{forecast.experiment}: {forecast.trials} trials{round_}{left}", style="bold")
    each, best = (duration(number * forecast.seconds_per_trial) for number in (forecast.trials_per_shard, forecast.best_trials_per_shard))
    shard = f"{forecast.trials_per_shard}, trained together in {each}"
    if forecast.best_trials_per_shard != forecast.trials_per_shard and forecast.trials_to_train == forecast.trials:
        shard += f"; execution: {{trials_per_shard: {forecast.best_trials_per_shard}}} would make it {best}"
    all_devices = forecast.seconds_per_trial / forecast.devices
    models = f", {decimal(forecast.model_bytes)} of models" if forecast.model_bytes else ""
    facts = [
        (
            "seconds per trial",
            f"{forecast.seconds_per_trial:.3g} on one {forecast.device} device, {all_devices:.3g} on all {forecast.devices} of them",
        ),
        ("before the first trial", f"{forecast.startup_seconds:.1f} s"),
        ("after the last trial", f"{forecast.scoring_seconds:.1f} s"),
        ("memory", f"{decimal(forecast.peak_memory)} {'of the device' if forecast.device == 'cuda' else 'per process'}"),
        ("trials per shard", shard),
        ("stored", f"{decimal(forecast.trial_bytes)} of trials, {decimal(forecast.score_bytes)} of scores{models}"),
        ("standard error", f"at most {forecast.standard_error:.3f} expected, 95% intervals at most ±{Z * forecast.standard_error:.3f}"),
    ]
    if forecast.until is not None:
        facts.append(("further rounds until", forecast.until))
    if forecast.extrapolated:
        facts.append(("measured", "on shortened trials"))
    for name, value in facts:
        console.print(f"  {name:<24} {value}")
    console.print()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("  to the end of")
    for place in ("trials", "this machine", *(f"{run.devices} x {forecast.device}" for run in forecast.elsewhere)):
        table.add_column(place, justify="right")
    this = "the run" if forecast.until is None else "this round"
    table.add_row(f"  {this}", f"{forecast.trials}", *map(_time_and_cost, (forecast.here, *forecast.elsewhere)))
    for goal in forecast.goals:
        runs = () if goal.here is None else (goal.here, *goal.elsewhere)
        trials = f"more than {goal.beyond}" if goal.beyond is not None else "unknown" if goal.trials is None else f"{goal.trials}"
        table.add_row(f"  {goal.goal}", trials, *map(_time_and_cost, runs))
    console.print(table, soft_wrap=False, crop=False)


def _time_and_cost(run: "DeviceForecast") -> str:
    return duration(run.seconds) if run.cost is None else f"{duration(run.seconds)}, costs {run.cost:.2f}"


def show_trainer_check(check: "TrainerCheck") -> None:
    """Print what one trial says about its trainer."""
    outcome = check.outcome
    console.print(f"{check.experiment}: trial {check.trial} of {check.trials}, on {check.device}", style="bold")
    metrics = {} if outcome.loss is None else {"loss": outcome.loss}
    metrics |= outcome.further or {}
    mean = "score" if check.scores_only else "accuracy"
    order = f"the dataset's, by {' and '.join(check.compared)}" if check.compared else "not compared: return train_labels or train_ids"
    facts = [
        ("code", f"{', '.join(check.code)}: a change makes it another experiment"),
        ("subset", f"{check.subset} of {check.n_train} training examples"),
        (f"in-subset {mean}", percent(outcome.in_subset_accuracy, 2, "-")),
        (f"held-out {mean}", percent(outcome.held_out_accuracy, 2, "-")),
        (f"test {mean}", percent(outcome.test_accuracy, 2, "-")),
        ("order", order),
        ("margins", "returned" if check.margins else "not recorded"),
        ("scores", "returned" if check.scores else "not recorded"),
        ("metrics", ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()) or "none"),
        ("time", f"{check.seconds:.3g} s, and {check.start_seconds:.1f} s to start the trainer process"),
    ]
    for name, value in facts:
        console.print(f"  {name:<24} {value}")
    for warning in check.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"))


def show_repetition(check: "TrainerCheck", second: "Repetition | None", seconds: float) -> None:
    """Print whether the second training of a trial had the outcomes of the first, and the seconds of all trials."""
    if second is not None:
        same = f"{second.differences} outcomes differ" if second.differences else "equal outcomes"
        console.print(f"  {'trained again':<24} {same}, {second.seconds:.3g} s")
    console.print(f"  {'all trials':<24} about {duration(seconds)} on {check.devices} {'device' if check.devices == 1 else 'devices'}")
    if second is not None and second.differences:
        console.print(Text("warning: equal trials differ: draw all randomness from task.seed", style="yellow"))


def show_status(experiments: "list[ExperimentProgress]", unreadable: dict[str, str]) -> None:
    """Print one line per experiment, without columns of zeros; then notices, and the reason for each unreadable experiment."""
    rows = [
        {
            "experiment": each.experiment,
            "state": "archived" if each.archived else each.ending or each.control.state,
            "owner": each.owner or "",
            "prio": each.control.priority,
            "trials": f"{each.trials}/{each.total}",
            "shards": f"{len(each.committed)}/{len(each.committed) + len(each.missing)}",
            "failed": each.failed_attempts,
            "dead": len(each.dead),
            "published": "-" if each.published_age is None else f"{each.published_trials}, {age(each.published_age)} ago",
            "std. error": "-" if each.standard_error is None else each.standard_error,
            "warning": each.few_trials_mark or "",
            "test acc.": _test_mean(each.pointer, "correct"),
            "test score": _test_mean(each.pointer, "score"),
        }
        for each in experiments
    ]
    if rows:
        table = {column: np.array([row[column] for row in rows], dtype=object) for column in rows[0]}
        show_table({column: values for column, values in table.items() if any(value not in (0, "") for value in values)})
    for each in experiments:
        for line in each.lines:
            console.print(f"{each.experiment}: {line}")
    for name, error in unreadable.items():
        console.print(f"{name}: cannot be read ({error})")


def _test_mean(pointer: "ScorePointer | None", outcome: str) -> str:
    """Mean outcome on the test set; empty if the scores are of another outcome."""
    if pointer is None:
        return "-" if outcome == "correct" else ""
    return percent(pointer.summary.test_accuracy, 2, "-") if pointer.summary.outcome == outcome else ""


def show_submission(submission: "Submission", store: str) -> None:
    """Print what was submitted, and the next commands."""
    experiment, before = submission.record.experiment, submission.trials_before
    trials = experiment.subsets.trials
    if before is None:
        change = f"submitted to {store}"
    elif before < trials:
        change = f"extended from {before} to {trials} trials in {store}"
    else:
        change = f"is already in {store}"
    console.print(f"{experiment.name} {change}", style="bold")
    state: str = submission.control.state
    if state != "running":
        state = f"{state}: continue with memtail resume {experiment.name}"
    facts = [
        ("trials", f"{trials} in {submission.shards} shards of {submission.record.trials_per_shard}"),
        ("fingerprint", submission.record.fingerprint[:16]),
        ("dataset", f"{submission.dataset[:16]}, {'staged to the store' if submission.staged else 'already in the store'}"),
        ("priority", str(submission.control.priority)),
        *([("owner", submission.record.owner)] if submission.record.owner else []),
        ("state", state),
    ]
    for name, value in facts:
        console.print(f"  {name:<24} {value}")
    console.print(f"\nprogress:     memtail watch {experiment.name} --store {store}")
    console.print(f"scores:       memtail scores {experiment.name} --fetch DIR --store {store}")


def show_failures(failures: "list[Failure]", progress: "ExperimentProgress", traceback: bool) -> None:
    """Print one line per failed attempt, or its traceback."""
    if traceback:
        for each in failures:
            console.print(f"{each.shard}, attempt {each.attempt}, {each.when}: {progress.fate(each.shard)}", style="bold")
            console.print(f"{each.traceback.rstrip() or each.error}\n")
    else:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for column in ("trials", "attempt", "when", "where", "now"):
            table.add_column(column, justify="right" if column == "attempt" else "left", no_wrap=True)
        table.add_column("error", overflow="fold")
        for each in failures:
            table.add_row(each.shard.span, str(each.attempt), each.when, _where(each.origin), progress.fate(each.shard), Text(each.error))
        console.print(table, soft_wrap=False, crop=False)
    if progress.owner:
        console.print(Text(f"\nowner: {progress.owner}"))
    if progress.dead:
        count, name = len(progress.dead), progress.experiment
        console.print(f"\n{count} shard{'s' * (count > 1)} given up: retry with memtail retry {name}")
        nodes = [{each.origin.node for each in failures if each.shard == shard} for shard in progress.dead]
        if alone := {node for tried in nodes if len(tried) == 1 for node in tried} - {""}:
            console.print(f"Some failed on {', '.join(sorted(alone))} only: no other node had a worker, so the node may be at fault")


def show_history(actions: "list[Action]") -> None:
    """Print one line per action."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("when", "user", "host", "memtail", "action"):
        table.add_column(column, no_wrap=True)
    table.add_column("details", overflow="fold")
    for each in actions:
        table.add_row(*map(Text, (each.when, each.user, each.host, each.memtail, each.action, each.details)))
    console.print(table, soft_wrap=False, crop=False)


def _where(origin: "Origin") -> str:
    """Return the host of an attempt, its node where that is another name, and the device."""
    host = origin.host if origin.node in ("", origin.host) else f"{origin.host} on {origin.node}"
    return ", ".join(filter(None, (host, origin.device)))


def show_table(table: "dict[str, Column]") -> None:
    """Print columns side by side; floats to four digits."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in table:
        shown.add_column(Text(name), justify="left" if name in _TEXTS else "right", no_wrap=True)
    for row in zip(*(values.tolist() for values in table.values()), strict=True):
        shown.add_row(*(Text(f"{value:.4f}" if isinstance(value, float) else str(value)) for value in row))
    # on a narrow terminal, wrapped lines are better than cut cells
    shown.width = console.measure(shown, options=console.options.update(width=_WIDEST)).maximum
    console.print(shown, soft_wrap=False, crop=False)


def show_checks(checks: "list[Check]") -> None:
    """Print one line per check."""
    for check in checks:
        console.print(Text("ok " if check.fine else "NO ", style="green" if check.fine else "red"), f"{check.name:<22} {check.finding}")


def duration(seconds: float) -> str:
    """Format seconds in a suitable unit."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def age(seconds: float) -> str:
    """Format as `duration`, in whole seconds; a negative age, from a clock difference, is 0."""
    return f"{max(0.0, seconds):.0f} s" if seconds < 120 else duration(seconds)


@contextmanager
def working(text: str, quiet: bool = False) -> Iterator[None]:
    """Show a spinner with a text on a terminal."""
    if quiet or not console.is_terminal:
        yield
        return
    with console.status(text):
        yield
