"""Leases of shards, so that no two workers train one shard at once."""

import contextvars
import os
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress

import redis
import structlog

from memtail.errors import StoreError
from memtail.experiment_store import ExperimentStore
from memtail.trainers.silence import Silence
from services.common.broker import Assignment, Broker

log = structlog.get_logger()

#: Exit code of a training process that hung.
HUNG = 4


class Lease:
    """A shard's lease, renewed by a thread while training advances. Without Redis the shard is trained without a lease.

    Another thread reads whether the experiment was cancelled, since a store that does not respond must not let the lease lapse.

    Args:
        broker: holds the leases.
        assignment: names the shard.
        holder: name of the process.
        seconds: duration of the lease; it is renewed three times as often.
        silence: seconds without progress after which training counts as hung, and the process ends.
        experiment_store: the experiment's objects.

    Attributes:
        held: whether the shard may be trained.
        lost: whether another worker has taken the lease since.
        cancelled: whether the experiment was cancelled or removed.
    """

    def __init__(
        self, broker: Broker, assignment: Assignment, holder: str, seconds: float, silence: float, experiment_store: ExperimentStore
    ) -> None:
        self._broker, self._assignment, self._experiment_store = broker, assignment, experiment_store
        self._seconds, self._silence = seconds, Silence(silence)
        self._holder = f"{holder}/{uuid.uuid4().hex}"
        self._over = threading.Event()
        self._threads = [self._thread(self._renew), self._thread(self._watch)]
        self.held = self.lost = self.cancelled = False

    def __enter__(self) -> "Lease":
        try:
            self.held = self._broker.acquire(self._assignment, self._holder)
        except redis.RedisError as error:
            log.warning("training without a lease", error=str(error))
            self.held = True
        if self.held:
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self.held:
            self._threads[0].join()  # the other may wait for the store
            with suppress(redis.RedisError):
                self._broker.release(self._assignment, self._holder)

    def progress(self) -> None:
        """Report that training advances; from the first call on, silence counts as a hang."""
        self._silence.progress()

    def trained(self) -> None:
        """Report that training has ended, so that silence is no hang any more."""
        self._silence.end()

    def _thread(self, target: Callable[[], None]) -> threading.Thread:
        # the context makes its log lines name the shard
        return threading.Thread(target=contextvars.copy_context().run, args=(target,), daemon=True)

    def _renew(self) -> None:
        while not self._over.wait(self._seconds / 3):
            self._end_if_hung()
            with suppress(redis.RedisError):
                if not self._broker.renew(self._assignment, self._holder):
                    self.lost = True
                    log.warning("lease lost to another worker")
                    return

    def _end_if_hung(self) -> None:
        if (seconds := self._silence.hung()) is not None:
            log.error("training hangs, ending the process", seconds=round(seconds))
            os._exit(HUNG)

    def _watch(self) -> None:
        while not self._over.wait(self._seconds / 3):
            with suppress(StoreError):
                removed = not self._experiment_store.is_registered()
                self.cancelled = removed or self._experiment_store.control().state == "cancelled"
