"""Leases of shards, so that no two workers train one shard at once."""

import contextvars
import threading
import uuid
from contextlib import suppress

import redis
import structlog

from memtail.errors import StoreError
from memtail.experiment_store import ExperimentStore
from services.common.broker import Assignment, Broker

log = structlog.get_logger()


class Lease:
    """A shard's lease, renewed by a thread while training. Without Redis the shard is trained without a lease.

    Each renewal also reads whether the experiment was cancelled.
    """

    def __init__(self, broker: Broker, assignment: Assignment, holder: str, seconds: float, experiment_store: ExperimentStore) -> None:
        self._broker, self._assignment, self._seconds, self._experiment_store = broker, assignment, seconds, experiment_store
        self._holder = f"{holder}/{uuid.uuid4().hex}"
        self._over = threading.Event()
        # so that its log lines name the shard
        self._thread = threading.Thread(target=contextvars.copy_context().run, args=(self._renew,), daemon=True)
        self.held = self.cancelled = False

    def __enter__(self) -> "Lease":
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
