"""Folding and publishing. All state is made from the bucket; a new aggregator catches up and publishes the same bits."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from memtail.archive import ExperimentArchive, Notice, Record, experiment_names
from memtail.datasets import ImageDataset
from memtail.datasets.staging import fetch
from memtail.errors import ForeignObjectError, MemtailError
from memtail.scores.publish import publish
from memtail.settings import Settings
from memtail.statistics import Statistics
from memtail.stopping import next_round
from memtail.storage import ObjectStore
from memtail.trials import Shard
from services.settings import ServiceSettings

log = structlog.get_logger()

# Between two listings of an experiment's batches passes so many times what one takes.
_LISTING_SHARE = 5


@dataclass
class Folded:
    """One experiment as far as it is folded.

    Attributes:
        refused: the batches that are none, with the reason.
        published: trials, diverged ones included, in the scores that are published; and when that was, by the monotonic clock.
        list_at: when batches are to be listed again, by the same clock.
    """

    record: Record
    dataset: ImageDataset
    statistics: Statistics
    shards: set[Shard] = field(default_factory=set)
    refused: dict[Shard, str] = field(default_factory=dict)
    published: int = 0
    published_at: float = float("-inf")
    list_at: float = 0.0
    notice: Notice | None = None

    @property
    def trials(self) -> int:
        """Trials folded, diverged ones included."""
        return len(self.statistics.metrics)

    @property
    def complete(self) -> bool:
        """Whether all wanted trials are folded."""
        return self.trials >= self.record.experiment.subsets.trials


class Aggregator:
    """Folds and publishes all experiments of a bucket.

    Args:
        store: the bucket.
        settings: of the services.
    """

    def __init__(self, store: ObjectStore, settings: ServiceSettings) -> None:
        self._store, self._settings = store, settings
        self.experiments: dict[str, Folded] = {}

    def run(self, beat: Callable[[], None]) -> None:
        """Fold and publish for ever, and call `beat` after each pass; an outage of the bucket is waited out."""
        while True:
            began = time.monotonic()
            try:
                self.catch_up()
            except (MemtailError, OSError) as error:
                log.warning("pass given up", error=str(error))
            beat()
            time.sleep(max(0.0, began + self._settings.reconcile_seconds - time.monotonic()))

    def catch_up(self) -> None:
        """Fold what has arrived since the last call, and publish where it is time."""
        names = experiment_names(self._store)
        self.experiments = {name: folded for name, folded in self.experiments.items() if name in names}
        for name in names:
            try:
                self._catch_up(name)
            except MemtailError as error:
                log.error("experiment passed over", experiment=name, error=str(error))

    def _catch_up(self, name: str) -> None:
        archive = ExperimentArchive(self._store, name)
        record = archive.record()
        folded = self.experiments.get(name)
        if folded is None or folded.record.fingerprint != record.fingerprint:
            settings = Settings()
            dataset = fetch(self._store, record.canonical["dataset"]["fingerprint"], settings.cache, settings.cache_limit)
            folded = self.experiments[name] = Folded(record, dataset, Statistics(record.n_train, record.n_test))
        folded.record = record
        if time.monotonic() >= folded.list_at:
            began = time.monotonic()
            committed = archive.committed()
            # many batches take long to list, and then are listed more rarely
            folded.list_at = time.monotonic() + _LISTING_SHARE * (time.monotonic() - began)
            for shard in committed:
                if shard not in folded.shards:
                    self._fold(archive, folded, shard)
                    self._extend_or_publish(archive, folded)
        self._extend_or_publish(archive, folded)

    def _fold(self, archive: ExperimentArchive, folded: Folded, shard: Shard) -> None:
        try:
            folded.statistics.fold(archive.batch(shard, folded.record))
        except ForeignObjectError as error:
            self._refuse(archive, folded, shard, str(error))
        else:
            folded.refused.pop(shard, None)
            folded.shards.add(shard)

    def _refuse(self, archive: ExperimentArchive, folded: Folded, shard: Shard, reason: str) -> None:
        if folded.refused.get(shard) == reason:
            return
        log.error("trial batch refused", experiment=archive.name, shard=str(shard), reason=reason)
        if not any(failure.shard == shard and failure.error == reason for failure in archive.failures()):
            archive.record_failure(shard, reason)
        folded.refused[shard] = reason

    def _extend_or_publish(self, archive: ExperimentArchive, folded: Folded) -> None:
        # in this order: nobody is to take a round's scores for the end
        if folded.complete and (more := next_round(folded.record.experiment.subsets, folded.statistics)):
            folded.record = archive.extend(more)
            log.info("extended", experiment=archive.name, trials=more)
        if self._due(folded):
            self._publish(folded)
        self._give_notice(archive, folded)

    def _give_notice(self, archive: ExperimentArchive, folded: Folded) -> None:
        notice = None
        if folded.complete and folded.statistics.trials == 0:
            notice = Notice((f"all {folded.trials} trials diverged, so there are no scores: lower the learning rate",), final=True)
        if notice != folded.notice:
            archive.set_notice("aggregator", notice)
            folded.notice = notice

    def _due(self, folded: Folded) -> bool:
        """Whether to publish: at the end at once, before that after enough new trials or enough time."""
        new = folded.trials - folded.published
        if new == 0 or folded.statistics.trials == 0:
            return False
        waited = time.monotonic() - folded.published_at
        return folded.complete or new >= self._settings.publish_trials or waited >= self._settings.publish_seconds

    def _publish(self, folded: Folded) -> None:
        summary = publish(self._store, folded.record, folded.statistics, folded.dataset)
        folded.published, folded.published_at = folded.trials, time.monotonic()
        log.info("published", experiment=folded.record.experiment.name, trials=summary["trials"], complete=folded.complete)
