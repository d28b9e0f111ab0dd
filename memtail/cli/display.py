"""What the command line shows: progress of a run, summaries and tables."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.bar import Bar
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from memtail.cli.doctor import Check
    from memtail.execution.embedded import RunState
    from memtail.execution.forecast import Forecast
    from memtail.execution.progress import ExperimentProgress
    from memtail.execution.submit import Submission
    from memtail.experiment_store import Failure
    from memtail.scores.reader import Column, Scores
    from memtail.spec import Experiment

console = Console(highlight=False, soft_wrap=True, markup=False)
if not console.is_terminal:
    console.width = 200  # nothing is cut where nobody's window sets the width

_PLAIN_LINE_SECONDS = 5.0
_BAR_WIDTH = 40
_WIDEST = 1000
# Columns of tables that are read from their left.
_TEXTS = ("experiment", "filename", "state")


def show_spec(experiment: "Experiment") -> None:
    """The resolved declaration."""
    if console.is_terminal:
        from rich.syntax import Syntax  # slow to import

        console.print(Syntax(experiment.to_yaml(), "yaml", background_color="default"))
    else:
        console.print(experiment.to_yaml())


class PreparationProgress:
    """Images prepared; nothing is shown unless there are some."""

    def __init__(self) -> None:
        self._bar = Progress(TextColumn("preparing images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console)
        self._task: Any = None
        self._shown_at = time.monotonic()

    def __enter__(self) -> "PreparationProgress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._task is not None:  # elsewhere it would leave an empty line
            self._bar.stop()

    def update(self, done: int, total: int) -> None:
        """Show that `done` of `total` are prepared."""
        if not console.is_terminal:
            if done == total or time.monotonic() - self._shown_at > _PLAIN_LINE_SECONDS:
                console.print(f"prepared {done} of {total} images")
                self._shown_at = time.monotonic()
            return
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task("", total=total)
        self._bar.update(self._task, completed=done)
        if done == total:
            self._bar.stop()


class RunProgress:
    """A bar with the figures of a run on a terminal, a plain line every few seconds elsewhere."""

    def __init__(self, quiet: bool = False) -> None:
        self.seconds = 0.0
        self._quiet = quiet
        self._bar = Progress(
            TextColumn("{task.fields[name]}", style="bold", markup=False),
            BarColumn(),
            TextColumn("{task.fields[trials]} trials"),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: Any = None
        self._resumed_at: float | None = None
        self._shown_at = float("-inf")
        self._shown_trials = -1

    def __enter__(self) -> "RunProgress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, state: "RunState") -> None:
        """Show a state of the run."""
        self.seconds = state.seconds
        if self._resumed_at is None:
            self._resumed_at = state.progress
        if self._quiet:
            return
        rate = (state.progress - self._resumed_at) / state.seconds if state.seconds else 0.0
        if console.is_terminal:
            self._update_bar(state, rate)
        elif time.monotonic() - self._shown_at > _PLAIN_LINE_SECONDS or (state.trials == state.total != self._shown_trials):
            left = f", {(state.total - state.progress) / rate:.0f} s left" if rate else ""
            line = f"{state.trials}/{state.total} trials, {rate:.2f} trials/s{left}"
            if self._shown_at == float("-inf"):
                place = (
                    f"{state.dataset.n_train} training and {state.dataset.n_test} test images, {len(state.devices)} x {state.devices[0]}"
                )
                line = f"{state.trials}/{state.total} trials in the store; {place}"
            console.print(", ".join(part for part in (line, _figures(state)) if part))
            self._shown_at, self._shown_trials = time.monotonic(), state.trials

    def _update_bar(self, state: "RunState", rate: float) -> None:
        fields = {
            "trials": f"{state.trials}/{state.total}",
            "figures": ", ".join(part for part in (f"{rate:.2f} trials/s", _figures(state)) if part),
        }
        if self._task is None:
            self._bar.start()
            name = state.record.experiment.name
            self._task = self._bar.add_task("", total=state.total, completed=state.progress, name=name, **fields)  # type: ignore[arg-type]
        self._bar.update(self._task, completed=state.progress, **fields)  # type: ignore[arg-type]


def _figures(state: "RunState") -> str:
    from memtail.estimators import memorization
    from memtail.estimators.pairs import MEM_THRESHOLD

    counted = [entry for entry in state.statistics.metrics.values() if not entry.diverged]
    if not counted:
        return ""
    inside = np.mean([entry.in_subset_accuracy for entry in counted])
    test = np.mean([entry.test_accuracy for entry in counted])
    memorized = int(np.count_nonzero(memorization(state.statistics).value >= MEM_THRESHOLD))
    return f"in-subset {inside:.2%}, test {test:.2%}, memorized {memorized}"


def show_summary(scores: "Scores", seconds: float, store: str) -> None:
    """What came out, the five most memorized examples, and where the files are."""
    trained = f" in {seconds:.1f} s" if seconds else ", all from the store"
    summary, pairs = scores.summary, scores.summary.pairs
    console.print(f"\n{summary.experiment}: {summary.trials} trials{trained}", style="bold")
    error = summary.mem_se_quantile(0.95)
    facts = [
        ("test accuracy", _percent(summary.test_accuracy)),
        ("in-subset accuracy", _percent(summary.in_subset_accuracy)),
        ("held-out accuracy", _percent(summary.held_out_accuracy)),
        ("memorized (mem >= 0.25)", f"{_percent(summary.mem_share(0.25))} of {summary.n_train} training examples"),
        ("standard error of mem", f"95% of examples at most {error:.3f}" if error is not None else "none"),
        (
            "high-influence pairs",
            f"{pairs.count} (infl >= {pairs.infl_threshold}), {pairs.train_examples} training and {pairs.test_examples} test examples",
        ),
    ]
    if summary.without_estimate:
        facts.append(("without an estimate", f"{summary.without_estimate} examples were in every subset or in none"))
    if summary.diverged:
        facts.append(("diverged", f"{summary.diverged} trials, left out"))
    for name, value in facts:
        console.print(f"  {name:<24} {value}")
    console.print("\nmost memorized")
    show_table(scores.most_memorized(5))
    console.print(f"\nfiles in {scores.folder}")
    console.print(f"next: memtail top {summary.experiment} --pairs --store {store}")


def show_profile(profile: dict[str, Any]) -> None:
    """Where the time went: device-seconds by phase, with their shares as bars."""
    seconds, devices, phases = profile["seconds"], profile["devices"], profile["phases"]
    whole = sum(phases.values()) or 1.0
    console.print(f"\nwhere {seconds:.1f} s on {devices} {'device' if devices == 1 else 'devices'} went", style="bold")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for column in ("phase", "share", "seconds"):
        table.add_column(column, justify="left" if column == "phase" else "right", no_wrap=True)
    table.add_column("bar", width=_BAR_WIDTH)
    for phase, spent in phases.items():
        table.add_row(f"  {phase}", f"{spent / whole:.1%}", f"{spent:.1f} s", Bar(whole, 0, spent, width=_BAR_WIDTH))
    console.print(table, soft_wrap=False, crop=False)


def show_plan(plan: "Forecast") -> None:
    """What a run would take, line by line, and on other numbers of devices."""
    left = "" if plan.trials_to_train == plan.trials else f", {plan.trials_to_train} of them to be trained"
    console.print(f"{plan.experiment}: {plan.trials} trials{left}", style="bold")
    best = "" if plan.best_trials_per_shard == plan.trials_per_shard else f"; {plan.best_trials_per_shard} would take about half a minute"
    here = plan.seconds_per_trial / plan.devices
    facts = [
        (
            "seconds per trial",
            f"{plan.seconds_per_trial:.3g} on one {plan.device} device, {here:.3g} on all {plan.devices} of this machine",
        ),
        ("before the first trial", f"{plan.startup_seconds:.1f} s"),
        ("after the last trial", f"{plan.scoring_seconds:.1f} s"),
        ("memory", f"{decimal(plan.peak_memory)} {'of the device' if plan.device == 'cuda' else 'per process'}"),
        ("trials per shard", f"{plan.trials_per_shard}{best}"),
        ("stored", f"{decimal(plan.trial_bytes)} of trials, {decimal(plan.score_bytes)} of scores"),
        ("standard error", f"at most {plan.standard_error:.3f} to be expected"),
    ]
    if plan.wanted_standard_error is not None:
        facts.append((f"for at most {plan.wanted_standard_error:g}", f"{plan.trials_for_it} trials"))
    if plan.extrapolated:
        facts.append(("measured", "on shortened trials"))
    for name, value in facts:
        console.print(f"  {name:<24} {value}")
    console.print("\nthe whole run")
    for where, forecast in (("this machine", plan.here), *((f"{each.devices} x {plan.device}", each) for each in plan.elsewhere)):
        cost = "" if forecast.cost is None else f"  costs {forecast.cost:.2f}"
        console.print(f"  {where:<24} {duration(forecast.seconds):>10}{cost}")


def show_status(found: "list[ExperimentProgress]") -> None:
    """One line per experiment; columns that hold nothing but zeros are left out."""
    rows = [
        {
            "experiment": each.experiment,
            "state": each.ending or each.control.state,
            "prio": each.control.priority,
            "trials": f"{each.trials}/{each.wanted}",
            "shards": f"{len(each.committed)}/{len(each.committed) + len(each.missing)}",
            "failed": each.failed_attempts,
            "dead": len(each.dead),
            "published": "-" if each.published_age is None else f"{each.published_trials}, {age(each.published_age)} ago",
            "std. error": "-" if each.standard_error is None else each.standard_error,
            "test acc.": "-" if each.pointer is None else _percent(each.pointer.summary.test_accuracy),
        }
        for each in found
    ]
    table = {column: np.array([row[column] for row in rows], dtype=object) for column in rows[0]}
    show_table({column: values for column, values in table.items() if any(value != 0 for value in values)})
    for each in found:
        for line in each.notice_lines:
            console.print(f"{each.experiment}: {line}")


def show_submission(made: "Submission", store: str) -> None:
    """What was entered, and what to do next."""
    experiment, before = made.record.experiment, made.trials_before
    trials = experiment.subsets.trials
    if before is None:
        what = f"entered in {store}"
    elif before < trials:
        what = f"extended from {before} to {trials} trials in {store}"
    else:
        what = f"is in {store} already"
    console.print(f"{experiment.name} {what}", style="bold")
    state = "running" if made.control.state == "running" else f"{made.control.state}: memtail resume {experiment.name} lets it run"
    facts = [
        ("trials", f"{trials} in {made.shards} shards of {made.record.trials_per_shard}"),
        ("fingerprint", made.record.fingerprint[:16]),
        ("dataset", f"{made.dataset[:16]}, {'put into the store' if made.staged else 'was in the store'}"),
        ("priority", str(made.control.priority)),
        ("state", state),
    ]
    for name, value in facts:
        console.print(f"  {name:<24} {value}")
    console.print(f"\nwatch it:     memtail watch {experiment.name} --store {store}")
    console.print(f"its scores:   memtail scores {experiment.name} --fetch DIR --store {store}")


def show_failures(found: "list[Failure]", progress: "ExperimentProgress", traceback: bool) -> None:
    """One line per failed attempt, or its whole text."""
    if traceback:
        for each in found:
            console.print(f"{each.shard}, attempt {each.attempt}, {each.when}: {progress.fate(each.shard)}", style="bold")
            console.print(f"{each.traceback.rstrip() or each.error}\n")
    else:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for column in ("trials", "attempt", "when", "now"):
            table.add_column(column, justify="right" if column == "attempt" else "left", no_wrap=True)
        table.add_column("error", overflow="fold")
        for each in found:
            table.add_row(each.shard.span, str(each.attempt), each.when, progress.fate(each.shard), Text(each.error))
        console.print(table, soft_wrap=False, crop=False)
    if progress.dead:
        count, name = len(progress.dead), progress.experiment
        console.print(f"\n{count} shard{'s' * (count > 1)} given up: memtail retry {name} has {'them' if count > 1 else 'it'} tried again")


def show_table(table: "dict[str, Column]") -> None:
    """Columns side by side; floats to four digits."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in table:
        shown.add_column(Text(name), justify="left" if name in _TEXTS else "right", no_wrap=True)
    for row in zip(*(values.tolist() for values in table.values()), strict=True):
        shown.add_row(*(Text(f"{value:.4f}" if isinstance(value, float) else str(value)) for value in row))
    # a narrow terminal had better break lines than cut cells
    shown.width = console.measure(shown, options=console.options.update(width=_WIDEST)).maximum
    console.print(shown, soft_wrap=False, crop=False)


def show_checks(checks: "list[Check]") -> None:
    """One line per check."""
    for check in checks:
        console.print(Text("ok " if check.fine else "NO ", style="green" if check.fine else "red"), f"{check.name:<22} {check.finding}")


def duration(seconds: float) -> str:
    """In the unit that fits."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def age(seconds: float) -> str:
    """As `duration`, in whole seconds; clocks that differ a little give 0."""
    return f"{max(0.0, seconds):.0f} s" if seconds < 120 else duration(seconds)


@contextmanager
def working(what: str, quiet: bool = False) -> Iterator[None]:
    """Says what is being done while it takes long, on a terminal."""
    if quiet or not console.is_terminal:
        yield
        return
    with console.status(what):
        yield


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
