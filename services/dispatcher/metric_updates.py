"""Updates the dispatcher's metrics of experiments: trials by state, estimated completion, shards sent and leases expired."""

import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from memtail.trials import Shard
from services.common.broker import Assignment, parse_id
from services.common.experiment_series import ExperimentSeries
from services.dispatcher import metrics
from services.dispatcher.completion import Completion
from services.dispatcher.reconcile import View

_COUNTERS = (metrics.SENT, metrics.REDELIVERIES, metrics.LEASES_EXPIRED)
_STATES = ("running", "paused", "broken", "cancelled", "finished", "unreadable")


@dataclass(frozen=True)
class ExperimentStatus:
    """Status of an experiment after a pass.

    Attributes:
        view: state of the experiment in the bucket.
        trials: number of declared trials.
        missing: number of trials that are not committed.
        outstanding: number of shards that are neither committed nor dead.
        dead: shards without attempts left.
        finished: whether no further progress is expected.
    """

    view: View
    trials: int
    missing: int
    outstanding: int
    dead: Collection[Shard]
    finished: bool

    @property
    def state(self) -> str:
        """State of the experiment in the metrics."""
        control = self.view.control
        return "finished" if self.finished else "broken" if control.tripped and control.state == "paused" else control.state


class ExperimentMetrics:
    """Updates the metrics of all experiments.

    Its memory of previous passes only serves for counting; a new object starts from the current state.

    Args:
        linger: seconds after the end of an experiment until its series are removed.
    """

    def __init__(self, linger: float) -> None:
        self._series = ExperimentSeries((metrics.TRIALS, metrics.OUTSTANDING, metrics.COMPLETION, *_COUNTERS), linger)
        self._sent: dict[str, set[Shard]] = {}  # missing shards that were sent, by experiment
        self._completion: dict[str, Completion] = {}

    def update(self, statuses: list[ExperimentStatus], unreadable: Collection[str], leased: Iterable[str], queued: Iterable[str]) -> None:
        """Export the state of all experiments.

        Args:
            statuses: experiments that could be read.
            unreadable: names of experiments that could not be read; their series keep their values.
            leased: ids of the assignments in training.
            queued: ids of the assignments in the broker, or in transit to a worker.
        """
        names = {status.view.name for status in statuses}.union(unreadable)
        self._series.keep_only(names)
        self._sent = {name: sent for name, sent in self._sent.items() if name in names}
        self._completion = {name: completion for name, completion in self._completion.items() if name in names}
        for status in statuses:
            self._series.update(status.view.name, ended=status.finished or status.view.control.state == "cancelled")
        self._series.expire()
        states = Counter(status.state for status in statuses)
        states["unreadable"] = len(unreadable)
        for state in _STATES:
            metrics.EXPERIMENTS.labels(state).set(states[state])
        training, waiting = _by_experiment(leased), _by_experiment(queued)
        for status in statuses:
            name = status.view.name
            if name in self._series.shown:
                self._update_experiment(status, training[name], waiting[name] - training[name])

    def clear(self) -> None:
        """Remove all series, because another dispatcher leads and exports them."""
        self._series.keep_only(())
        metrics.EXPERIMENTS.clear()
        self._sent, self._completion = {}, {}

    def count_sent(self, assignments: list[Assignment]) -> None:
        """Count assignments that were sent to a queue."""
        for assignment in assignments:
            metrics.SENT.labels(assignment.experiment).inc()
            before = self._sent.setdefault(assignment.experiment, set())
            metrics.REDELIVERIES.labels(assignment.experiment).inc(assignment.shard in before)
            before.add(assignment.shard)

    def discount_cleared(self, assignments: list[Assignment]) -> None:
        """Register assignments that were removed from a queue, so that sending them again does not count as a redelivery."""
        for assignment in assignments:
            self._sent.get(assignment.experiment, set()).discard(assignment.shard)

    def count_expired_leases(self, ids: Iterable[str]) -> None:
        """Count leases that ended without a release, by the ids of their assignments."""
        for name, shards in _by_experiment(ids).items():
            if name in self._series.shown:
                metrics.LEASES_EXPIRED.labels(name).inc(len(shards))

    def _update_experiment(self, status: ExperimentStatus, training: set[Shard], queued: set[Shard]) -> None:
        name, view, dead = status.view.name, status.view, set(status.dead)
        trials = {
            "committed": status.trials - status.missing,
            "training": _trials(shard for shard in training - dead if shard in view.missing),
            "queued": _trials(shard for shard in queued - dead if shard in view.missing),
            "dead": _trials(dead),
        }
        trials["waiting"] = status.trials - sum(trials.values())
        for state, count in trials.items():
            metrics.TRIALS.labels(name, state).set(count)
        running = view.control.state == "running"
        metrics.OUTSTANDING.labels(name).set(status.outstanding if running and view.supported else 0)
        for counter in _COUNTERS:
            counter.labels(name)
        if name in self._sent:
            self._sent[name].intersection_update([shard for shard in self._sent[name] if shard in view.missing])
        self._update_completion(name, trials["committed"], status.missing - trials["dead"] if running else 0)

    def _update_completion(self, name: str, committed: int, missing: int) -> None:
        seconds = self._completion.setdefault(name, Completion()).seconds_left(time.monotonic(), committed, missing)
        if not missing:
            del self._completion[name]
        if seconds is None:
            metrics.COMPLETION.remove(name)
        else:
            metrics.COMPLETION.labels(name).set(time.time() + seconds)


def _by_experiment(ids: Iterable[str]) -> dict[str, set[Shard]]:
    """Group the shards of assignment ids by experiment; malformed ids are skipped."""
    shards: dict[str, set[Shard]] = defaultdict(set)
    for id_ in ids:
        if parsed := parse_id(id_):
            experiment, shard = parsed
            shards[experiment].add(shard)
    return shards


def _trials(shards: Iterable[Shard]) -> int:
    return sum(len(shard.trials) for shard in shards)
