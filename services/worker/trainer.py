"""What a worker does with an assignment. It holds no science: training is `memtail.trainers.images.train_shard`."""

import contextvars
import os
import threading
import traceback
import uuid
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from typing import Any

import numpy as np
import redis
import structlog
from structlog.contextvars import bound_contextvars

from memtail.datasets import ImageDataset
from memtail.datasets.staged_dataset import fetch, fetch_masks
from memtail.errors import MemtailError, StoreError
from memtail.execution.pool import StoredCheckpoints
from memtail.experiment_store import ExperimentStore, Record
from memtail.settings import Settings
from memtail.spec import Experiment
from memtail.storage import ObjectNotFound, ObjectStore
from services.common.broker import Assignment, Broker

log = structlog.get_logger()

# One shard of so many has its phases measured, which makes an accelerator wait; the first of a process is one of them.
_PROFILED = 16


class Outcome(StrEnum):
    """What became of an assignment."""

    COMMITTED = "committed"
    LOST_RACE = "lost race"
    DONE_BEFORE = "done before"
    LEASED = "leased by another"
    NOT_WANTED = "not wanted"
    FAILED = "failed"
    HANDED_BACK = "handed back"


class Trainer:
    """Trains assignments on one device, in a process that stays warm from one to the next.

    Args:
        store: the bucket.
        broker: for leases; while it cannot be reached, training goes on without.
        worker: the name of the worker, with which its leases begin.
        device: as torch names it, or "auto" for the best there is.
        lease_seconds: how long a lease lasts; it is renewed three times as often.
        stopping: whether the worker is about to stop, so that the shard is to be handed back.
        report: tells the parent process what is to be counted, as `services.worker.metric_updates.Measures.follow` takes it.
    """

    def __init__(
        self,
        store: ObjectStore,
        broker: Broker,
        worker: str,
        device: str,
        lease_seconds: float,
        stopping: Callable[[], bool],
        report: Callable[..., None],
    ) -> None:
        self._store, self._broker, self._device = store, broker, device
        self._lease_seconds, self._stopping, self._report = lease_seconds, stopping, report
        self._shards = 0
        self._holder = f"{worker}/{os.getpid()}"
        self._dataset: ImageDataset | None = None

    def train(self, assignment: Assignment, sent: Any = None) -> Outcome:
        """Train a shard unless that is done, being done, or no longer wanted; never raises for what a shard or a model does.

        Args:
            assignment: names the shard.
            sent: when it was, by the broker's clock, if its message says so.
        """
        with bound_contextvars(experiment=assignment.experiment, shard=str(assignment.shard)):
            self._report("taken", assignment.experiment, self._seconds_since(sent))
            try:
                outcome = self._train_if_wanted(assignment)
                log.info("shard ended", outcome=outcome.value)
            except StoreError as error:  # the fault is not the shard's: it is tried again when the store is back
                outcome = Outcome.HANDED_BACK
                log.error("shard handed back", error=str(error))
            self._report("ended", assignment.experiment, outcome)
            return outcome

    def _seconds_since(self, sent: Any) -> float | None:
        if not isinstance(sent, float):
            return None
        try:
            return max(0.0, self._broker.time() - sent)
        except redis.RedisError:
            return None

    def _train_if_wanted(self, assignment: Assignment) -> Outcome:
        experiment_store = ExperimentStore(self._store, assignment.experiment)
        try:
            record = experiment_store.read_record()
        except ObjectNotFound:
            return Outcome.NOT_WANTED
        if (
            record.fingerprint != assignment.fingerprint
            or not record.has(assignment.shard)
            or experiment_store.control().state != "running"
        ):
            return Outcome.NOT_WANTED
        if experiment_store.is_committed(assignment.shard):
            return Outcome.DONE_BEFORE
        with _Lease(self._broker, assignment, self._holder, self._lease_seconds, experiment_store) as lease:
            if not lease.held:
                return Outcome.LEASED
            return self._train(assignment, experiment_store, record, lease)

    def _train(self, assignment: Assignment, experiment_store: ExperimentStore, record: Record, lease: "_Lease") -> Outcome:
        from memtail.trainers.images import TrainingStopped, train_shard
        from memtail.trainers.images.devices import available_devices

        checkpoints = StoredCheckpoints(self._store, assignment.experiment, assignment.shard)
        try:
            batch = train_shard(
                self._experiment_of(record),
                self._dataset_of(record),
                assignment.shard.trials,
                available_devices(self._device)[0],
                checkpoints=checkpoints,
                stop=lambda: self._stopping() or lease.cancelled,
                profile=self._shards % _PROFILED == 0,
            )
        except TrainingStopped:
            return Outcome.NOT_WANTED if lease.cancelled else Outcome.HANDED_BACK
        except StoreError:
            raise
        except Exception as error:  # MemoryError too, which would end the whole worker
            message = str(error) if isinstance(error, MemtailError) else f"{type(error).__name__}: {error}"
            experiment_store.record_failure(assignment.shard, message, traceback.format_exc())
            log.warning("shard failed", error=message)
            return Outcome.FAILED
        self._shards += 1
        committed = experiment_store.commit(batch, record.fingerprint)
        checkpoints.remove()
        examples = int(np.bitwise_count(batch.membership).sum()) * record.experiment.training.epochs
        spent = batch.provenance
        self._report("trained", assignment.experiment, len(batch.trial), committed, examples, spent.seconds or 0.0, spent.phases or {})
        return Outcome.COMMITTED if committed else Outcome.LOST_RACE

    def _experiment_of(self, record: Record) -> Experiment:
        """The experiment, with files that are on this machine."""
        if record.experiment.subsets.masks is None:
            return record.experiment
        return record.experiment.with_masks(fetch_masks(self._store, record.canonical["subsets"]["masks"], Settings().cache))

    def _dataset_of(self, record: Record) -> ImageDataset:
        """The dataset; the last one stays open, so that its images stay on the device from shard to shard."""
        fingerprint = record.canonical["dataset"]["fingerprint"]
        if self._dataset is None or self._dataset.fingerprint != fingerprint:
            settings = Settings()
            self._dataset = fetch(self._store, fingerprint, settings.cache, settings.cache_limit)
        return self._dataset


class _Lease:
    """A shard's lease, renewed by a thread while training. Where Redis cannot be reached the shard is trained without.

    With each renewal it is looked whether the experiment has been cancelled meanwhile.
    """

    def __init__(self, broker: Broker, assignment: Assignment, holder: str, seconds: float, experiment_store: ExperimentStore) -> None:
        self._broker, self._assignment, self._seconds, self._experiment_store = broker, assignment, seconds, experiment_store
        self._holder = f"{holder}/{uuid.uuid4().hex}"
        self._over = threading.Event()
        # so that what it logs names the shard
        self._thread = threading.Thread(target=contextvars.copy_context().run, args=(self._renew,), daemon=True)
        self.held = self.cancelled = False

    def __enter__(self) -> "_Lease":
        try:
            self.held = self._broker.acquire(self._assignment, self._holder)
        except redis.RedisError as error:
            log.warning("training without a lease", error=str(error))
            self.held = True
        if self.held:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self.held:
            self._thread.join()
            with suppress(redis.RedisError):
                self._broker.release(self._assignment, self._holder)

    def _renew(self) -> None:
        while not self._over.wait(self._seconds / 3):
            with suppress(redis.RedisError):
                self._broker.renew(self._assignment, self._holder)
            with suppress(StoreError):
                self.cancelled = self._experiment_store.control().state == "cancelled"
