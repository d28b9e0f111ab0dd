"""`TrackedExperiment`: what the dispatcher knows of an experiment between its passes, and how it reads it from the bucket."""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import structlog

from memtail.errors import UnsupportedError
from memtail.execution.breaker import common_error
from memtail.experiment_store import MAX_ATTEMPTS, Control, ExperimentStore, Failure, Notice, Record
from memtail.scores.pointer import latest_version
from memtail.spec import WorkersSpec
from memtail.storage import ObjectStore
from memtail.trials import Shard
from services.common.broker import Broker, parse_id
from services.common.polling import Quiet
from services.common.settings import ServiceSettings
from services.dispatcher.metric_updates import ExperimentStatus
from services.dispatcher.reconcile import Actions, View, shards_missing
from services.dispatcher.worker_jobs import Demand

log = structlog.get_logger()

# Pause after the first failed attempt at a shard, as a share of the lease's duration, and the factor by which it grows.
_PAUSE_SHARE, _PAUSE_GROWTH = 0.25, 4
# Batches listed per pass; a longer listing continues in the next passes.
_LISTING_CHUNK = 5000
# Single batches looked up per pass. When more shards end at once, as after a flush of Redis, all batches are listed instead.
_MAX_LOOKUPS = 500
# Source of the dispatcher's notices.
_NOTICE = "dispatcher"


class TrackedExperiment:
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


def _tripped(control: Control) -> Control:
    """Return the control of an experiment that is paused because of its failures, unless its owner has changed its state meanwhile."""
    return replace(control, state="paused", tripped=True) if control.state == "running" else control
