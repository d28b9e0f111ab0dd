"""The aggregator: an `Aggregation`, metrics and a report for each experiment of a bucket.

All state is made from the bucket; a new aggregator catches up and publishes the same bits.
"""

import time
from collections.abc import Callable

import structlog
from structlog.contextvars import bound_contextvars

from memtail.datasets.staged_dataset import fetch
from memtail.errors import MemtailError
from memtail.execution.aggregation import Aggregation, Extend, Pace, Step
from memtail.execution.progress import progress_of
from memtail.execution.throttle import Throttle
from memtail.experiment_store import ExperimentStore, Notice, Record, experiment_names
from memtail.report.publish import is_current, publish_report
from memtail.settings import Settings
from memtail.storage import ObjectStore
from memtail.studies.experiment_names import parent_of
from services.aggregator.metric_updates import experiment_series, update_scores, update_statistics
from services.aggregator.metrics import ACCUMULATE_SECONDS, PUBLISH_SECONDS, REFUSED, REPORT_FAILURES, REPORT_SECONDS
from services.common.process import repeat
from services.common.settings import ServiceSettings

log = structlog.get_logger()

# Pauses as multiples of a duration: after listing an experiment's batches, computing its metrics, drawing its report.
_LISTING_REST, _METRICS_REST, _REPORT_REST = 5, 20, 50
# Seconds without a new trial before the aggregator checks whether an experiment has ended, and between two such checks; also between two
# checks for something to draw.
_QUIET = 60.0


class _Experiment:
    """One experiment of the bucket.

    Attributes:
        aggregation: its accumulated trials and published scores.
        notice: the notice it has from the aggregator.
        reported: version of the scores that the last report was drawn of, or was up to date with.
        shown: the numbers of accumulated and of all trials in the metrics.
    """

    def __init__(self, experiment_store: ExperimentStore, aggregation: Aggregation) -> None:
        self.store, self.aggregation = experiment_store, aggregation
        self.notice: Notice | None = None
        self.reported: str | None = None
        self.shown = (-1, 0)
        self.listing, self.metrics = Throttle(_LISTING_REST), Throttle(_METRICS_REST)
        self.report = Throttle(_REPORT_REST, at_least=_QUIET, first=_QUIET)
        self._progressed = (-1, 0.0)  # number of trials, and the time of its last change or of the last check for the end
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether no trial is to come. The bucket is asked only after a while without a new trial."""
        aggregation = self.aggregation
        if aggregation.complete:
            return aggregation.published or not aggregation.statistics.trials
        now = time.monotonic()
        if aggregation.trials != self._progressed[0]:
            self._progressed, self._ended = (aggregation.trials, now), False
        elif now - self._progressed[1] >= _QUIET:
            self._progressed = aggregation.trials, now
            self._ended = progress_of(self.store.store, self.store.name).ending is not None
        return self._ended


class Aggregator:
    """Accumulates and publishes all experiments of a bucket.

    Args:
        store: the bucket.
        settings: settings of the services.
    """

    def __init__(self, store: ObjectStore, settings: ServiceSettings) -> None:
        self._store, self._settings = store, settings
        self._pace = Pace(settings.publish_trials, settings.publish_seconds, first_at_once=True)
        self._series = experiment_series(settings.linger_seconds)
        self._experiments: dict[str, _Experiment] = {}

    def run(self, heartbeat: Callable[[], None]) -> None:
        """Accumulate and publish forever, and call `heartbeat` after each pass. An outage of the bucket only ends the pass."""
        repeat(self.catch_up, self._settings.reconcile_seconds, heartbeat)

    def catch_up(self) -> None:
        """Accumulate what has arrived since the last call, and publish where it is due."""
        names = experiment_names(self._store)
        self._experiments = {name: experiment for name, experiment in self._experiments.items() if name in names}
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
        experiment = self._experiments.get(name)
        if experiment is None or experiment.aggregation.record.fingerprint != record.fingerprint:
            experiment = self._experiments[name] = self._opened(experiment_store, record)
        aggregation = experiment.aggregation
        aggregation.record = record
        if experiment.listing.due:
            with experiment.listing.working():  # the longer a listing takes, the more rarely it is repeated
                shards = aggregation.new_shards()
            for shard in shards:
                with ACCUMULATE_SECONDS.time():
                    aggregation.accumulate(shard)
                self._advance(experiment)
        self._advance(experiment)
        self._report(experiment)

    def _opened(self, experiment_store: ExperimentStore, record: Record) -> _Experiment:
        settings = Settings()
        dataset = fetch(self._store, record.canonical["dataset"]["fingerprint"], settings.cache, settings.cache_limit)
        return _Experiment(experiment_store, Aggregation(experiment_store, record, dataset, self._pace))

    def _advance(self, experiment: _Experiment) -> None:
        aggregation = experiment.aggregation
        step = aggregation.next_step()
        if isinstance(step, Extend):
            aggregation.extend(step.trials)
            step = aggregation.next_step()
        if step is Step.PUBLISH:
            with PUBLISH_SECONDS.time():
                summary = aggregation.publish()
            log.info("published", trials=summary.trials, complete=aggregation.complete)
        self._give_notice(experiment)
        self._update_metrics(experiment)

    def _give_notice(self, experiment: _Experiment) -> None:
        aggregation, notice = experiment.aggregation, None
        if aggregation.complete and not aggregation.statistics.trials:
            notice = Notice((f"all {aggregation.trials} trials diverged, so there are no scores: lower the learning rate",), final=True)
        if notice != experiment.notice:
            experiment.store.set_notice("aggregator", notice)
            experiment.notice = notice

    def _report(self, experiment: _Experiment) -> None:
        """Draw the published scores: immediately at the end, rarely before it, and for new studies after it."""
        name, aggregation = experiment.store.name, experiment.aggregation
        # a study draws the figure of the experiment it trains
        if aggregation.pointer is None or parent_of(name) in self._experiments:
            return
        version = aggregation.pointer.version
        last = aggregation.complete and aggregation.published and version != experiment.reported
        if not last and not experiment.report.due:
            return
        with experiment.report.working():
            try:
                if not is_current(self._store, name):
                    with REPORT_SECONDS.time():
                        publish_report(self._store, name)
                    log.info("report drawn", scores=version)
            except Exception as error:  # an error in drawing must not stop accumulation
                REPORT_FAILURES.inc()
                log.exception("report could not be drawn", error=str(error))
        experiment.reported = version

    def _update_metrics(self, experiment: _Experiment) -> None:
        name, aggregation = experiment.store.name, experiment.aggregation
        self._series.update(name, experiment.ended)
        if name not in self._series.shown:
            experiment.shown = (-1, 0)
            return
        update_scores(name, aggregation.pointer)
        REFUSED.labels(name).set(len(aggregation.refused))
        state = aggregation.trials, aggregation.total
        if state != experiment.shown and experiment.metrics.due:
            with experiment.metrics.working():
                update_statistics(name, aggregation.record.experiment.subsets, aggregation.statistics)
            experiment.shown = state
