"""The Celery worker: passes assignments to a `Trainer` in one process per device, and handles the death of a process.

The parent process never imports torch, because a CUDA context does not survive a fork. SIGTERM reaches only the parent, which then sets a
flag in shared memory that training processes check between steps. The parent also serves metrics and health checks; its threads do not log,
because a fork could copy a held lock of the logger.
"""

import logging
import socket
import time
import uuid
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import redis
import structlog
from billiard import Value, current_process
from celery import signals
from celery.apps.worker import Worker as CeleryWorker
from celery.apps.worker import install_worker_term_handler
from celery.exceptions import Reject
from celery.utils.log import get_multiprocessing_logger
from celery.worker import state
from pydantic import ValidationError

from memtail.errors import MemtailError
from memtail.execution.shard_task import ShardOutcome, this_process
from memtail.experiment_store import ExperimentStore
from memtail.processes import hide, keep_memory
from memtail.storage import ObjectStore
from memtail.storage.identity import read_identity
from services.common.broker import SENT_HEADER, TASK, Assignment, Broker, celery_app
from services.common.process import Heartbeat, open_when_allowed, serve
from services.common.settings import ServiceSettings
from services.common.surplus import Surplus
from services.tools.healthcheck import HEARTBEAT_TIMEOUT
from services.worker.heartbeat import ConsumerHeartbeat
from services.worker.last_resort import end_without_broker
from services.worker.metric_updates import DIED, WorkerMetrics
from services.worker.reports import Reports
from services.worker.trainer import UNSUPPORTED, Trainer
from services.worker.transport import register
from services.worker.visible_gpus import show_only
from services.worker.watchdog import Watchdog

log = structlog.get_logger()

#: Exit code of a worker that ended because it was at fault twice in a row.
WORKER_AT_FAULT = 3

# Outcomes after which the message returns to the queue.
_RETURNED = (ShardOutcome.HANDED_BACK.value, ShardOutcome.WORKER_FAULT.value, UNSUPPORTED)
# Pause before it does, as a share of the lease: shorter than the time after which the dispatcher would send the shard again.
_PAUSE_SHARE = 0.125
# Seconds between two looks for the identity of a new store.
_IDENTITY_SECONDS = 2.0


class Worker:
    """A Celery worker and its training processes.

    Args:
        settings: of the services.
        devices: device of each process.
    """

    def __init__(self, settings: ServiceSettings, devices: list[str]) -> None:
        self._devices = devices
        self._name = f"{socket.gethostname()}/{uuid.uuid4().hex[:8]}"
        self._stopping, self._leaving = Value("b", 0), Value("b", 0)
        self._reports = Reports()
        self._health = Heartbeat(HEARTBEAT_TIMEOUT)
        self._store: ObjectStore = open_when_allowed(settings.store, partial(self._reports.send, "store"))
        self._settings = settings = replace(settings, store=self._store.address, identity=_identity(self._store))
        self._metrics = WorkerMetrics(devices, settings.linger_seconds, self._health, self._end_at_fault)
        self._trainer: Trainer  # in training processes only
        self._last_lost = ""  # id of the last Celery task whose process died
        register()
        self.celery = celery_app(settings)
        self.celery.task(name=TASK)(self._run)
        broker = Broker(settings, self.celery)
        self._surplus = Surplus(broker, settings.lease_seconds)
        watchdog = Watchdog(broker, settings.lease_seconds / 6, settings.rest_seconds, self._is_surplus)
        self.celery.steps["consumer"].add(watchdog.step())
        self.celery.steps["consumer"].add(ConsumerHeartbeat(self._send_heartbeat).step())
        # by default signals hold only weak references
        signals.setup_logging.connect(_keep_logs, weak=False)
        signals.worker_process_init.connect(self._start_process, weak=False)
        signals.worker_shutting_down.connect(self._stop, weak=False)
        signals.task_failure.connect(self._record_loss, weak=False)
        signals.task_unknown.connect(self._count_unknown, weak=False)

    def run(self) -> int:
        """Train assignments until the worker is stopped.

        Returns:
            The exit code.

        Raises:
            ServiceError: the port of the metrics is unavailable.
        """
        hide()  # the training processes, which are forked from this one, too
        serve(self._settings.port, self._health)
        self._metrics.follow(self._reports, self._leave)
        disabled = {"without_gossip": True, "without_mingle": True, "without_heartbeat": True}
        program = _Program(app=self.celery, pool_cls="prefork", concurrency=len(self._devices), quiet=True, **disabled)
        program.start()
        return int(program.exitcode or 0)

    def _start_process(self, **_: Any) -> None:
        keep_memory()
        device = self._devices[current_process().index % len(self._devices)]
        if device.startswith("cuda:"):
            show_only(int(device.removeprefix("cuda:")))
            device = "cuda"
        broker = Broker(self._settings, self.celery)
        self._surplus = Surplus(broker, self._settings.lease_seconds)
        settings, stopping = self._settings, lambda: bool(self._stopping.value)
        self._trainer = Trainer(
            self._store, broker, self._name, device, settings.lease_seconds, settings.silence_seconds, stopping, self._reports.send
        )

    def _run(self, **fields: Any) -> None:
        try:
            assignment = Assignment.model_validate(fields)
        except ValidationError as error:
            self._reports.send("dropped")
            log.warning("message dropped: not an assignment", errors=error.error_count())
            return
        if not self._stopping.value and self._is_surplus():
            self._reports.send("leaving")
            raise Reject("leaving", requeue=True)
        sent = (self.celery.current_task.request.headers or {}).get(SENT_HEADER)
        outcome = ShardOutcome.HANDED_BACK.value if self._stopping.value else self._trainer.train(assignment, sent)
        # behind the message of an unsupported experiment there may be others, so only one that comes round again makes a pause
        if outcome in _RETURNED and (outcome != UNSUPPORTED or self._trainer.has_passed_on(assignment)):
            # another worker should receive the message first
            until = time.monotonic() + _PAUSE_SHARE * self._settings.lease_seconds
            while not self._stopping.value and time.monotonic() < until:
                time.sleep(0.1)
        if not self._trainer.usable:
            raise SystemExit  # the pool replaces the process, and the dispatcher sends the shard again
        if outcome in _RETURNED:
            raise Reject(outcome, requeue=True)

    def _is_surplus(self) -> bool:
        """Return whether the worker takes no further shards, because another experiment is below its share of workers."""
        if not self._leaving.value and self._settings.experiment:
            with suppress(redis.RedisError):
                self._leaving.value = self._surplus.leave(self._settings.experiment, socket.gethostname())
        return bool(self._leaving.value)

    def _leave(self) -> None:
        """End the worker when its other processes have finished their shards."""
        state.should_stop = 0

    def _send_heartbeat(self) -> None:
        self._health.record()
        if self._settings.heartbeat_file:
            Path(self._settings.heartbeat_file).touch()

    def _end_at_fault(self) -> None:
        """End the worker, whose other processes hand their shards back with their checkpoints."""
        self._stopping.value = 1
        state.should_stop = WORKER_AT_FAULT

    def _stop(self, **_: Any) -> None:
        self._stopping.value = 1
        end_without_broker(Broker(self._settings, self.celery))

    def _count_unknown(self, **_: Any) -> None:
        self._reports.send("dropped")

    def _record_loss(self, task_id: str, exception: BaseException, kwargs: Any, **_: Any) -> None:
        """Record a failure for a training process that died or was killed at its time limit; runs in the parent."""
        if isinstance(exception, (Reject, SystemExit)) or task_id == self._last_lost:  # Celery reports a time limit twice
            return
        self._last_lost = task_id
        try:
            assignment = Assignment.model_validate(kwargs)
            self._reports.send("ended", assignment.experiment, DIED)
            error = f"the training process died ({exception}): killed, out of memory, or a crash in native code"
            ExperimentStore(self._store, assignment.experiment).record_failure(
                assignment.shard, error, origin=this_process(",".join(self._devices))
            )
            with suppress(redis.RedisError):
                Broker(self._settings, self.celery).release(assignment, self._name)
            log.error("training process died", experiment=assignment.experiment, shard=str(assignment.shard), error=str(exception))
        except (ValidationError, MemtailError) as problem:
            log.error("training process died, and the failure could not be recorded", error=str(problem))


class _Program(CeleryWorker):  # type: ignore[misc]
    """Celery's worker without its shutdown message on standard output."""

    def install_platform_tweaks(self, worker: Any) -> None:
        super().install_platform_tweaks(worker)
        install_worker_term_handler(worker, verbose=False)


def _identity(store: ObjectStore) -> bytes:
    """Return the identity of the store, which the dispatcher makes; a worker may not."""
    while (identity := read_identity(store)) is None:
        log.warning("waiting for the dispatcher, which has not used this store yet", store=store.address)
        time.sleep(_IDENTITY_SECONDS)
    return identity


def _keep_logs(**_: Any) -> None:
    """Keep the service's logging: Celery configures none if this signal has a receiver. Its pool then logs to the same handlers."""
    get_multiprocessing_logger().propagate = True
    logging.getLogger("celery.app.trace").addFilter(_is_no_rejection)


def _is_no_rejection(record: logging.LogRecord) -> bool:
    """Drop Celery's traceback of a message handed back; the reason is logged in one line."""
    return not (record.exc_info and isinstance(record.exc_info[1], Reject))
