"""The aggregator: an `Aggregation`, metrics and a report for each experiment of a bucket.

All state is made from the bucket; a new aggregator catches up and publishes the same bits. Experiments take turns of bounded length, so
that a large one does not delay the scores of a small one, and an error of one ends its turn only.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from contextvars import copy_context

import structlog
from structlog.contextvars import bound_contextvars

from memtail.datasets.staged_dataset import fetch_labels
from memtail.errors import MemtailError, UnreachableError
from memtail.execution.aggregation import Aggregation, Extend, Pace, Step
from memtail.execution.progress import progress_of
from memtail.execution.throttle import Throttle
from memtail.experiment_store import ExperimentStore, Notice, Record, experiment_names
from memtail.report.publish import is_current, publish_report
from memtail.settings import Settings
from memtail.storage import ObjectStore
from memtail.studies.experiment_names import parent_of
from memtail.trials import Shard
from services.aggregator.metric_updates import experiment_series, update_scores, update_statistics
from services.aggregator.metrics import ACCUMULATE_SECONDS, PASSED_OVER, PUBLISH_SECONDS, REFUSED, REPORT_FAILURES, REPORT_SECONDS
from services.common.process import repeat
from services.common.settings import ServiceSettings

log = structlog.get_logger()

# Pauses as multiples of a duration: after listing an experiment's batches, computing its metrics, drawing its report.
_LISTING_REST, _METRICS_REST, _REPORT_REST = 5, 20, 50
# Seconds without a new trial before the aggregator checks whether an experiment has ended, and between two such checks; also between two
# checks for something to draw.
_QUIET = 60.0
# Seconds for which an experiment accumulates until it is the turn of the next one.
_TURN = 2.0


class _Experiment:
    """One experiment of the bucket.

    Attributes:
        aggregation: its accumulated trials and published scores.
        listed: committed shards of the last listing that are still to be accumulated.
        notice: the notice it has from the aggregator.
        reported: version of the scores that the last report was drawn of, or was up to date with.
        shown: the numbers of accumulated and of all trials in the metrics.
    """

    def __init__(self, experiment_store: ExperimentStore, aggregation: Aggregation) -> None:
        self.store, self.aggregation = experiment_store, aggregation
        self.listed: deque[Shard] = deque()
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
        progress: called after each piece of work, so that a long pass is not taken for a hung one.
    """

    def __init__(self, store: ObjectStore, settings: ServiceSettings, progress: Callable[[], object] = lambda: None) -> None:
        self._store, self._settings, self._progress = store, settings, progress
        self._pace = Pace(settings.publish_trials, settings.publish_seconds, first_at_once=True)
        self._series = experiment_series(settings.linger_seconds)
        self._experiments: dict[str, _Experiment] = {}
        self._drawing: threading.Thread | None = None
        self._turns: dict[str, float] = {}  # when the last turn of each experiment began

    def run(self, heartbeat: Callable[[], None]) -> None:
        """Accumulate and publish forever, and call `heartbeat` after each pass. An outage of the bucket only ends the pass."""
        repeat(self.catch_up, self._settings.reconcile_seconds, heartbeat)

    def catch_up(self) -> None:
        """Give each experiment a turn, beginning with the one that has waited longest.

        Raises:
            UnreachableError: the bucket does not respond. The experiment whose turn it was comes last in the next pass.
        """
        names = experiment_names(self._store)
        self._experiments = {name: experiment for name, experiment in self._experiments.items() if name in names}
        self._turns = {name: self._turns.get(name, float("-inf")) for name in names}
        self._series.keep_only(names)
        for name in sorted(names, key=self._turns.__getitem__):
            self._turns[name] = time.monotonic()
            with bound_contextvars(experiment=name):
                try:
                    self._take_turn(name)
                except UnreachableError:  # the others would only wait for the same timeout
                    raise
                except Exception as error:
                    PASSED_OVER.inc()
                    log.error("experiment passed over", error=str(error), exc_info=not isinstance(error, MemtailError))
            self._progress()
        self._series.expire()

    def _take_turn(self, name: str) -> None:
        began = time.monotonic()
        experiment_store = ExperimentStore(self._store, name)
        record = experiment_store.read_record()
        experiment = self._experiments.get(name)
        if experiment is None or experiment.aggregation.record.fingerprint != record.fingerprint:
            experiment = self._experiments[name] = self._opened(experiment_store, record)
        experiment.aggregation.record = record
        if experiment.listing.due:
            with experiment.listing.working():  # the longer a listing takes, the more rarely it is repeated
                experiment.listed = deque(experiment.aggregation.new_shards())
            self._progress()
        self._accumulate(experiment, began + _TURN)
        self._advance(experiment)
        self._report(experiment)
        experiment.aggregation.save_snapshot()

    def _accumulate(self, experiment: _Experiment, until: float) -> None:
        began = time.monotonic()
        with closing(experiment.aggregation.accumulate_each(tuple(experiment.listed))) as accumulated:
            for _ in accumulated:
                experiment.listed.popleft()
                ACCUMULATE_SECONDS.observe(time.monotonic() - began)
                self._progress()
                self._advance(experiment)
                began = time.monotonic()
                if began >= until:
                    break

    def _opened(self, experiment_store: ExperimentStore, record: Record) -> _Experiment:
        dataset = fetch_labels(self._store, record.canonical["dataset"]["fingerprint"], Settings().cache)
        return _Experiment(experiment_store, Aggregation(experiment_store, record, dataset, self._pace, progress=self._progress))

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
        """Draw the published scores: immediately at the end, rarely before it, and for new studies after it.

        A thread draws, since that takes seconds and the images may take hours to fetch; one report at a time.
        """
        name, aggregation = experiment.store.name, experiment.aggregation
        # a study draws the figure of the experiment it trains
        if aggregation.pointer is None or parent_of(name) in self._experiments:
            return
        version = aggregation.pointer.version
        last = aggregation.complete and aggregation.published and version != experiment.reported
        if (not last and not experiment.report.due) or (self._drawing is not None and self._drawing.is_alive()):
            return
        self._drawing = threading.Thread(target=copy_context().run, args=(self._draw, experiment, version), name="report", daemon=True)
        self._drawing.start()

    def _draw(self, experiment: _Experiment, version: str) -> None:
        with experiment.report.working():
            try:
                if not is_current(self._store, experiment.store.name):
                    with REPORT_SECONDS.time():
                        publish_report(self._store, experiment.store.name)
                    log.info("report drawn", scores=version)
            except Exception as error:
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
