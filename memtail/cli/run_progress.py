"""Progress of a run: a bar on a terminal, a plain line every few seconds elsewhere."""

import time
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from memtail.cli.display import console

if TYPE_CHECKING:
    from memtail.execution.run_state import RunState

_PLAIN_LINE_SECONDS = 5.0


class CountProgress:
    """Number of things done, such as prepared images; shows nothing if there are none to do.

    Args:
        doing: what is done, such as `preparing`.
        did: the same of what is done already, such as `prepared`.
        things: what it is done to, such as `images`.
    """

    def __init__(self, doing: str, did: str, things: str) -> None:
        self._did, self._things = did, things
        self._bar = Progress(TextColumn(f"{doing} {things}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console)
        self._task: Any = None
        self._shown_at = time.monotonic()

    def __enter__(self) -> "CountProgress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._task is not None:  # a bar that was never started would print an empty line
            self._bar.stop()

    def update(self, done: int, total: int) -> None:
        """Show that `done` of `total` are done."""
        if not console.is_terminal:
            if done == total or time.monotonic() - self._shown_at > _PLAIN_LINE_SECONDS:
                console.print(f"{self._did} {done} of {total} {self._things}")
                self._shown_at = time.monotonic()
            return
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task("", total=total)
        self._bar.update(self._task, completed=done)
        if done == total:
            self._bar.stop()


class BytesProgress:
    """Bytes written: a bar on a terminal, a plain line now and then elsewhere; nothing if none are.

    Args:
        name: of what is written.
        console: to show it on.

    Attributes:
        began: whether anything was written.
    """

    def __init__(self, name: str, console: Console = console) -> None:
        columns = TextColumn(name, markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
        self._name, self._console, self._bar = name, console, Progress(*columns, console=console)
        self.began, self._shown_at = False, time.monotonic()

    def __enter__(self) -> "BytesProgress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.began and self._console.is_terminal:
            self._bar.stop()

    def update(self, done: int, size: int) -> None:
        """Show that `done` of `size` bytes are on the disk."""
        if not self.began and self._console.is_terminal:
            self._bar.start()
            self._task = self._bar.add_task("", total=size)
        self.began = True
        if self._console.is_terminal:
            self._bar.update(self._task, completed=done)
        elif time.monotonic() - self._shown_at > _PLAIN_LINE_SECONDS:
            self._shown_at = time.monotonic()
            self._console.print(f"{self._name}: {decimal(done)} of {decimal(size)}")


class RunProgress:
    """Trials, rate and accuracies of a run.

    Args:
        quiet: show nothing, only keep `seconds`.

    Attributes:
        seconds: duration of the run so far.
    """

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
        if self._task is not None:  # a bar that was never started would print an empty line
            self._bar.stop()

    def update(self, state: "RunState") -> None:
        """Show the state of the run."""
        self.seconds = state.seconds
        if self._resumed_at is None:
            self._resumed_at = state.progress
        if self._quiet:
            return
        rate = (state.progress - self._resumed_at) / state.seconds if state.seconds else 0.0
        if console.is_terminal:
            self._update_bar(state, rate)
        elif self._is_due(state):
            left = f"{(state.total - state.progress) / rate:.0f} s left" if rate else ""
            line = ", ".join(part for part in (f"{state.trials}/{state.total} trials", _shown(rate), left) if part)
            if self._shown_at == float("-inf"):
                examples = "images" if state.dataset.kind == "images" else "examples"
                test = f"and {state.dataset.n_test} test {examples}" if state.dataset.n_test else f"{examples}, no test set"
                images = f"{state.dataset.n_train} training {test}"
                line = f"{state.trials}/{state.total} trials in the store; {images}, {len(state.devices)} x {state.devices[0]}"
            console.print(", ".join(part for part in (line, _figures(state)) if part))
            self._shown_at, self._shown_trials = time.monotonic(), state.trials

    def _is_due(self, state: "RunState") -> bool:
        """Whether a plain line is due: every few seconds, and at the end of a round, once."""
        if state.trials == state.total:
            return self._shown_trials != state.trials
        return time.monotonic() - self._shown_at > _PLAIN_LINE_SECONDS

    def _update_bar(self, state: "RunState", rate: float) -> None:
        fields = {
            "trials": f"{state.trials}/{state.total}",
            "figures": ", ".join(part for part in (_shown(rate), _figures(state)) if part),
        }
        if self._task is None:
            self._bar.start()
            name = state.record.experiment.name
            self._task = self._bar.add_task("", total=state.total, completed=state.progress, name=name, **fields)  # type: ignore[arg-type]
        self._bar.update(self._task, completed=state.progress, **fields)  # type: ignore[arg-type]


def _shown(rate: float) -> str:
    return f"{rate:.2f} trials/s" if rate else ""  # before the first trial it is unknown


def _figures(state: "RunState") -> str:
    from memtail.estimators import memorization
    from memtail.estimators.pairs import MEM_THRESHOLD

    counted = [entry for entry in state.statistics.metrics.values() if not entry.diverged]
    if not counted:
        return ""
    in_subset = np.mean([entry.in_subset_accuracy for entry in counted])
    test = [entry.test_accuracy for entry in counted if entry.test_accuracy is not None]
    memorized = int(np.count_nonzero(memorization(state.statistics).value >= MEM_THRESHOLD))
    score = " score" if state.statistics.scores_only else ""
    return ", ".join(
        [f"in-subset{score} {in_subset:.2%}", *([f"test{score} {np.mean(test):.2%}"] if test else []), f"memorized {memorized}"]
    )
