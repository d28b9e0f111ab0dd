"""One assignment of a worker: a lease, and `run_shard`."""

import os
import random
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import redis
import structlog
from structlog.contextvars import bound_contextvars

from memtail.datasets import Dataset
from memtail.datasets.cache_folder import note_use
from memtail.datasets.staged_dataset import fetch
from memtail.datasets.staged_inputs import fetch_inputs
from memtail.errors import DatasetError, LocalFileError, SpecError, StoreError, TrainingStopped, UnsupportedError, WorkerFaultError
from memtail.execution.checkpoints import StoredCheckpoints
from memtail.execution.shard_task import ShardOutcome, ShardResult, run_shard
from memtail.experiment_store import MAX_ATTEMPTS, ExperimentStore, Failure, Notice, Record
from memtail.settings import Settings
from memtail.storage import ObjectNotFound, ObjectStore
from memtail.trainers.code import code_folder
from memtail.trainers.shard_trainer import ShardTrainer
from memtail.trials import Shard, TrialBatch
from services.common.broker import Assignment, Broker
from services.worker.lease import Lease

log = structlog.get_logger()

#: Outcomes of an assignment beside those of a shard: another worker holds its lease; its experiment is cancelled, paused or unknown.
LEASED = "leased by another"
NOT_WANTED = "not wanted"
#: Another version of memtail, or another kind of device, must train it.
UNSUPPORTED = "unsupported"
#: The shard failed on this node or host, and another one has a worker; the message is dropped, and the dispatcher sends it again.
LEFT = "left to another"

# Leases after which a shard no longer waits for another worker to make its next attempt: that may train for hours, or be unable to.
_MOST_LEASES_LEFT = 60
# Longest pause in seconds after a shard that is left to another: about the time until the dispatcher sends it again.
_LEFT_SECONDS = 2.0
# Source of the workers' notices.
_NOTICE = "worker"
# Most characters of a reason in a report, which must fit into an atomic write to a pipe.
_REASON = 500


class Trainer:
    """Trains assignments on one device, in a long-lived process.

    Args:
        store: the bucket.
        broker: for leases; while it is unreachable, training continues without a lease.
        worker: name of the worker, with which its leases begin.
        device: as torch names it, or "auto" for the best available one.
        lease_seconds: duration of a lease; it is renewed three times as often.
        silence_seconds: time without progress after which training counts as hung; the process ends, or that of user code.
        stopping: whether the worker is about to stop, so that the shard is to be handed back.
        report: sends a report to the parent process, as `services.worker.metric_updates` takes it.
    """

    def __init__(
        self,
        store: ObjectStore,
        broker: Broker,
        worker: str,
        device: str,
        lease_seconds: float,
        silence_seconds: float,
        stopping: Callable[[], bool],
        report: Callable[..., None],
    ) -> None:
        self._store, self._broker, self._device = store, broker, device
        self._lease_seconds, self._silence_seconds, self._stopping, self._report = lease_seconds, silence_seconds, stopping, report
        self._unsupported: dict[str, set[Shard]] = {}  # shards of which the messages were passed on, by experiment
        self._checked = False
        self._taken = 0.0  # when the last assignment was received, by the monotonic clock
        #: Whether this process can train further shards; not after an error of its device's driver.
        self.usable = True
        self._holder = f"{worker}/{os.getpid()}"
        self._dataset: Dataset | None = None
        self._shard_trainer: ShardTrainer | None = None

    def train(self, assignment: Assignment, sent: Any = None) -> str:
        """Train a shard unless it is committed, leased, or not to be trained; errors of the shard, the model and the store become outcomes.

        Args:
            assignment: names the shard.
            sent: time of sending by the broker's clock, if the message says so.

        Returns:
            The outcome: of `ShardOutcome` (but never STOPPED), LEASED, NOT_WANTED, UNSUPPORTED or LEFT.
        """
        if assignment.experiment in self._unsupported:
            return UNSUPPORTED
        with bound_contextvars(experiment=assignment.experiment, shard=str(assignment.shard)):
            self._taken = time.monotonic()
            self._report("taken", assignment.experiment, self._seconds_since(sent))
            try:
                self._check_device()
                outcome = self._attempt(assignment)
                log.info("shard ended", outcome=outcome)
            except UnsupportedError as error:  # left to workers of another version or with another device
                outcome = UNSUPPORTED
                self._leave_to_others(assignment, error)
            except WorkerFaultError as error:
                log.error("worker at fault, shard handed back", error=str(error))
                outcome = self._at_fault(str(error))
            except StoreError as error:  # not the shard's fault: it is tried again when the store is back
                outcome = ShardOutcome.HANDED_BACK.value
                log.error("shard handed back", error=str(error))
            self._report("ended", assignment.experiment, outcome)
            return outcome

    def has_passed_on(self, assignment: Assignment) -> bool:
        """Return whether the message of an unsupported shard was passed on before; otherwise note it.

        True means that the process has seen the whole queue. It then looks at every experiment again, which may have changed.
        """
        passed_on = self._unsupported.setdefault(assignment.experiment, set())
        if assignment.shard in passed_on:
            self._unsupported.clear()
            return True
        passed_on.add(assignment.shard)
        return False

    def _leave_to_others(self, assignment: Assignment, error: UnsupportedError) -> None:
        """Give notice that workers of another version must train an experiment."""
        log.warning("experiment not supported", error=str(error))
        self._notice(assignment.experiment, f"workers of memtail {version('memtail')} do not train it: {error}")
        with suppress(StoreError):
            # after the notice: a worker that commits the last shard removes it
            if ExperimentStore(self._store, assignment.experiment).is_committed(assignment.shard):
                self._notice(assignment.experiment, None)

    def _notice(self, experiment: str, line: str | None) -> None:
        """Set or remove the workers' notice of an experiment, unless it is as it should be."""
        experiment_store, notice = ExperimentStore(self._store, experiment), Notice((line,)) if line else None
        with suppress(StoreError):
            if experiment_store.notices().get(_NOTICE) != notice:
                experiment_store.set_notice(_NOTICE, notice)

    def _check_device(self) -> None:
        """Check the device before the first shard, and again after each fault. Raises: WorkerFaultError."""
        if self._checked:
            return
        try:
            from memtail.trainers.images.devices import available_devices, check_unopened

            check_unopened(available_devices(self._device)[0])
        except (ImportError, OSError, SpecError) as error:
            raise WorkerFaultError(f"device {self._device} cannot be used: {error}") from error
        self._checked = True

    def _at_fault(self, reason: str) -> str:
        self._checked = False
        self._report("fault", reason[:_REASON])
        return ShardOutcome.WORKER_FAULT.value

    def _seconds_since(self, sent: Any) -> float | None:
        if not isinstance(sent, float):
            return None
        try:
            return max(0.0, self._broker.time() - sent)
        except redis.RedisError:
            return None

    def _attempt(self, assignment: Assignment) -> str:
        experiment_store = ExperimentStore(self._store, assignment.experiment)
        try:
            record = experiment_store.read_record()
        except ObjectNotFound:
            return NOT_WANTED
        record.check_trainable()
        known = record.fingerprint == assignment.fingerprint and record.has(assignment.shard)
        if not known or experiment_store.control().state != "running":
            return NOT_WANTED
        failures = list(experiment_store.failures(assignment.shard))
        if len(failures) >= MAX_ATTEMPTS:
            return NOT_WANTED
        if failures and self._is_for_another(failures):
            # else workers that wait for messages in turn get the same ones again and again, each those that are for the other
            time.sleep(random.uniform(0, _LEFT_SECONDS))  # noqa: S311
            return LEFT
        with Lease(self._broker, assignment, self._holder, self._lease_seconds, self._silence_seconds, experiment_store) as lease:
            if not lease.held:
                return LEASED
            result = run_shard(
                experiment_store,
                record,
                assignment.shard,
                self._device,
                lambda checkpoints: self._train(record, assignment.shard, checkpoints, lease),
            )
            if result.outcome is ShardOutcome.COMMITTED:
                self._notice(assignment.experiment, None)
            if result.replica and result.replica.differs:
                self._report("differs", assignment.experiment, result.replica.alike)
            if result.trials:
                self._report_training(assignment.experiment, result)
            if result.outcome is ShardOutcome.WORKER_FAULT:
                return self._at_fault(result.error or "")
            if result.outcome is ShardOutcome.STOPPED and lease.lost:
                return LEASED
            if result.outcome is ShardOutcome.STOPPED:
                return NOT_WANTED if lease.cancelled else ShardOutcome.HANDED_BACK.value
            return result.outcome.value

    def _is_for_another(self, failures: list[Failure]) -> bool:
        """Return whether a worker on a node where the shard has not failed should try it, or else one on such a host."""
        nodes, hosts = {failure.origin.node for failure in failures}, {failure.origin.host for failure in failures}
        with suppress(ValueError, TypeError):  # of a damaged record
            waited = datetime.now(UTC) - datetime.fromisoformat(failures[-1].when)
            if waited.total_seconds() > _MOST_LEASES_LEFT * self._lease_seconds:
                return False
        try:
            workers = self._broker.workers()
        except redis.RedisError:
            return False
        elsewhere = Settings().node in nodes and any(worker.node not in nodes for worker in workers)
        return elsewhere or (socket.gethostname() in hosts and any(worker.host not in hosts for worker in workers))

    def _train(self, record: Record, shard: Shard, checkpoints: StoredCheckpoints, lease: Lease) -> TrialBatch:
        from memtail.trainers.images.devices import available_devices, device_kind

        device = available_devices(self._device)[0]
        ExperimentStore(self._store, record.experiment.name).check_device(record, device_kind(device))

        def interrupted() -> bool:
            return self._stopping() or lease.cancelled or lease.lost

        try:
            experiment = fetch_inputs(record.experiment, record.canonical, self._store, Settings().cache)
            record, dataset = replace(record, experiment=experiment), self._dataset_of(record, interrupted)
        except (DatasetError, LocalFileError, OSError) as error:
            raise WorkerFaultError(f"the dataset cannot be opened: {error}") from error

        lease.progress()
        self._shard_trainer = self._shard_trainer or ShardTrainer(str(device))
        try:
            batch = self._shard_trainer.train(
                record,
                dataset,
                shard,
                checkpoints,
                code=code_folder(record),
                store=self._store.address,
                on_step=lease.progress,
                stop=interrupted,
                silence=self._silence_seconds,
            )
        finally:
            self.usable = self._shard_trainer.usable
            lease.trained()
        return batch

    def _report_training(self, experiment: str, result: ShardResult) -> None:
        committed = result.outcome is ShardOutcome.COMMITTED
        held = time.monotonic() - self._taken
        self._report("trained", experiment, result.trials, committed, result.examples, result.seconds, result.phases, held)

    def _dataset_of(self, record: Record, interrupted: Callable[[], bool]) -> Dataset:
        """The dataset; the last one stays open, so that its images stay on the device from shard to shard."""
        from memtail.trainers.images.images import release_images

        fingerprint = record.canonical["dataset"]["fingerprint"]
        if self._dataset is not None and self._dataset.fingerprint == fingerprint:
            note_use(self._dataset)
            return self._dataset
        # not in use any more, so that it can be evicted
        self._dataset = None
        release_images()

        def on_progress(*_: int) -> None:
            if interrupted():
                raise TrainingStopped

        settings = Settings()
        self._dataset = fetch(self._store, fingerprint, settings.cache, settings.cache_limit, on_progress)
        return self._dataset
