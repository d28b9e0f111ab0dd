"""Times at which a process with credentials gives up the training of a shard in its trainer process."""

import time

from memtail.errors import TrainerError, TrainingStopped
from memtail.trainers.command import GRACE_SECONDS
from memtail.trainers.silence import Silence

# Seconds that the process has to stop, in which a command has its own grace.
_STOP_SECONDS = GRACE_SECONDS + 10.0
# Least seconds for imports, and for what memtail does after the last trial.
_REST_SECONDS = 60.0


class Limits:
    """The times of one shard.

    Args:
        timeout: longest time of a trial in seconds, if there is one.
        trials: number of trials of the shard.
        silence: longest silence of training in seconds.
        reports: whether it reports each step; else silence counts from its first report on.
    """

    def __init__(self, timeout: float | None, trials: int, silence: float, reports: bool) -> None:
        self._timeout, self._trials, self._together = timeout or float("inf"), trials, False
        self._last, self._allowed = time.monotonic(), max(_REST_SECONDS, self._timeout * trials)
        self._most_silence, self._silence, self._reports = silence, Silence(silence), False
        #: When the process was told to stop.
        self.stopping: float | None = None
        if reports:
            self.progress()

    def begin(self, together: bool) -> None:
        """Begin with the first trial, or with all trials together."""
        self._together, self._last = together, time.monotonic()
        self._allowed = self._timeout * (self._trials if together else 1)

    def finished(self) -> None:
        """Begin with the next trial, if there is one."""
        self._trials -= 1
        if not self._together:
            self._last = time.monotonic()
        if self._trials <= 0:
            self._last, self._allowed = time.monotonic(), max(_REST_SECONDS, self._timeout)

    def progress(self) -> None:
        """Take a report."""
        self._reports = True
        self._silence.progress()

    def heard(self) -> None:
        """Take any message, which is a sign of life of training that reports."""
        if self._reports:
            self._silence.progress()

    def check(self) -> None:
        """Raise if the time is over. Raises: TrainingStopped, TrainerError."""
        now = time.monotonic()
        if self.stopping is not None and now - self.stopping > _STOP_SECONDS:
            raise TrainingStopped
        if now - self._last > self._allowed:
            raise TrainerError(f"a trial took longer than trainer.timeout, {self._timeout:g} s: raise it, or make the code faster")
        if self.stopping is None and self._silence.hung() is not None:
            raise TrainerError(
                f"training hangs: no progress for more than {self._most_silence:g} s: the output shows where; if the code is only slow, "
                f"raise MEMTAIL_SILENCE_SECONDS"
            )
