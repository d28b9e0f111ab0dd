"""What a worker shows: it counts what its training processes report, and looks at its devices when it is asked for metrics.

Nothing here is called in a training process.
"""

from collections import Counter
from collections.abc import Callable

from celery.worker import state

from memtail.execution.shard_task import ShardOutcome
from services.common.experiment_series import ExperimentSeries
from services.common.metrics import count_request
from services.worker import gpus, metrics
from services.worker.reports import Reports
from services.worker.trainer import LEASED, NOT_WANTED

#: The outcome of an assignment whose process died.
DIED = "died"
#: All outcomes of an assignment.
OUTCOMES = (*(outcome.value for outcome in ShardOutcome if outcome is not ShardOutcome.STOPPED), LEASED, NOT_WANTED, DIED)


class Measures:
    """The metrics of a worker.

    Args:
        devices: how many it trains on.
        linger: seconds for which the series of an experiment stay that is not trained here any more.
    """

    def __init__(self, devices: int, linger: float) -> None:
        of_experiments = (
            metrics.ATTEMPTS,
            metrics.TRIALS,
            metrics.EXAMPLES,
            metrics.TRIAL_SECONDS,
            metrics.PHASE_SECONDS,
            metrics.QUEUE_SECONDS,
        )
        self._series = ExperimentSeries(of_experiments, linger)
        self._training: Counter[str] = Counter()  # assignments in training, by experiment
        metrics.DEVICES.set(devices)
        metrics.DEVICES_BUSY.set_function(lambda: len(state.active_requests))
        gpus.show()

    def follow(self, reports: Reports) -> None:
        """Count what processes report from now on."""
        take: dict[str, Callable[..., None]] = {
            "store": count_request,
            "taken": self.taken,
            "trained": self.trained,
            "ended": self.ended,
            "dropped": metrics.DROPPED.inc,
        }
        reports.follow(take, self._series.expire, seconds=5)

    def _note(self, experiment: str, begun: int) -> None:
        """So many more of its assignments are in training here; when none is left, this may be the last that is heard of it."""
        self._training[experiment] = max(0, self._training[experiment] + begun)
        self._series.note(experiment)
        self._series.note(experiment, ended=not self._training[experiment])

    def taken(self, experiment: str, queue_seconds: float | None) -> None:
        """A process took an assignment, which was so long on its way."""
        self._note(experiment, 1)
        for outcome in OUTCOMES:
            metrics.ATTEMPTS.labels(experiment, outcome)
        for counter in (metrics.TRIALS, metrics.EXAMPLES):
            counter.labels(experiment)
        if queue_seconds is not None:
            metrics.QUEUE_SECONDS.labels(experiment).observe(queue_seconds)

    def trained(self, experiment: str, trials: int, committed: bool, examples: int, seconds: float, phases: dict[str, float]) -> None:
        """A shard was trained: so many trials, examples (once an epoch), and seconds, also by phase where that was measured."""
        self._note(experiment, 0)
        metrics.TRIALS.labels(experiment).inc(trials if committed else 0)
        metrics.EXAMPLES.labels(experiment).inc(examples)
        for _ in range(trials):
            metrics.TRIAL_SECONDS.labels(experiment).observe(seconds / trials)
            for phase, spent in phases.items():
                metrics.PHASE_SECONDS.labels(experiment, phase).observe(spent / trials)

    def ended(self, experiment: str, outcome: str) -> None:
        """What became of an assignment."""
        self._note(experiment, -1)
        metrics.ATTEMPTS.labels(experiment, outcome).inc()
