"""Updates a worker's metrics from the reports of its training processes. Runs in the parent process only."""

from collections import Counter
from collections.abc import Callable

from celery.worker import state

from memtail.execution.shard_task import ShardOutcome
from services.common.experiment_series import ExperimentSeries
from services.common.metrics import count_request
from services.common.process import Heartbeat
from services.worker import metrics
from services.worker.gpus import Gpus
from services.worker.reports import Reports
from services.worker.trainer import LEASED, LEFT, NOT_WANTED, UNSUPPORTED

# Faults of the worker in a row after which it ends.
_MOST_FAULTS = 2

# Values of the label `kinds`, by whether two devices are alike.
_KINDS = {True: "equal", False: "different"}

#: Outcome of an assignment whose training process died.
DIED = "died"
#: All outcomes of an assignment.
OUTCOMES = (
    *(outcome.value for outcome in ShardOutcome if outcome is not ShardOutcome.STOPPED),
    LEASED,
    NOT_WANTED,
    UNSUPPORTED,
    LEFT,
    DIED,
)


class WorkerMetrics:
    """Updates the metrics of a worker.

    Args:
        devices: devices, with one training process each.
        linger: seconds after the last training of an experiment until its series are removed.
        health: health of the worker; it is not ready while the worker is at fault.
        end: ends the worker.
    """

    def __init__(self, devices: list[str], linger: float, health: Heartbeat, end: Callable[[], None]) -> None:
        self._health, self._end, self._faults = health, end, 0
        of_experiments = (
            metrics.ATTEMPTS,
            metrics.TRIALS,
            metrics.EXAMPLES,
            metrics.TRIAL_SECONDS,
            metrics.PHASE_SECONDS,
            metrics.HELD_SECONDS,
            metrics.QUEUE_SECONDS,
            metrics.REPLICAS_DIFFER,
        )
        self._series = ExperimentSeries(of_experiments, linger)
        self._training: Counter[str] = Counter()  # number of assignments in training, by experiment
        metrics.DEVICES.set(len(devices))
        metrics.DEVICES_BUSY.set_function(lambda: len(state.active_requests))
        Gpus(devices).follow()

    def follow(self, reports: Reports, leave: Callable[[], None]) -> None:
        """Count the reports of training processes in a background thread; one that the worker is to leave is passed on."""
        handlers: dict[str, Callable[..., None]] = {
            "store": count_request,
            "taken": self.count_taken,
            "trained": self.count_trained,
            "differs": self.count_difference,
            "ended": self.count_ended,
            "dropped": metrics.DROPPED.inc,
            "fault": self.count_fault,
            "leaving": leave,
        }
        reports.follow(handlers, self._series.expire, seconds=5)

    def _update_series(self, experiment: str, started: int = 0) -> None:
        """Track the assignments in training; an experiment without any counts as ended, until its next assignment."""
        self._training[experiment] = max(0, self._training[experiment] + started)
        self._series.update(experiment)
        self._series.update(experiment, ended=not self._training[experiment])

    def count_taken(self, experiment: str, queue_seconds: float | None) -> None:
        """Count a received assignment, and the time since it was sent."""
        self._update_series(experiment, started=1)
        for outcome in OUTCOMES:
            metrics.ATTEMPTS.labels(experiment, outcome)
        for kinds in _KINDS.values():
            metrics.REPLICAS_DIFFER.labels(experiment, kinds)
        for counter in (metrics.TRIALS, metrics.EXAMPLES):
            counter.labels(experiment)
        if queue_seconds is not None:
            metrics.QUEUE_SECONDS.labels(experiment).observe(queue_seconds)

    def count_trained(
        self, experiment: str, trials: int, committed: bool, examples: int, seconds: float, phases: dict[str, float], held: float
    ) -> None:
        """Count a trained shard.

        Args:
            experiment: name of the experiment.
            trials: number of trials.
            committed: whether this worker committed the trial batch.
            examples: training examples processed, counted once per epoch.
            seconds: training time of the shard.
            phases: training time by phase, empty for training code of the user's own.
            held: time for which the shard held its device, from the message to the end of the commit.
        """
        self._faults, self._health.fault = 0, ""
        self._update_series(experiment)
        metrics.TRIALS.labels(experiment).inc(trials if committed else 0)
        metrics.EXAMPLES.labels(experiment).inc(examples)
        metrics.HELD_SECONDS.labels(experiment).inc(held)
        for _ in range(trials):
            metrics.TRIAL_SECONDS.labels(experiment).observe(seconds / trials)
            for phase, duration in phases.items():
                metrics.PHASE_SECONDS.labels(experiment, phase).observe(duration / trials)

    def count_difference(self, experiment: str, alike: bool) -> None:
        """Count two different trainings of a shard; `alike` if their devices and versions of torch are of one kind."""
        metrics.REPLICAS_DIFFER.labels(experiment, _KINDS[alike]).inc()

    def count_fault(self, reason: str) -> None:
        """Count a fault of the worker; the second in a row ends it."""
        metrics.FAULTS.inc()
        self._faults, self._health.fault = self._faults + 1, reason
        if self._faults >= _MOST_FAULTS:
            self._end()

    def count_ended(self, experiment: str, outcome: str) -> None:
        """Count the outcome of an assignment."""
        self._update_series(experiment, started=-1)
        metrics.ATTEMPTS.labels(experiment, outcome).inc()
