"""What a pass of the dispatcher shows of its experiments: the state of their trials, when they will be complete, what was sent and lost."""

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
_STATES = ("running", "paused", "cancelled", "finished", "unreadable")


@dataclass(frozen=True)
class Standing:
    """An experiment after a pass.

    Attributes:
        view: as the pass found it.
        wanted, missing: trials it is to have, and those of them that are not committed.
        outstanding: shards neither committed nor dead.
        dead: shards that failed too often.
        finished: whether there is nothing to wait for any more.
    """

    view: View
    wanted: int
    missing: int
    outstanding: int
    dead: Collection[Shard]
    finished: bool


class Measures:
    """Sets the metrics of experiments.

    What it remembers of the passes before is only counted by; a new one begins from what there is.

    Args:
        linger: seconds for which the series of an experiment that has ended stay.
    """

    def __init__(self, linger: float) -> None:
        self._series = ExperimentSeries((metrics.TRIALS, metrics.OUTSTANDING, metrics.COMPLETION, *_COUNTERS), linger)
        self._sent: dict[str, set[Shard]] = {}  # of what is still missing
        self._completion: dict[str, Completion] = {}

    def show(self, standings: list[Standing], unreadable: Collection[str], leased: Iterable[str], queued: Iterable[str]) -> None:
        """The state of all experiments.

        Args:
            standings: those that could be read.
            unreadable: those that could not; what is known of them stays.
            leased: the ids of the assignments that are being trained.
            queued: of those that wait in the broker, or are on their way to a worker.
        """
        names = {standing.view.name for standing in standings}.union(unreadable)
        self._series.keep_only(names)
        self._sent = {name: sent for name, sent in self._sent.items() if name in names}
        self._completion = {name: completion for name, completion in self._completion.items() if name in names}
        for standing in standings:
            self._series.note(standing.view.name, ended=standing.finished or standing.view.control.state == "cancelled")
        self._series.expire()
        states = Counter("finished" if each.finished else str(each.view.control.state) for each in standings)
        states["unreadable"] = len(unreadable)
        for state in _STATES:
            metrics.EXPERIMENTS.labels(state).set(states[state])
        training, waiting = _by_experiment(leased), _by_experiment(queued)
        for standing in standings:
            name = standing.view.name
            if name in self._series.shown:
                self._show(standing, training[name], waiting[name] - training[name])

    def hide(self) -> None:
        """Another dispatcher acts, and shows them."""
        self._series.keep_only(())
        metrics.EXPERIMENTS.clear()
        self._sent, self._completion = {}, {}

    def sent(self, assignments: list[Assignment]) -> None:
        """Count what was put into a queue."""
        for assignment in assignments:
            metrics.SENT.labels(assignment.experiment).inc()
            before = self._sent.setdefault(assignment.experiment, set())
            metrics.REDELIVERIES.labels(assignment.experiment).inc(assignment.shard in before)
            before.add(assignment.shard)

    def taken_back(self, assignments: list[Assignment]) -> None:
        """What waited in a queue and was taken out of it; to be sent again is no redelivery then."""
        for assignment in assignments:
            self._sent.get(assignment.experiment, set()).discard(assignment.shard)

    def expired(self, ids: Iterable[str]) -> None:
        """Count leases that ended without being given back, by the assignments' ids."""
        for name, shards in _by_experiment(ids).items():
            if name in self._series.shown:
                metrics.LEASES_EXPIRED.labels(name).inc(len(shards))

    def _show(self, standing: Standing, training: set[Shard], queued: set[Shard]) -> None:
        name, view, dead = standing.view.name, standing.view, set(standing.dead)
        trials = {
            "committed": standing.wanted - standing.missing,
            "training": _trials(shard for shard in training - dead if shard in view.missing),
            "queued": _trials(shard for shard in queued - dead if shard in view.missing),
            "dead": _trials(dead),
        }
        trials["waiting"] = standing.wanted - sum(trials.values())
        for state, count in trials.items():
            metrics.TRIALS.labels(name, state).set(count)
        runs = view.control.state == "running"
        metrics.OUTSTANDING.labels(name).set(standing.outstanding if runs else 0)
        for counter in _COUNTERS:
            counter.labels(name)
        if name in self._sent:
            self._sent[name].intersection_update([shard for shard in self._sent[name] if shard in view.missing])
        self._show_completion(name, trials["committed"], standing.missing - trials["dead"] if runs else 0)

    def _show_completion(self, name: str, committed: int, left: int) -> None:
        seconds = self._completion.setdefault(name, Completion()).after(time.monotonic(), committed, left)
        if not left:
            del self._completion[name]
        if seconds is None:
            metrics.COMPLETION.remove(name)
        else:
            metrics.COMPLETION.labels(name).set(time.time() + seconds)


def _by_experiment(ids: Iterable[str]) -> dict[str, set[Shard]]:
    """The shards of assignments, by experiment; what is no id of an assignment is passed over."""
    shards: dict[str, set[Shard]] = defaultdict(set)
    for id_ in ids:
        if named := parse_id(id_):
            shards[named[0]].add(named[1])
    return shards


def _trials(shards: Iterable[Shard]) -> int:
    return sum(len(shard.trials) for shard in shards)
