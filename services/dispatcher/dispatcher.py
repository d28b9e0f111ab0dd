"""The loop around `reconcile`: reads the bucket and the broker, does what is decided, again and again."""

import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice

import redis
import structlog
from kombu.exceptions import OperationalError
from structlog.contextvars import bound_contextvars

from memtail.errors import MemtailError
from memtail.experiment_store import ExperimentStore, experiment_names
from memtail.scores.pointer import latest_version
from memtail.spec import WorkersSpec
from memtail.storage import ObjectStore
from memtail.trials import Shard
from services.common.broker import Assignment, Broker, parse_id, queue_of
from services.common.process import repeat
from services.common.settings import ServiceSettings
from services.dispatcher import metrics
from services.dispatcher.fleet import Fleet
from services.dispatcher.metric_updates import Measures, Standing
from services.dispatcher.reconcile import Plan, View, reconcile, shards_missing
from services.dispatcher.worker_jobs import Demand

log = structlog.get_logger()

# Part of a lease's duration that a worker may take from receiving a message to holding the lease. What takes longer is sent once more, and
# dropped by the worker that finds it leased.
_ON_THE_WAY = 0.25
# Batches that a pass lists; a listing of more goes on in the next passes.
_LISTED_AT_ONCE = 5000
# Single batches that a pass looks for; when more shards end at once, as when Redis comes back empty, batches are listed.
_LOOKED_FOR_AT_ONCE = 500


class Dispatcher:
    """Keeps the queue filled with what is missing.

    What it remembers between passes only saves requests: a new dispatcher starts from the bucket and the broker.

    Args:
        store: the bucket.
        broker: the queue and the leases.
        settings: of the services.
        fleet: the workers of a Kubernetes cluster, if it is to keep the right number of them.
    """

    def __init__(self, store: ObjectStore, broker: Broker, settings: ServiceSettings, fleet: Fleet | None = None) -> None:
        self._store, self._broker, self._settings, self._fleet = store, broker, settings, fleet
        self._holder = f"{socket.gethostname()}/{uuid.uuid4().hex[:8]}"
        self._experiments: dict[str, _Known] = {}
        self._unreadable: set[str] = set()
        self._waited: dict[str, float] = {}  # when each assignment was last seen in the queue
        self._leased: set[str] = set()
        self._starts: dict[str, int] = {}
        self._measures = Measures(settings.linger_seconds)
        self.plan: Plan | None = None

    def run(self, beat: Callable[[], None]) -> None:
        """Reconcile for ever, and call `beat` after each pass; an outage of the bucket or the broker is waited out."""
        repeat(self._act_if_leader, self._settings.reconcile_seconds, beat, redis.RedisError, OperationalError)

    def stop(self) -> None:
        """Let another dispatcher lead at once."""
        with suppress(redis.RedisError):
            self._broker.step_down(self._holder)

    def _act_if_leader(self) -> None:
        leads = False
        try:
            leads = self._broker.lead(self._holder)
        finally:
            metrics.LEADER.set(leads)
        load = self._broker.load()
        metrics.QUEUED.set(load.waiting)
        metrics.BROKER_MEMORY.set(load.memory)
        metrics.BROKER_CLIENTS.set(load.clients)
        if leads:
            self.reconcile()
        else:
            self._measures.hide()
            if self._fleet:
                self._fleet.hide()

    def reconcile(self) -> Plan:
        """One pass."""
        waiting = {queue: list(self._broker.queued(queue)) for queue in self._broker.queues()}
        queued = [assignment for queue in waiting.values() for assignment in queue]
        leased, starts = self._broker.leased(), self._broker.starts()
        ended = self._leased - leased
        taken = self._taken({assignment.id for assignment in queued}, leased, ended)
        self._measures.expired(id_ for id_ in ended if starts.get(id_, 0) >= self._starts.get(id_, 1))
        self._read_bucket(taken | ended)
        self._leased, self._starts = leased, starts
        views: dict[str, list[View]] = {queue: [] for queue in waiting}
        for known in self._experiments.values():
            views.setdefault(queue_of(self._settings, known.name), []).append(known.view)
        limits = {"max_starts": self._settings.max_starts, "max_queued": max(1, self._settings.max_queued // max(1, len(views)))}
        plans = {queue: reconcile(views[queue], waiting.get(queue, []), leased | taken, starts, **limits) for queue in views}
        for queue, plan in plans.items():
            for assignment in plan.lost:
                self._record_lost(assignment, starts[assignment.id])
            if plan.clear:
                self._broker.clear(queue)
                self._measures.taken_back(waiting.pop(queue, []))
            self._broker.send(plan.send)
            self._measures.sent(plan.send)
        self.plan = Plan.of_all(plans.values())
        if self.plan.send or self.plan.lost:
            counts = {"shards": len(self.plan.send), "lost": len(self.plan.lost), "queued": len(queued), "leased": len(leased)}
            log.info("sent", **counts, cleared=self.plan.clear)
        still_queued = {assignment.id for queue in (*waiting.values(), self.plan.send) for assignment in queue}
        standings = [known.standing(self.plan) for known in self._experiments.values()]
        self._measures.show(standings, self._unreadable, leased, still_queued | taken)
        if self._fleet:
            self._fleet.reconcile([known.demand(self.plan) for known in self._experiments.values()], self._unreadable)
        return self.plan

    def _taken(self, waiting: set[str], leased: set[str], ended: set[str]) -> set[str]:
        """What waited in the queue a moment ago and now neither waits nor is leased: a worker has just taken it, or it is done."""
        now, most = time.monotonic(), _ON_THE_WAY * self._settings.lease_seconds
        recent = {name: seen for name, seen in self._waited.items() if now - seen < most and name not in ended}
        self._waited = recent | dict.fromkeys(waiting, now)
        return self._waited.keys() - waiting - leased

    def _read_bucket(self, ended: set[str]) -> None:
        names = experiment_names(self._store)
        self._experiments = {name: self._experiments.get(name) or _Known(self._store, name) for name in names}
        self._unreadable = set()
        for known in list(self._experiments.values()):
            with bound_contextvars(experiment=known.name):
                try:
                    known.refresh(self._settings.resync_seconds, ended)
                except MemtailError as error:
                    log.error("experiment passed over", error=str(error))
                    del self._experiments[known.name]
                    self._unreadable.add(known.name)

    def _record_lost(self, assignment: Assignment, starts: int) -> None:
        error = f"{starts} workers vanished while they trained it: killed with their whole container, or cut off"
        failure = ExperimentStore(self._store, assignment.experiment).record_failure(assignment.shard, error)
        self._broker.forget_starts([assignment.id])
        log.error("shard failed", experiment=assignment.experiment, shard=str(assignment.shard), attempt=failure.attempt, error=error)


class _Known:
    """What the dispatcher remembers of an experiment."""

    def __init__(self, store: ObjectStore, name: str) -> None:
        self.name = name
        self._experiment_store = ExperimentStore(store, name)
        self._trials = 0
        self._missing: dict[Shard, None] = {}  # in order, and quick to find and to remove
        self._missing_trials = 0
        self._settled = 0  # of so many trials it is known that the scores are published, or will never be
        self._listed = float("-inf")
        self._listing: Iterator[Shard] | None = None  # in progress, with what it has found
        self._found: set[Shard] = set()
        self.view = View(name, "", ())
        self._workers: WorkersSpec | None = None

    def refresh(self, resync_seconds: float, ended: set[str]) -> None:
        """Read what may have changed: the declaration, what its owner asks, failures, and batches.

        All batches are listed now and then only, and of many a part in each pass but the first; in between, those of the shards that may
        have `ended` are looked for.
        """
        record, control, attempts = (
            self._experiment_store.read_record(),
            self._experiment_store.control(),
            self._experiment_store.attempts(),
        )
        trials = record.experiment.subsets.trials
        theirs = [shard for name, shard in filter(None, map(parse_id, ended)) if name == self.name]
        if len(theirs) > _LOOKED_FOR_AT_ONCE:
            self._listed = float("-inf")
            theirs = []
        for shard in theirs:
            if shard in self._missing and self._experiment_store.is_committed(shard):
                del self._missing[shard]
                self._missing_trials -= len(shard.trials)
                self._found.add(shard)
        if self._listing is None and (time.monotonic() - self._listed >= resync_seconds or trials != self._trials):
            self._listing, self._found = self._experiment_store.iterate_committed(), set()
        if self._listing is not None:
            part = list(islice(self._listing, _LISTED_AT_ONCE if self._trials else None))
            self._found.update(part)
            if not self._trials or len(part) < _LISTED_AT_ONCE:
                self._missing = dict.fromkeys(shards_missing(trials, record.trials_per_shard, self._found))
                self._missing_trials = sum(len(shard.trials) for shard in self._missing)
                self._listing, self._listed, self._trials = None, time.monotonic(), trials
        if not self._missing and self._settled != self._trials and self._is_settled():
            self._settled = self._trials
        self.view = View(self.name, record.fingerprint, self._missing, control, attempts)
        self._workers = record.experiment.execution.workers

    def _is_settled(self) -> bool:
        """Whether all trials are in the published scores, or a notice says that there will be none."""
        pointer = latest_version(self._experiment_store.store, self.name)
        if pointer and pointer.summary.accumulated_trials >= self._trials:
            return True
        return any(notice.final for notice in self._experiment_store.notices().values())

    def standing(self, plan: Plan) -> Standing:
        """How it stands after a pass."""
        outstanding, dead = plan.outstanding[self.name], plan.dead[self.name]
        finished = not outstanding and (bool(dead) or self._settled == self._trials)
        return Standing(self.view, self._trials, self._missing_trials, outstanding, dead, finished)

    def demand(self, plan: Plan) -> Demand:
        """The workers that it could use."""
        control = self.view.control
        return Demand(self.name, control.state, control.priority, plan.outstanding[self.name], self._workers)
