"""Folding and publishing. All state is made from the bucket; a new aggregator catches up and publishes the same bits."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import structlog
from structlog.contextvars import bound_contextvars

from memtail.datasets import ImageDataset
from memtail.datasets.staged_dataset import fetch
from memtail.errors import ForeignObjectError, MemtailError
from memtail.execution.progress import progress_of
from memtail.execution.stopping import next_round
from memtail.experiment_store import ExperimentStore, Notice, Record, experiment_names
from memtail.report.publish import is_current, publish_report
from memtail.scores.pointer import latest_version
from memtail.scores.publish import publish
from memtail.settings import Settings
from memtail.statistics import Statistics
from memtail.storage import ObjectStore
from memtail.studies.names import parent_of
from memtail.trials import Shard
from services.aggregator.metric_updates import experiment_series, show_scores, show_statistics
from services.aggregator.metrics import FOLD_SECONDS, PUBLISH_SECONDS, REFUSED, REPORT_FAILURES, REPORT_SECONDS
from services.common.process import repeat
from services.common.settings import ServiceSettings

log = structlog.get_logger()

# Between two listings of an experiment's batches passes so many times what one takes.
_LISTING_SHARE = 5
# Between two versions of an experiment's scores, but before the last, passes so many times what it takes to publish one.
_PUBLISHING_SHARE = 9
# Between two looks at what the statistics say, which takes long for many examples, the same.
_SHOWING_SHARE = 20
# Between two drawings of a report, the same.
_DRAWING_SHARE = 50
# Seconds without a new trial after which it is looked whether an experiment has ended, and after which it is looked again.
_QUIET = 60.0


@dataclass
class Folded:
    """One experiment as far as it is folded.

    Attributes:
        refused: the batches that are none, with the reason.
        published: trials, diverged ones included, in the scores that are published; and when that was, by the monotonic clock.
        publish_at: from when on scores may be published again, by the same clock.
        list_at: when batches are to be listed again.
        pointer: to the published scores.
        shown: the trials folded and asked for that the metrics show; from `show_at` on they may show others.
        came: how many trials were folded when something last came, or its end was last looked for, and when that was.
        ended: what was found then.
        reported: the version of the scores that a report was last drawn of, or found to be.
        report_at: when it is to be looked again whether there is something to draw.
    """

    record: Record
    dataset: ImageDataset
    statistics: Statistics
    shards: set[Shard] = field(default_factory=set)
    refused: dict[Shard, str] = field(default_factory=dict)
    published: int = 0
    published_at: float = float("-inf")
    publish_at: float = float("-inf")
    list_at: float = 0.0
    notice: Notice | None = None
    pointer: dict[str, Any] | None = None
    shown: tuple[int, int] = (-1, 0)
    show_at: float = 0.0
    came: tuple[int, float] = (-1, 0.0)
    ended: bool = False
    reported: str | None = None
    report_at: float = field(default_factory=lambda: time.monotonic() + _QUIET)

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
        self._series = experiment_series(settings.linger_seconds)
        self.experiments: dict[str, Folded] = {}

    def run(self, beat: Callable[[], None]) -> None:
        """Fold and publish for ever, and call `beat` after each pass; an outage of the bucket is waited out."""
        repeat(self.catch_up, self._settings.reconcile_seconds, beat)

    def catch_up(self) -> None:
        """Fold what has arrived since the last call, and publish where it is time."""
        names = experiment_names(self._store)
        self.experiments = {name: folded for name, folded in self.experiments.items() if name in names}
        self._series.keep_only(names)
        for name in names:
            with bound_contextvars(experiment=name):
                try:
                    self._catch_up(name)
                except MemtailError as error:
                    log.error("experiment passed over", error=str(error))
        self._series.expire()

    def _catch_up(self, name: str) -> None:
        experiment_store = ExperimentStore(self._store, name)
        record = experiment_store.read_record()
        folded = self.experiments.get(name)
        if folded is None or folded.record.fingerprint != record.fingerprint:
            settings = Settings()
            dataset = fetch(self._store, record.canonical["dataset"]["fingerprint"], settings.cache, settings.cache_limit)
            folded = self.experiments[name] = Folded(record, dataset, Statistics(record.n_train, record.n_test))
            folded.pointer = latest_version(self._store, name)
        folded.record = record
        if time.monotonic() >= folded.list_at:
            began = time.monotonic()
            committed = experiment_store.committed()
            # many batches take long to list, and then are listed more rarely
            folded.list_at = time.monotonic() + _LISTING_SHARE * (time.monotonic() - began)
            for shard in committed:
                if shard not in folded.shards:
                    with FOLD_SECONDS.time():
                        self._fold(experiment_store, folded, shard)
                    self._extend_or_publish(experiment_store, folded)
                    self._show(folded)
        self._extend_or_publish(experiment_store, folded)
        self._show(folded)
        self._report(name, folded)

    def _fold(self, experiment_store: ExperimentStore, folded: Folded, shard: Shard) -> None:
        with bound_contextvars(shard=str(shard)):
            try:
                folded.statistics.accumulate(experiment_store.batch(shard, folded.record))
            except ForeignObjectError as error:
                self._refuse(experiment_store, folded, shard, str(error))
            else:
                folded.refused.pop(shard, None)
                folded.shards.add(shard)

    def _refuse(self, experiment_store: ExperimentStore, folded: Folded, shard: Shard, reason: str) -> None:
        if folded.refused.get(shard) == reason:
            return
        log.error("trial batch refused", reason=reason)
        if not any(failure.shard == shard and failure.error == reason for failure in experiment_store.failures()):
            experiment_store.record_failure(shard, reason)
        folded.refused[shard] = reason

    def _extend_or_publish(self, experiment_store: ExperimentStore, folded: Folded) -> None:
        # in this order: nobody is to take a round's scores for the end
        if folded.complete and (more := next_round(folded.record.experiment.subsets, folded.statistics)):
            folded.record = experiment_store.extend(more)
            log.info("extended", trials=more)
        if self._due(folded):
            self._publish(folded)
        self._give_notice(experiment_store, folded)

    def _give_notice(self, experiment_store: ExperimentStore, folded: Folded) -> None:
        notice = None
        if folded.complete and folded.statistics.trials == 0:
            notice = Notice((f"all {folded.trials} trials diverged, so there are no scores: lower the learning rate",), final=True)
        if notice != folded.notice:
            experiment_store.set_notice("aggregator", notice)
            folded.notice = notice

    def _due(self, folded: Folded) -> bool:
        """Whether to publish: at the end at once, before that after enough new trials or enough time, and not all the time."""
        new = folded.trials - folded.published
        if new == 0 or folded.statistics.trials == 0:
            return False
        if folded.complete:
            return True
        now = time.monotonic()
        enough = new >= self._settings.publish_trials or now - folded.published_at >= self._settings.publish_seconds
        return enough and now >= folded.publish_at

    def _publish(self, folded: Folded) -> None:
        began = time.monotonic()
        with PUBLISH_SECONDS.time():
            summary = publish(self._store, folded.record, folded.statistics, folded.dataset)
        folded.published, folded.published_at = folded.trials, time.monotonic()
        folded.publish_at = folded.published_at + _PUBLISHING_SHARE * (folded.published_at - began)
        folded.pointer = latest_version(self._store, folded.record.experiment.name)
        log.info("published", trials=summary["trials"], complete=folded.complete)

    def _report(self, name: str, folded: Folded) -> None:
        """Draw what is published: at the end at once, before that rarely, and after that when a study has come."""
        if folded.pointer is None or parent_of(name) in self.experiments:  # its models answer a study, which has a figure of its own
            return
        version = folded.pointer["version"]
        last = folded.complete and folded.published == folded.trials and version != folded.reported
        if not last and time.monotonic() < folded.report_at:
            return
        began = time.monotonic()
        try:
            if not is_current(self._store, name):
                with REPORT_SECONDS.time():
                    publish_report(self._store, name)
                log.info("report drawn", scores=version)
        except Exception as error:  # whatever drawing raises, folding goes on
            REPORT_FAILURES.inc()
            log.exception("report could not be drawn", error=str(error))
        folded.reported = version
        folded.report_at = time.monotonic() + max(_QUIET, _DRAWING_SHARE * (time.monotonic() - began))

    def _show(self, folded: Folded) -> None:
        name = folded.record.experiment.name
        self._series.update(name, self._has_ended(folded))
        if name not in self._series.shown:
            folded.shown = (-1, 0)
            return
        show_scores(name, folded.pointer)
        REFUSED.labels(name).set(len(folded.refused))
        state = folded.trials, folded.record.experiment.subsets.trials
        if state != folded.shown and (began := time.monotonic()) >= folded.show_at:
            show_statistics(name, folded.record.experiment.subsets, folded.statistics)
            folded.shown, folded.show_at = state, time.monotonic() + _SHOWING_SHARE * (time.monotonic() - began)

    def _has_ended(self, folded: Folded) -> bool:
        """Whether nothing is to come: looked for in the bucket only where nothing has come for a while."""
        if folded.complete:
            return folded.published == folded.trials or folded.statistics.trials == 0
        now = time.monotonic()
        if folded.trials != folded.came[0]:
            folded.came, folded.ended = (folded.trials, now), False
        elif now - folded.came[1] >= _QUIET:
            folded.came = folded.trials, now
            folded.ended = progress_of(self._store, folded.record.experiment.name).ending is not None
        return folded.ended
