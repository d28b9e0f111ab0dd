"""The aggregator: an `Aggregation`, metrics and a report for each experiment of a bucket.

All state is made from the bucket; a new aggregator catches up and publishes the same bits. Experiments take turns of bounded length, so
that a large one does not delay the scores of a small one, and an error of one ends its turn only. Of a finished experiment nothing is kept
in memory, and it has a turn once a day, or when it is marked as changed.
"""

import threading
import time
import zlib
from collections import deque
from collections.abc import Callable
from contextlib import closing, suppress
from contextvars import copy_context
from dataclasses import dataclass

import structlog
from structlog.contextvars import bound_contextvars

from memtail.datasets.staged_dataset import fetch_labels
from memtail.errors import MemtailError, StoreError, UnreachableError
from memtail.execution.aggregation import Aggregation, Extend, Pace, Step
from memtail.execution.finishing import still_finished
from memtail.execution.progress import progress_of
from memtail.execution.throttle import Throttle
from memtail.experiment_store import ExperimentStore, Notice, Record
from memtail.report.publish import is_current, publish_report
from memtail.scores.pointer import latest_version
from memtail.settings import Settings
from memtail.storage import ObjectStore, keys
from memtail.studies.experiment_names import parent_of
from memtail.trials import Shard
from services.aggregator.metric_updates import experiment_series, update_finished, update_scores, update_statistics
from services.aggregator.metrics import ACCUMULATE_SECONDS, PASSED_OVER, PUBLISH_SECONDS, REFUSED, REPORT_FAILURES, REPORT_SECONDS
from services.common.polling import Listings, Quiet
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
# Seconds between two checks of a finished experiment that is not marked as changed: whether a batch was replaced, or the scores are lost.
_FINISHED_CHECK = 86400.0


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
        self.finishing = Throttle(0, at_least=_QUIET)
        self._progressed = (-1, 0.0)  # number of trials, and the time of its last change or of the last check for the end
        self._ended = self._paused = self._idle = False
        self._quiet = Quiet()

    @property
    def ended(self) -> bool:
        """Whether no trial is to come. The bucket is asked only after a while without a new trial."""
        aggregation = self.aggregation
        if aggregation.complete:
            return aggregation.published or not aggregation.statistics.trials
        now = time.monotonic()
        if aggregation.trials != self._progressed[0]:
            self._progressed, self._ended, self._paused = (aggregation.trials, now), False, False
        elif now - self._progressed[1] >= _QUIET:
            self._progressed = aggregation.trials, now
            progress = progress_of(self.store.store, self.store.name)
            self._ended, self._paused = progress.ending is not None, progress.control.state == "paused"
        return self._ended

    def had_turn(self, changed: bool) -> None:
        """Note the end of a turn; after a change marker the experiment counts as one in which something happens."""
        aggregation = self.aggregation
        self._quiet.seen((changed, aggregation.trials, aggregation.total, aggregation.pointer and aggregation.pointer.version))
        self._idle = self.ended or self._paused

    @property
    def rests(self) -> bool:
        """Whether the experiment needs no turn: no trial is to come, and none came for a while."""
        return self._idle and self._quiet.lasts


@dataclass
class _Finished:
    """A finished experiment.

    Attributes:
        version: of its scores.
        next_check: time of the next turn, unless it is marked as changed.
        reported: whether a report was drawn of the scores, or the attempt failed.
    """

    version: str
    next_check: float
    reported: bool = False


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
        self._finished: dict[str, _Finished] = {}
        self._listings = Listings(store, settings.resync_seconds)
        self._changed: set[str] = set()  # experiments with a new change marker, which are to have a turn
        self._errors: dict[str, Quiet] = {}  # by experiment that is passed over: how long it has had the same error
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
        if self._listings.changes_due:
            changed = self._listings.changed()
            self._changed |= changed
            for name in changed & self._errors.keys():
                del self._errors[name]
        names = self._listings.names([name for name in (*self._finished, *self._experiments, *self._errors) if self._rests(name)])
        self._experiments = {name: experiment for name, experiment in self._experiments.items() if name in names}
        self._finished = {name: finished for name, finished in self._finished.items() if name in names}
        self._errors = {name: errors for name, errors in self._errors.items() if name in names}
        self._changed &= set(names)
        self._turns = {name: self._turns.get(name, float("-inf")) for name in names}
        self._series.keep_only(names)
        for name in sorted(names, key=self._turns.__getitem__):
            self._turns[name] = time.monotonic()
            with bound_contextvars(experiment=name):
                try:
                    if not self._rests(name):
                        self._take_turn(name)
                        self._errors.pop(name, None)
                    elif name in self._errors:
                        PASSED_OVER.inc()
                    elif name in self._finished:
                        self._report_finished(name)
                except UnreachableError:  # the others would only wait for the same timeout
                    raise
                except Exception as error:
                    if not ExperimentStore(self._store, name).is_registered():  # removed since it was listed, or after its end
                        self._experiments.pop(name, None)
                        self._finished.pop(name, None)
                        continue
                    PASSED_OVER.inc()
                    if self._errors.setdefault(name, Quiet()).seen(str(error)):  # once, since it may last
                        log.error("experiment passed over", error=str(error), exc_info=not isinstance(error, MemtailError))
            self._progress()
        self._series.expire()

    def _rests(self, name: str) -> bool:
        """Whether an experiment has no turn now: it is finished, nothing is to happen in it, or its turns have long ended with an error."""
        if name in self._errors and self._errors[name].lasts:
            return True
        if name in self._changed:
            return False
        finished = self._finished.get(name)
        if finished:
            return time.monotonic() < finished.next_check
        return name in self._experiments and self._experiments[name].rests

    def _take_turn(self, name: str) -> None:
        began = time.monotonic()
        experiment_store = ExperimentStore(self._store, name)
        record = experiment_store.read_record()
        experiment = self._experiments.get(name)
        if experiment is None and self._is_finished(experiment_store, record):
            return
        if experiment is None or experiment.aggregation.record.fingerprint != record.fingerprint:
            experiment = self._experiments[name] = self._opened(experiment_store, record)
        experiment.aggregation.record = record
        if experiment.listing.due:
            before = experiment.aggregation.trials
            with experiment.listing.working():  # the longer a listing takes, the more rarely it is repeated
                experiment.listed = deque(experiment.aggregation.new_shards())
            self._progress()
            # batches may be removed after the end, which another process may have recorded
            if experiment.aggregation.trials < before and self._is_finished(experiment_store, record):
                del self._experiments[name]
                return
        self._accumulate(experiment, began + _TURN)
        self._advance(experiment)
        self._report(experiment)
        experiment.aggregation.save_snapshot()
        experiment.had_turn(name in self._changed)
        self._changed.discard(name)
        self._finish(experiment)

    def _is_finished(self, experiment_store: ExperimentStore, record: Record) -> bool:
        """Check an experiment that is not in memory; of a finished one nothing is read into it."""
        name = experiment_store.name
        finished = still_finished(experiment_store, record)
        if finished and name in self._changed:
            self._store.delete(keys.change(name))
            finished = still_finished(experiment_store, experiment_store.read_record())
        if finished is None:
            # for the dispatcher: whoever changed the experiment may have been interrupted before the marker, or the marker was removed here
            experiment_store.mark_changed()
            self._finished.pop(name, None)
            return False
        self._changed.discard(name)
        before, now = self._finished.get(name), time.monotonic()
        # the first checks after a start are spread over a day
        wait = _FINISHED_CHECK if before else _FINISHED_CHECK * zlib.crc32(name.encode()) / 2**32
        self._finished[name] = _Finished(finished.version, now + wait)
        self._series.update(name, ended=True)
        if before is None and name in self._series.shown:
            update_finished(name, latest_version(self._store, name))
        return True

    def _finish(self, experiment: _Experiment) -> None:
        """Record the end of an experiment, and drop it from memory."""
        name, aggregation = experiment.store.name, experiment.aggregation
        if not (aggregation.complete and aggregation.published and experiment.finishing.due):
            return
        with experiment.finishing.working():
            finished = aggregation.finish()
        if finished is None:
            return
        log.info("finished", trials=finished.trials, scores=finished.version)
        if name in self._series.shown:
            update_statistics(name, aggregation.record.experiment.subsets, aggregation.statistics)
        self._finished[name] = _Finished(finished.version, time.monotonic() + _FINISHED_CHECK, experiment.reported == finished.version)
        del self._experiments[name]

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
        aggregation = experiment.aggregation
        if aggregation.pointer is None:
            return
        version = aggregation.pointer.version
        last = aggregation.complete and aggregation.published and version != experiment.reported

        def draw() -> None:
            with experiment.report.working():
                self._draw(experiment.store.name, version)
            experiment.reported = version

        if last or experiment.report.due:
            self._start_drawing(experiment.store.name, draw)

    def _report_finished(self, name: str) -> None:
        """Draw the scores of a finished experiment, unless the report shows them and all studies."""
        finished = self._finished[name]

        def draw() -> None:
            self._draw(name, finished.version)
            finished.reported = True

        if not finished.reported:
            self._start_drawing(name, draw)

    def _start_drawing(self, name: str, draw: Callable[[], None]) -> None:
        # a study draws the figure of the experiment it trains
        if parent_of(name) in self._turns or (self._drawing is not None and self._drawing.is_alive()):
            return
        self._drawing = threading.Thread(target=copy_context().run, args=(draw,), name="report", daemon=True)
        self._drawing.start()

    def _draw(self, name: str, version: str) -> None:
        try:
            if not is_current(self._store, name):
                with REPORT_SECONDS.time():
                    publish_report(self._store, name)
                log.info("report drawn", scores=version)
        except Exception as error:
            with suppress(StoreError):
                if not ExperimentStore(self._store, name).is_registered():  # removed while it was drawn
                    return
            REPORT_FAILURES.inc()
            log.exception("report could not be drawn", error=str(error))

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
