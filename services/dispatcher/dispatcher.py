"""Main loop of the dispatcher: reads the bucket and the broker, and carries out the decisions of `reconcile`."""

import socket
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace

import redis
import structlog
from kombu.exceptions import OperationalError
from structlog.contextvars import bound_contextvars

from memtail.errors import MemtailError, UnreachableError
from memtail.execution.throttle import Throttle
from memtail.experiment_store import ExperimentStore
from memtail.storage import ObjectStore, keys
from services.common.broker import Assignment, Broker, parse_id, queue_name
from services.common.polling import Listings, Quiet
from services.common.process import repeat
from services.common.settings import ServiceError, ServiceSettings
from services.dispatcher import metrics
from services.dispatcher.fleet import Fleet
from services.dispatcher.killed_workers import KilledWorkers
from services.dispatcher.lost_workers import LostWorkers
from services.dispatcher.metric_updates import ExperimentMetrics
from services.dispatcher.reconcile import Actions, View, reconcile
from services.dispatcher.tracked_experiment import TrackedExperiment

log = structlog.get_logger()

# Time from the receipt of a message to the lease, as a share of the lease's duration. After it the assignment is sent again; the worker
# that then receives it second finds the shard leased and drops the message.
_TRANSIT_SHARE = 0.25
# Time after which the leadership is renewed within a pass, as a share of its duration.
_LEAD_SHARE = 1 / 6
# Time for which a lease must have been watched to tell of a lost worker when it expires, as a share of its duration.
_WATCHED_SHARE = 0.5
# Seconds between two looks for the identity of the store.
_IDENTITY_SECONDS = 600.0


class Dispatcher:
    """Keeps the queues filled with missing shards.

    State kept between passes only saves requests: a new dispatcher starts from the bucket and the broker.

    Args:
        store: the bucket.
        broker: queues and leases.
        settings: of the services.
        fleet: workers in a Kubernetes cluster, if the dispatcher starts them.
    """

    def __init__(self, store: ObjectStore, broker: Broker, settings: ServiceSettings, fleet: Fleet | None = None) -> None:
        self._store, self._broker, self._settings, self._fleet = store, broker, settings, fleet
        self._holder = f"{socket.gethostname()}/{uuid.uuid4().hex[:8]}"
        self._experiments: dict[str, TrackedExperiment] = {}
        self._unreadable: dict[str, Quiet] = {}  # by experiment: how long it has had the same error
        self._identity_check = Throttle(0, at_least=_IDENTITY_SECONDS)
        self._listings = Listings(store, settings.resync_seconds)
        self._changed: set[str] = set()  # experiments with a new change marker, which are to be looked at
        self._last_queued: dict[str, float] = {}  # when each assignment was sent, or last seen in a queue
        self._leased: set[str] = set()
        self._led_at = float("-inf")  # when the leadership was renewed
        self._held_back = False  # whether Redis had no memory for messages in the last pass
        self._lost_workers = LostWorkers(_WATCHED_SHARE * settings.lease_seconds)
        self._metrics = ExperimentMetrics(settings.linger_seconds)
        self._killed_workers = KilledWorkers(store, broker)

    def run(self, heartbeat: Callable[[], None]) -> None:
        """Reconcile forever, and call `heartbeat` after each pass. Outages of the bucket and the broker only end the pass."""
        repeat(self._reconcile_if_leader, self._settings.reconcile_seconds, heartbeat, redis.RedisError, OperationalError)

    def stop(self) -> None:
        """Release the leadership, so that another dispatcher can take over immediately."""
        with suppress(redis.RedisError):
            self._broker.step_down(self._holder)

    def _reconcile_if_leader(self) -> None:
        leads = False
        try:
            leads = self._lead()
        finally:
            metrics.LEADER.set(leads)
        load = self._broker.load()
        metrics.QUEUED.set(load.waiting)
        metrics.BROKER_MEMORY.set(load.memory)
        metrics.BROKER_MEMORY_LIMIT.set(load.memory_limit)
        metrics.BROKER_CLIENTS.set(load.clients)
        if leads:
            self.reconcile()
        else:
            self._metrics.clear()
            if self._fleet:
                self._fleet.clear_metrics()

    def _lead(self) -> bool:
        now = time.monotonic()
        leads = self._broker.lead(self._holder)
        self._led_at = now if leads else float("-inf")
        return leads

    def _keep_leading(self) -> None:
        """Renew the leadership in the middle of a pass, so that no other dispatcher acts beside this one.

        Raises:
            ServiceError: another dispatcher leads, because this one took longer than its leadership lasts.
        """
        if time.monotonic() - self._led_at > _LEAD_SHARE * self._settings.lease_seconds and not self._lead():
            raise ServiceError("another dispatcher leads since this pass began")

    def reconcile(self) -> Actions:
        """Run one pass, and return its actions."""
        if self._fleet:
            self._killed_workers.record(self._fleet.pods(), self._lost_workers.watched)
        queues = {queue: list(self._broker.queued(queue)) for queue in self._broker.queues()}
        queued = [assignment for assignments in queues.values() for assignment in assignments]
        expired, holders = self._broker.take_expired(), self._broker.leased()
        self._lost_workers.update(holders, expired, time.monotonic())
        leased = set(holders)
        ended = (self._leased | expired.keys()) - leased
        in_transit = self._in_transit({assignment.id for assignment in queued}, leased, ended)
        self._metrics.count_expired_leases(expired)
        self._read_bucket(in_transit | ended)
        for name in _names(leased - self._leased) & self._experiments.keys():
            self._experiments[name].served_at = time.monotonic()
        self._leased = leased
        self._lost_workers.keep_only(self._remains)
        losses = self._lost_workers.counts
        views: dict[str, list[View]] = {queue: [] for queue in queues}
        for experiment in self._experiments.values():
            view = replace(experiment.view, served_at=experiment.served_at)
            views.setdefault(queue_name(self._settings, experiment.name), []).append(view)
        busy = sum(any(view.trains for view in each) for each in views.values())
        limits = {"max_starts": self._settings.max_starts, "max_queued": max(1, self._settings.max_queued // max(1, busy))}
        by_queue = {queue: reconcile(views[queue], queues.get(queue, []), leased | in_transit, losses, **limits) for queue in views}
        held_back = 0
        for queue, actions in by_queue.items():
            self._keep_leading()
            for assignment in actions.lost:
                self._record_lost(assignment, losses[assignment.id])
            if actions.clear or not views[queue]:
                self._broker.clear(queue)
                self._metrics.discount_cleared(queues.pop(queue, []))
            sent = self._broker.send(actions.send)
            held_back += len(actions.send) - len(sent)
            by_queue[queue] = replace(actions, send=sent)
            # a worker may take the message before the next pass sees it in the queue
            self._last_queued |= dict.fromkeys((assignment.id for assignment in sent), time.monotonic())
            self._metrics.count_sent(sent)
        self._note_held_back(held_back)
        merged = Actions.merge(by_queue.values())
        if merged.send or merged.lost:
            counts = {"shards": len(merged.send), "lost": len(merged.lost), "queued": len(queued), "leased": len(leased)}
            log.info("sent", **counts, cleared=merged.clear)
        still_queued = {assignment.id for assignments in (*queues.values(), merged.send) for assignment in assignments}
        statuses = [experiment.status(merged) for experiment in self._experiments.values()]
        self._metrics.update(statuses, self._unreadable, leased, still_queued | in_transit)
        if self._fleet:
            self._keep_leading()
            self._fleet.reconcile([experiment.demand(merged) for experiment in self._experiments.values()], set(self._unreadable))
        return merged

    def _note_held_back(self, shards: int) -> None:
        if shards and not self._held_back:
            log.warning("Redis is nearly full: shards wait outside the queue", shards=shards)
        self._held_back = shards > 0

    def _in_transit(self, queued: set[str], leased: set[str], ended: set[str]) -> set[str]:
        """Ids that left the queue recently and are not leased: a worker has just received them, or their shard is done."""
        now, longest = time.monotonic(), _TRANSIT_SHARE * self._settings.lease_seconds
        recent = {id_: seen for id_, seen in self._last_queued.items() if now - seen < longest and id_ not in ended}
        self._last_queued = recent | dict.fromkeys(queued, now)
        return self._last_queued.keys() - queued - leased

    def _read_bucket(self, ended: set[str]) -> None:
        self._list_changes()
        for name in [name for name, each in self._experiments.items() if each.finished and name in self._changed]:
            del self._experiments[name]  # it may be another experiment of the name
        woken = self._changed | _names(ended)
        unread = {name for name, each in self._unreadable.items() if each.lasts}
        at_rest = unread | {name for name, each in self._experiments.items() if each.rests and name not in woken}
        names = self._listings.names(at_rest)
        self._changed &= set(names)
        readable = [name for name in names if name not in unread]
        self._experiments = {name: self._experiments.get(name) or TrackedExperiment(self._store, name) for name in readable}
        self._unreadable = {name: each for name, each in self._unreadable.items() if name in names}
        for experiment in [each for each in self._experiments.values() if each.name not in at_rest]:
            self._keep_leading()
            with bound_contextvars(experiment=experiment.name):
                try:
                    experiment.refresh(self._settings, ended)
                    experiment.pause_if_broken(self._settings.breaker_shards, self._broker)
                    self._changed.discard(experiment.name)
                    self._unreadable.pop(experiment.name, None)
                except (UnreachableError, redis.RedisError):  # the others cannot be read either
                    raise
                except Exception as error:  # whatever its objects hold, the other experiments go on
                    if self._unreadable.setdefault(experiment.name, Quiet()).seen(str(error)):  # once, since it may last
                        log.error("experiment passed over", error=str(error), exc_info=not isinstance(error, MemtailError))
                    del self._experiments[experiment.name]

    def _list_changes(self) -> None:
        """List the change markers every `resync_seconds`, and see to it that the store keeps its identity."""
        if not self._listings.changes_due:
            return
        self._keep_identity()
        changed = self._listings.changed()
        self._changed |= changed
        for name in changed & self._unreadable.keys():
            del self._unreadable[name]

    def _keep_identity(self) -> None:
        """Write the identity of the store back if it was removed: workers that start later would not find the keys of this dispatcher."""
        if self._settings.identity and self._identity_check.due:
            with self._identity_check.working():
                if not self._store.exists(keys.identity()):
                    self._store.put_if_absent(keys.identity(), self._settings.identity)

    def _remains(self, id_: str) -> bool:
        """Return whether an assignment is still to be trained."""
        name, shard = parse_id(id_) or ("", None)
        view = self._experiments[name].view if name in self._experiments else None
        return view is not None and (shard in view.missing or shard in view.unverified)

    def _record_lost(self, assignment: Assignment, lost: int) -> None:
        error = f"{lost} workers were lost while they trained the shard: killed with their container, or disconnected"
        failure = ExperimentStore(self._store, assignment.experiment).record_failure(assignment.shard, error)
        self._lost_workers.forget(assignment.id)
        log.error("shard failed", experiment=assignment.experiment, shard=str(assignment.shard), attempt=failure.attempt, error=error)


def _names(ids: Iterable[str]) -> set[str]:
    """Return the experiments of assignments, by their ids; malformed ids are skipped."""
    return {parsed[0] for parsed in map(parse_id, ids) if parsed}
