"""Aggregation of one experiment: accumulate new trial batches, decide the next step, extend, publish.

The embedded run and the aggregator of the services use the same class. All its state is made from the store: a new aggregation catches
up and publishes the same bits. It begins with a snapshot of the statistics, if there is one whose batches are all still in the store.
"""

import tempfile
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import Enum, auto
from functools import partial
from pathlib import Path

import structlog
from structlog.contextvars import bound_contextvars

from memtail.datasets import DatasetLabels
from memtail.errors import ForeignObjectError
from memtail.execution.stopping import next_round
from memtail.execution.throttle import Throttle
from memtail.experiment_store import MAX_ATTEMPTS, ExperimentStore, Finished, Record
from memtail.experiment_store.finished import bounds
from memtail.scores.pointer import ScorePointer, latest_version
from memtail.scores.publish import publish, score_version
from memtail.scores.summary import SCHEMA, ScoreSummary
from memtail.spec import SubsetsSpec
from memtail.statistics import Statistics
from memtail.statistics.snapshot import Snapshot
from memtail.storage import ObjectNotFound, keys
from memtail.trials import Shard, TrialBatch

log = structlog.get_logger()

# Publishing takes a tenth of the time at most; only the last version of the scores does not wait.
_PUBLISHING_REST = 9
# Snapshots take a twentieth of the time at most, and are not worth a lower number of batches that a restart need not read.
_SNAPSHOT_REST, _SNAPSHOT_BATCHES = 19, 64
# Number of batches that are read at the same time, and held in memory: a bucket answers each request after some 20 ms.
_READERS = 8


@dataclass(frozen=True)
class Pace:
    """Pace of publishing before all trials are accumulated.

    Attributes:
        trials: publish after this number of new trials,
        seconds: or after this time with at least one new trial.
        first_at_once: whether the first trials are published without waiting for either.
    """

    trials: float
    seconds: float
    first_at_once: bool


@dataclass(frozen=True)
class Extend:
    """The scores are not yet as exact as the experiment asks for: train up to `trials` trials."""

    trials: int


class Step(Enum):
    """Next step of an aggregation, where it is not `Extend`."""

    PUBLISH = auto()
    #: Nothing to publish yet.
    WAIT = auto()
    #: All trials are in the published scores, or all diverged, so that there are none.
    DONE = auto()


class Aggregation:
    """Accumulates and publishes one experiment.

    Args:
        experiment_store: the experiment's objects.
        record: the experiment's record.
        dataset: labels and names of its dataset.
        pace: the pace of publishing.
        clock: seconds of a monotonic clock.
        progress: called after each piece of work while scores are published.

    Attributes:
        record: the record; the caller may replace it by a newer one of the same fingerprint.
        statistics: statistics of all accumulated trials.
        refused: reasons by shard, of the batches that cannot be counted.
        pointer: pointer to the published scores, None if there are none.
    """

    def __init__(
        self,
        experiment_store: ExperimentStore,
        record: Record,
        dataset: DatasetLabels,
        pace: Pace,
        clock: Callable[[], float] = time.monotonic,
        progress: Callable[[], object] = lambda: None,
    ) -> None:
        self.record, self.dataset = record, dataset
        self.statistics = self._no_trials()
        self.refused: dict[Shard, str] = {}
        self._store, self._pace, self._clock, self._progress = experiment_store, pace, clock, progress
        self._tags: dict[Shard, str] = {}  # of the batches in the last listing
        self._discards = 0  # number of records of discards before that listing: a later one makes what counts the batch invalid
        self._accumulated: dict[Shard, str] = {}  # tags of the accumulated batches
        self._refused_tags: dict[Shard, str | None] = {}
        self._decision: tuple[tuple[int, SubsetsSpec, int], int | None] | None = None  # of `_next_round`
        self._in_snapshot: int | None = None  # number of batches in the snapshot; None until it was looked for
        self._saving = Throttle(_SNAPSHOT_REST, clock=clock)
        self._published = self._published_discards = 0
        self._published_at = float("-inf") if pace.first_at_once else clock()
        self._publishing, self._has_published = Throttle(_PUBLISHING_REST, clock=clock), False
        self.pointer: ScorePointer | None = latest_version(experiment_store.store, experiment_store.name)

    @property
    def trials(self) -> int:
        """Number of accumulated trials, diverged ones included."""
        return len(self.statistics.metrics)

    @property
    def total(self) -> int:
        """Number of trials the experiment asks for."""
        return self.record.experiment.subsets.trials

    @property
    def complete(self) -> bool:
        """Whether all trials are accumulated."""
        return self.trials >= self.total

    @property
    def published(self) -> bool:
        """Whether all accumulated trials are in the published scores, which know of all discards."""
        return (self._published, self._published_discards) == (self.trials, self._discards)

    def new_shards(self) -> list[Shard]:
        """List the committed shards whose batches are neither accumulated nor refused.

        Shards beyond the recorded number of trials are left out: another process has extended the experiment, and `record` is not the
        latest.

        The first call restores the snapshot. If an accumulated batch was replaced or removed, the statistics start over, since a trial
        cannot be taken out of them.

        Raises:
            StoreError: the store cannot be read.
        """
        # read before the listing, which then holds every batch of the snapshot that was not removed
        snapshot = self._snapshot() if self._in_snapshot is None and not self._accumulated else None
        discards = self._store.discards()
        self._tags = self._store.committed_tags()
        if snapshot is not None:
            self.statistics, self._accumulated = snapshot.statistics, dict(snapshot.batches)
            log.info("snapshot restored", trials=self.trials)
        if self._in_snapshot is None:
            self._in_snapshot = len(self._accumulated)
        changed = [shard for shard, tag in self._accumulated.items() if self._tags.get(shard) != tag]
        if changed:
            log.warning("trial batches changed, starting over", first=str(changed[0]), changed=len(changed))
            self._start_over()
        self._discards = discards  # of which no accumulated batch is
        for shard in [shard for shard, tag in self._refused_tags.items() if self._tags.get(shard) != tag]:
            del self._refused_tags[shard]
            self.refused.pop(shard, None)
        known = self._accumulated.keys() | self._refused_tags.keys()
        return [shard for shard in self._tags if shard not in known and shard.last < self.total]

    def accumulate(self, shard: Shard) -> bool:
        """Accumulate a committed shard, each of its trials once.

        A damaged or foreign batch is refused: the reason is kept, and recorded once as a failure of the shard.

        Returns:
            Whether the batch was accepted.

        Raises:
            ObjectNotFound: the shard is not committed.
            StoreError: the store cannot be read.
        """
        return self._accumulate(shard, partial(self._store.tagged_batch, shard, self.record))

    def accumulate_each(self, shards: Sequence[Shard]) -> Generator[Shard, None, None]:
        """Accumulate listed shards in order, and yield each when it is accumulated, refused, or has no batch any more.

        A few batches are read ahead at the same time. Close the generator to stop early.

        Raises:
            StoreError: the store cannot be read.
        """
        ahead: deque[tuple[Shard, Future[tuple[TrialBatch, str]]]] = deque()
        with ThreadPoolExecutor(_READERS) as readers:
            for number in range(len(shards) + _READERS):
                if number < len(shards):
                    ahead.append((shards[number], readers.submit(self._store.tagged_batch, shards[number], self.record)))
                if number >= _READERS and ahead:
                    shard, batch = ahead.popleft()
                    with suppress(ObjectNotFound):  # removed since it was listed
                        self._accumulate(shard, batch.result)
                    yield shard

    def accumulate_new(self) -> None:
        """Accumulate everything the store holds and this aggregation does not. Raises: StoreError."""
        for _ in self.accumulate_each(self.new_shards()):
            pass

    def save_snapshot(self) -> None:
        """Save the statistics, if that is due, so that a new aggregation need not read the batches again.

        Raises:
            StoreError: the store cannot be written.
        """
        if len(self._accumulated) - (self._in_snapshot or 0) < _SNAPSHOT_BATCHES or not self._saving.due:
            return
        with self._saving.working(), tempfile.TemporaryDirectory(prefix="memtail-") as temporary:
            path = Path(temporary, "snapshot.npz")
            Snapshot(self.record.fingerprint, self.statistics, self._accumulated).write(path)
            self._store.store.upload(keys.snapshot(self._store.name), path)
        self._in_snapshot = len(self._accumulated)

    def next_step(self) -> Extend | Step:
        """Decide the next step. The last version of the scores is published immediately, earlier ones at the pace.

        An extension comes first, so that the scores of a round are never taken for the final ones.
        """
        if self.complete and (trials := self._next_round()):
            return Extend(trials)
        if self.published or not self.statistics.trials:
            return Step.DONE if self.complete else Step.WAIT
        if self.complete:
            return Step.PUBLISH
        new, waited = self.trials - self._published, self._clock() - self._published_at
        enough = new >= self._pace.trials or waited >= self._pace.seconds
        return Step.PUBLISH if enough and self._publishing.due else Step.WAIT

    def extend(self, trials: int) -> None:
        """Ask for more trials. Raises: StoreError."""
        self.record = self._store.extend(trials)
        log.info("subsets.until is not reached yet: next round", experiment=self._store.name, trials=trials)

    def publish(self) -> ScoreSummary:
        """Publish the scores of all accumulated trials; returns their summary.

        Raises:
            ScoresError: no trial can be counted.
            StoreError: the store cannot be written.
        """
        # the first publication does not count: it compiles code
        with self._publishing.working() if self._has_published else nullcontext():
            summary = publish(self._store.store, self.record, self.statistics, self.dataset, self._discards, self._progress)
        self._has_published = True
        self._published, self._published_discards, self._published_at = self.trials, self._discards, self._clock()
        self.pointer = latest_version(self._store.store, self._store.name)
        return summary

    def finish(self) -> Finished | None:
        """Record that the experiment is finished, after which a trial batch that is removed changes nothing.

        It is finished when the published scores count all trials of the batches in the store, no shard is left to be verified, and its
        owner has not cancelled it.

        Returns:
            The record of the end; None if the experiment is not finished, or was changed meanwhile.

        Raises:
            StoreError: the store cannot be read or written.
        """
        if self.next_step() is not Step.DONE or not self.statistics.trials or self._store.control().state == "cancelled":
            return None
        if self.new_shards() or not self.complete or self._is_unverified():
            return None
        pointer = self.pointer = latest_version(self._store.store, self._store.name)
        if pointer is None or pointer.version != score_version(self.record.fingerprint, self.statistics):
            return None
        digest, when = self.statistics.digest(), datetime.now(UTC).isoformat(timespec="seconds")
        batches = {shard.span: tag for shard, tag in self._accumulated.items()}
        experiment = self.record.experiment
        finished = Finished(
            self.record.fingerprint,
            self.trials,
            digest,
            pointer.version,
            SCHEMA,
            self._discards,
            when,
            batches,
            experiment.execution.verify,
            bounds(experiment),
        )
        held = self._store.finished(self.record)
        if held is None or replace(held, when=when) != finished:
            self._store.set_finished(finished)
        self._store.store.delete(keys.change(self._store.name))
        if self._store.finished(self._store.read_record()) is None or self._store.control().state == "cancelled":
            self._store.reopen("it was changed while its end was recorded")
            return None
        return finished

    def _next_round(self) -> int | None:
        """As `next_round`, decided once for the same trials: it may take seconds, and is asked for several times at the end of a round."""
        question = (self.trials, self.record.experiment.subsets, self.record.most_trials)
        if self._decision is None or self._decision[0] != question:
            subsets, labels = self.record.experiment.subsets, (self.dataset.train_labels, self.dataset.test_labels)
            self._decision = question, next_round(subsets, self.statistics, self.record.most_trials, labels, self._progress)
        return self._decision[1]

    def _is_unverified(self) -> bool:
        unverified = self._store.unverified(self.record, list(self._accumulated))
        attempts = self._store.attempts() if unverified else {}
        return any(attempts[shard] < MAX_ATTEMPTS for shard in unverified)

    def _accumulate(self, shard: Shard, read: Callable[[], tuple[TrialBatch, str]]) -> bool:
        try:
            batch, tag = read()
        except ForeignObjectError as error:
            self._refuse(shard, str(error))
            return False
        try:
            self.statistics.accumulate(batch)
        except Exception:  # the batch may be counted in part
            self._start_over()
            raise
        self.refused.pop(shard, None)
        self._accumulated[shard] = tag
        return True

    def _no_trials(self) -> Statistics:
        return Statistics(self.record.n_train, self.record.n_test, scores_only=self.record.experiment.record.scores_only)

    def _start_over(self) -> None:
        self.statistics = self._no_trials()
        self._accumulated, self._published, self._in_snapshot, self._decision = {}, 0, 0, None

    def _snapshot(self) -> Snapshot | None:
        """Read the snapshot; None if there is none, or it is of no use, so that the next one replaces it."""
        key = keys.snapshot(self._store.name)
        with tempfile.TemporaryDirectory(prefix="memtail-") as temporary:
            path = Path(temporary, "snapshot.npz")
            try:
                self._store.store.download(key, path)
                snapshot = Snapshot.read(path, self.record.n_train, self.record.n_test)
            except ObjectNotFound:
                return None
            except ForeignObjectError as error:
                log.warning("snapshot ignored", key=key, reason=str(error))
                return None
        if snapshot.fingerprint != self.record.fingerprint:
            log.warning("snapshot ignored", key=key, reason="it is of another experiment")
            return None
        return snapshot

    def _refuse(self, shard: Shard, reason: str) -> None:
        self._refused_tags[shard] = self._tags.get(shard)
        if self.refused.get(shard) == reason:
            return
        with bound_contextvars(shard=str(shard)):
            log.error("trial batch refused", reason=reason)
        if not any(failure.error == reason for failure in self._store.failures(shard)):
            self._store.record_failure(shard, reason)
        self.refused[shard] = reason
