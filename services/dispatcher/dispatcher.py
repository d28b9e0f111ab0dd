"""Main loop of the dispatcher: reads the bucket and the broker, and carries out the decisions of `reconcile`."""

import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice

import redis
import structlog
from kombu.exceptions import OperationalError
from structlog.contextvars import bound_contextvars

from memtail.errors import MemtailError, UnreachableError, UnsupportedError
from memtail.execution.breaker import common_error
from memtail.execution.throttle import Throttle
from memtail.experiment_store import MAX_ATTEMPTS, Control, ExperimentStore, Failure, Notice, Record
from memtail.scores.pointer import latest_version
from memtail.spec import WorkersSpec
from memtail.storage import ObjectStore, keys
from memtail.trials import Shard
from services.common.broker import Assignment, Broker, parse_id, queue_name
from services.common.polling import Listings, Quiet
from services.common.process import repeat
from services.common.settings import ServiceError, ServiceSettings
from services.dispatcher import metrics
from services.dispatcher.fleet import Fleet
from services.dispatcher.killed_workers import KilledWorkers
from services.dispatcher.lost_workers import LostWorkers
from services.dispatcher.metric_updates import ExperimentMetrics, ExperimentStatus
from services.dispatcher.reconcile import Actions, View, reconcile, shards_missing
from services.dispatcher.worker_jobs import Demand

log = structlog.get_logger()

# Time from the receipt of a message to the lease, as a share of the lease's duration. After it the assignment is sent again; the worker
# that then receives it second finds the shard leased and drops the message.
_TRANSIT_SHARE = 0.25
# Time after which the leadership is renewed within a pass, as a share of its duration.
_LEAD_SHARE = 1 / 6
# Time for which a lease must have been watched to tell of a lost worker when it expires, as a share of its duration.
_WATCHED_SHARE = 0.5
# Pause after the first failed attempt at a shard, as a share of the lease's duration, and the factor by which it grows.
_PAUSE_SHARE, _PAUSE_GROWTH = 0.25, 4
# Batches listed per pass; a longer listing continues in the next passes.
_LISTING_CHUNK = 5000
# Single batches looked up per pass. When more shards end at once, as after a flush of Redis, all batches are listed instead.
_MAX_LOOKUPS = 500
# Seconds between two looks for the identity of the store.
_IDENTITY_SECONDS = 600.0
# Source of the dispatcher's notices.
_NOTICE = "dispatcher"


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
        self._experiments: dict[str, _TrackedExperiment] = {}
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
        self._experiments = {name: self._experiments.get(name) or _TrackedExperiment(self._store, name) for name in readable}
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


class _TrackedExperiment:
    """State of an experiment that is kept between passes.

    Attributes:
        finished: whether its end is on record. It is then not looked at until it is marked as changed.
        served_at: when a worker last began a shard of it.
    """

    def __init__(self, store: ObjectStore, name: str) -> None:
        self.name, self.finished, self.served_at = name, False, float("-inf")
        self._experiment_store = ExperimentStore(store, name)
        self._trials = 0
        self._missing: dict[Shard, None] = {}  # an ordered set
        self._missing_trials = 0
        self._settled_trials = 0  # number of trials whose scores are published, or will never be
        self._listed_at = float("-inf")
        self._listing: Iterator[Shard] | None = None  # a listing that continues in the next passes
        self._committed: set[Shard] = set()  # shards seen by the last listing, or since
        self._failed: dict[Shard, tuple[int, float]] | None = None  # failed attempts per shard, and when their number was first seen
        self._failures: dict[Shard, Failure] = {}  # the last of each failed shard, read while no shard is committed
        self.view = View(name, "", ())
        self._workers: WorkersSpec | None = None
        self._quiet = Quiet()
        self._idle = False  # whether no shard is to be sent
        self._notice: Notice | None = None  # the dispatcher's, once it was read
        self._notice_read = False

    def refresh(self, settings: ServiceSettings, ended: set[str]) -> None:
        """Read the declaration, the control object, the failures and the committed batches.

        Batches are listed every `settings.resync_seconds`: completely in the first pass, later in chunks. Between listings only the
        batches of the assignments in `ended` are looked up.
        """
        try:
            record = self._experiment_store.read_record()
        except UnsupportedError as error:
            self._give_notice(str(error))
            raise
        trials, now = record.experiment.subsets.trials, time.monotonic()
        listing_due = self._listing is None and (now - self._listed_at >= settings.resync_seconds or trials != self._trials)
        if listing_due:
            self.finished = self._experiment_store.finished(record) is not None
            if self.finished:
                self._forget(record)
                return
        control, attempts = self._experiment_store.control(), self._experiment_store.attempts()
        ended_shards = [shard for name, shard in filter(None, map(parse_id, ended)) if name == self.name]
        if len(ended_shards) > _MAX_LOOKUPS:
            listing_due, ended_shards = self._listing is None, []
        for shard in ended_shards:
            if shard in self._missing and self._experiment_store.is_committed(shard):
                del self._missing[shard]
                self._missing_trials -= len(shard.trials)
                self._committed.add(shard)
        if listing_due:
            self._listing, self._committed = self._experiment_store.iterate_committed(), set()
        if self._listing is not None:
            try:
                chunk = list(islice(self._listing, _LISTING_CHUNK if self._trials else None))
            except Exception:
                self._listing, self._listed_at = None, float("-inf")  # the next pass would take the iterator for exhausted
                raise
            self._committed.update(chunk)
            if not self._trials or len(chunk) < _LISTING_CHUNK:
                self._missing = dict.fromkeys(shards_missing(trials, record.trials_per_shard, self._committed))
                self._missing_trials = sum(len(shard.trials) for shard in self._missing)
                self._listing, self._listed_at, self._trials = None, time.monotonic(), trials
        if not self._missing and self._settled_trials != self._trials and self._is_settled():
            self._settled_trials = self._trials
        resting = self._resting(attempts, _PAUSE_SHARE * settings.lease_seconds)
        # none while a listing is incomplete
        unverified = self._experiment_store.unverified(record, self._committed if self._listing is None else ())
        self._workers = record.experiment.execution.workers
        supported = self._is_supported(record, control)
        self.view = View(self.name, record.fingerprint, self._missing, control, attempts, resting, unverified, supported)
        dead = bool(self._missing) and not unverified and all(attempts[shard] >= MAX_ATTEMPTS for shard in self._missing)
        self._idle = self._listing is None and (control.state != "running" or dead)
        self._quiet.seen((control, trials, len(self._missing), attempts.total()))

    @property
    def rests(self) -> bool:
        """Whether the experiment need not be looked at: it is finished, or paused, cancelled or given up since a while."""
        return self.finished or (self._idle and self._quiet.lasts)

    def _forget(self, record: Record) -> None:
        """Keep nothing of a finished experiment but what its metrics show."""
        self._trials = self._settled_trials = record.experiment.subsets.trials
        self._missing, self._missing_trials, self._committed, self._listed_at = {}, 0, set(), float("-inf")
        self._failed, self._failures, self._workers = None, {}, record.experiment.execution.workers
        self.view = View(self.name, record.fingerprint, ())

    def _is_supported(self, record: Record, control: Control) -> bool:
        """Return whether workers of this version train the experiment; a notice says if not. An image of the experiment may be of any."""
        reason = None
        try:
            if self._missing and not (self._workers and self._workers.image):
                record.check_trainable()
        except UnsupportedError as error:
            reason = f"this release does not train it: {error}"
        if reason or not (control.tripped and control.state == "paused"):  # of which a notice says why
            self._give_notice(reason)
        return reason is None

    def _give_notice(self, line: str | None) -> None:
        """Set or remove the dispatcher's notice, unless it is as it should be."""
        notice = Notice((line,)) if line else None
        if not self._notice_read:
            self._notice, self._notice_read = self._experiment_store.notices().get(_NOTICE), True
        if self._notice != notice:
            self._experiment_store.set_notice(_NOTICE, notice)
            self._notice = notice

    def _resting(self, attempts: Counter[Shard], pause: float) -> set[Shard]:
        """The shards that failed less than a pause ago; the pause grows with the number of attempts. A new dispatcher does not wait."""
        now = time.monotonic()
        if self._failed is None:
            self._failed = {shard: (count, float("-inf")) for shard, count in attempts.items()}
        before = self._failed
        self._failed = {
            shard: before[shard] if shard in before and before[shard][0] == count else (count, now) for shard, count in attempts.items()
        }
        return {shard for shard, (count, since) in self._failed.items() if now - since < pause * _PAUSE_GROWTH ** (count - 1)}

    def pause_if_broken(self, shards: int, broker: Broker) -> None:
        """Pause the experiment if at least `shards` shards failed alike before any was committed.

        Where workers of several nodes take its shards, they must have failed on two of them, since the node may be at fault.
        """
        view, control = self.view, self.view.control
        if control.state != "running" or control.tripped or self._missing_trials < self._trials or len(view.attempts) < shards:
            self._failures = {}
            return
        self._failures = {shard: failure for shard, failure in self._failures.items() if failure.attempt == view.attempts[shard]}
        for shard in view.attempts.keys() - self._failures.keys():
            self._failures |= {failure.shard: failure for failure in self._experiment_store.failures(shard)}
        failed = [failure for failure in self._failures.values() if failure.origin.node]  # not lost workers and refused batches
        error = common_error((failure.error for failure in failed), shards)
        if error is None:
            return
        nodes = {failure.origin.node for failure in failed}
        if len(nodes) == 1 and any(worker.node not in nodes for worker in broker.workers(self.name)):
            return
        log.error("experiment paused", failed_shards=len(view.attempts), error=error)
        line = (
            f"paused, because its first shards failed alike ({error}): see memtail failures {self.name} --traceback, fix the cause, then "
            f"memtail retry {self.name}"
        )
        self._give_notice(line)
        _, self.view.control = self._experiment_store.change_control(_tripped)

    def _is_settled(self) -> bool:
        """Return whether the published scores count all trials, or a final notice says that there will be no scores."""
        pointer = latest_version(self._experiment_store.store, self.name)
        if pointer and pointer.summary.accumulated_trials >= self._trials:
            return True
        return any(notice.final for notice in self._experiment_store.notices().values())

    def status(self, actions: Actions) -> ExperimentStatus:
        """Summarize the experiment after a pass."""
        outstanding, dead = actions.outstanding[self.name], actions.dead[self.name]
        finished = not outstanding and (bool(dead) or self._settled_trials == self._trials)
        return ExperimentStatus(self.view, self._trials, self._missing_trials, outstanding, dead, finished)

    def demand(self, actions: Actions) -> Demand:
        """Describe the workers that the experiment can use."""
        control, outstanding = self.view.control, actions.outstanding[self.name] if self.view.supported else 0
        return Demand(self.name, control.state, control.priority, outstanding, self._workers)


def _names(ids: Iterable[str]) -> set[str]:
    """Return the experiments of assignments, by their ids; malformed ids are skipped."""
    return {parsed[0] for parsed in map(parse_id, ids) if parsed}


def _tripped(control: Control) -> Control:
    """Return the control of an experiment that is paused because of its failures, unless its owner has changed its state meanwhile."""
    return replace(control, state="paused", tripped=True) if control.state == "running" else control
