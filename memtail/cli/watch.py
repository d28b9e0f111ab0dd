"""Live progress of experiments: bars on a terminal, plain lines elsewhere."""

import time
from collections import deque
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from memtail.cli.display import age, console, duration, warn_of_few_trials
from memtail.errors import StoreError
from memtail.execution.progress import ExperimentProgress, progress_of
from memtail.storage import ObjectNotFound, ObjectStore

#: Seconds of retries, and timeout of a request: the next refresh is the next attempt.
RETRY_SECONDS, TIMEOUT = 0.0, 10.0

_REFRESH_SECONDS = 2.0
_PLAIN_LINE_SECONDS = 10.0
# Window of the rate: short enough to follow workers that come and go, long enough to average over shards.
_RATE_SECONDS = 600.0


def follow(store: ObjectStore, names: list[str]) -> bool:
    """Show the progress of experiments until all have ended; True if all are published.

    Args:
        store: holds the experiments.
        names: the experiments.

    Raises:
        StoreError: the store cannot be read at the start. Later failures are shown and retried.
        ObjectNotFound: an experiment does not exist, or was removed.
    """
    followed = {name: Followed(progress_of(store, name)) for name in names}
    show = _Bars() if console.is_terminal else _Lines()
    with show:
        while True:
            show.show(list(followed.values()), "")
            going = [each for each in followed.values() if each.progress.ending is None]
            if not going:
                break
            while True:
                time.sleep(_REFRESH_SECONDS)
                try:
                    for each in going:
                        each.update(progress_of(store, each.progress.experiment))
                    break
                except ObjectNotFound:
                    raise
                except StoreError as error:
                    show.show(list(followed.values()), f"store unreachable, retrying ({' '.join(str(error).split())})")
    for each in followed.values():
        if line := last_line(each.progress):
            console.print(line)
        if each.progress.pointer:
            warn_of_few_trials(each.progress.pointer.summary)
    return all(each.progress.ending == "published" for each in followed.values())


class Followed:
    """Progress and rate of one experiment."""

    def __init__(self, progress: ExperimentProgress) -> None:
        self.progress = progress
        self._seen = deque([(time.monotonic(), progress.trials)])

    def update(self, progress: ExperimentProgress) -> None:
        """Add the current progress."""
        now = time.monotonic()
        self.progress = progress
        self._seen.append((now, progress.trials))
        while now - self._seen[0][0] > _RATE_SECONDS:
            self._seen.popleft()

    @property
    def rate(self) -> float:
        """Trials per second."""
        (start, first), (end, last) = self._seen[0], self._seen[-1]
        return max(0, last - first) / (end - start) if end > start else 0.0

    def pace(self) -> str:
        """Describe the rate and the time left, or the state if there is no rate."""
        progress = self.progress
        if progress.ending:
            return "done" if progress.ending == "published" else progress.ending
        if progress.control.state != "running":
            return progress.control.state
        if not progress.outstanding:
            return "waiting for the scores"
        if not self.rate:
            return "running"
        return f"{self.rate:.2f} trials/s, {duration(progress.outstanding / self.rate)} left"

    def facts(self) -> Iterator[str]:
        """Describe published scores, failures and notices."""
        progress = self.progress
        if progress.pointer and progress.published_age is not None:
            se = "" if progress.standard_error is None else f", standard error {progress.standard_error:.3f}"
            few = f", {progress.few_trials_mark}" if progress.few_trials_mark else ""
            yield f"published {progress.published_trials} trials {age(progress.published_age)} ago{se}{few}"
        if progress.failed_attempts:
            yield f"{progress.failed_attempts} failed attempt{'s' * (progress.failed_attempts > 1)}"
        if progress.dead:
            yield f"{len(progress.dead)} shard{'s' * (len(progress.dead) > 1)} given up"
        yield from progress.lines


def last_line(progress: ExperimentProgress) -> str | None:
    """Describe how to continue an experiment that ended without all its scores; None if there is nothing to do."""
    name = progress.experiment
    missing = f"{progress.total - progress.trials} of {progress.total} trials are missing"
    if progress.ending == "cancelled":
        return f"{name}: {missing}, it is cancelled: continue with memtail resume {name}"
    if progress.ending == "without scores":
        return f"{name}: {'; '.join(progress.notice_lines)}"
    if progress.ending != "dead":
        return None
    fix = f"see memtail failures {name} --traceback, then memtail retry {name}"
    if progress.refused:
        shards = ", ".join(shard.span for shard in progress.refused)
        return f"{name}: the batches of trials {shards} are damaged: remove them, {fix}"
    shards = ", ".join(shard.span for shard in progress.dead)
    return f"{name}: {missing}, their shards failed too often ({shards}): {fix}"


class _Bars:
    """A bar for each experiment, above a line of facts."""

    def __init__(self) -> None:
        self._live = Live(console=console, refresh_per_second=4)

    def __enter__(self) -> "_Bars":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, followed: list[Followed], trouble: str) -> None:
        rows = list(_rows(followed))
        if trouble:
            rows.append(Text(trouble, style="yellow"))
        self._live.update(Group(*rows), refresh=True)


def _rows(followed: list[Followed]) -> Iterator[RenderableType]:
    counts = [f"{each.progress.trials}/{each.progress.total} trials" for each in followed]
    widths = max(len(each.progress.experiment) for each in followed), max(map(len, counts))
    for each, count in zip(followed, counts, strict=True):
        progress = each.progress
        row = Table.grid(padding=(0, 2, 0, 0), expand=True)
        row.add_column(no_wrap=True, width=widths[0])
        row.add_column(ratio=1)
        row.add_column(no_wrap=True, width=widths[1], justify="right")
        row.add_row(Text(progress.experiment, "bold"), ProgressBar(total=progress.total, completed=progress.trials), Text(count))
        yield row
        yield Padding(Text("; ".join((each.pace(), *each.facts())), "dim"), (0, 0, 0, 2))


class _Lines:
    """A line for each experiment with progress, at most every few seconds, and one when the store becomes unreachable."""

    def __init__(self) -> None:
        self._shown: dict[str, tuple[ExperimentProgress, float]] = {}
        self._trouble = False

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, followed: list[Followed], trouble: str) -> None:
        if trouble and not self._trouble:
            console.print(trouble)
        self._trouble = bool(trouble)
        now = time.monotonic()
        for each in [] if trouble else followed:
            progress = each.progress
            last, when = self._shown.get(progress.experiment, (None, 0.0))
            if progress == last or (last and not progress.ending and now - when < _PLAIN_LINE_SECONDS):
                continue
            parts = (f"{progress.trials}/{progress.total} trials", each.pace(), *each.facts())
            console.print(f"{progress.experiment}: {'; '.join(parts)}")
            self._shown[progress.experiment] = (progress, now)
