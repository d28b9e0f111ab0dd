"""Cache of opened scores: read in the background, kept from one page to the next."""

import threading
import time
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np
import structlog

from memtail.datasets.staged_dataset import fetch
from memtail.errors import DatasetError, MemtailError, ScoresError
from memtail.experiment_store import Record
from memtail.explorer.opened import Opened
from memtail.scores.fetch import open_scores
from memtail.scores.names import INDEX, INFLUENCE_MATRIX, MEMORIZATION, SELECTED_PAIRS, SNAPSHOTS, STATISTICS, SUMMARY
from memtail.settings import Settings
from memtail.storage import ObjectStore

log = structlog.get_logger()

# Experiments whose scores are read at the same time.
_CONCURRENT_READS = 2
# Bytes of statistics kept, of the experiments used last; those of the last one stay whatever their size.
_CACHE_BYTES = 2 << 30
# Timeout of a page that waits for scores, in seconds.
_TIMEOUT = 3.0
# Seconds before scores or images that could not be read are retried.
_RETRY_AFTER = 10.0
# Score files that the pages need.
_SCORE_FILES = (MEMORIZATION, SELECTED_PAIRS, SNAPSHOTS, STATISTICS, SUMMARY)


class NotPublishedError(ScoresError):
    """An experiment has no scores yet."""


class BeingReadError(MemtailError):
    """The scores and images are still being read."""


@dataclass
class _Reading:
    """A read of scores, running or ended.

    Attributes:
        target: fingerprint of the experiment, and version of the scores.
        opened: the outcome.
        ended: time of the outcome by the monotonic clock.
    """

    target: tuple[str, str | None]
    opened: Future[Opened] = field(default_factory=Future)
    ended: float = float("inf")


class ScoreCache:
    """Opened scores of the experiments of a store. Methods may be called from any thread.

    Args:
        store: the store.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._opened: OrderedDict[str, Opened] = OrderedDict()
        self._readings: dict[str, _Reading] = {}
        self._slots = threading.Semaphore(_CONCURRENT_READS)

    def open(self, record: Record, version: str | None) -> Opened:
        """Open the published scores of an experiment.

        The first calls wait for the read in the background, up to a timeout. Once another version is published, calls get the previous one
        until the new one is read.

        Args:
            record: the experiment.
            version: the published version; None if there is none.

        Raises:
            NotPublishedError: there are no scores yet.
            BeingReadError: the scores are still being read.
            ScoresError: the scores are damaged.
            StoreError: the store cannot be read.
        """
        name = record.experiment.name
        with self._lock:
            opened = self._opened.get(name)
            if opened is not None and opened.record.fingerprint != record.fingerprint:
                opened = None
            if opened is not None:
                self._opened.move_to_end(name)
                if version in (None, opened.version) and opened.dataset is not None:
                    return opened
            elif version is None:
                raise NotPublishedError(f"experiment '{name}' has no published scores yet")
            reading = self._start_reading(record, version, opened)
        if opened is not None:
            return opened
        try:
            return reading.result(_TIMEOUT)
        except TimeoutError:
            raise BeingReadError(f"the scores of experiment '{name}' are being read: reload the page in a moment") from None

    def keep_only(self, names: set[str]) -> None:
        """Forget all experiments but these."""
        with self._lock:
            for name in self._readings.keys() - names:
                self._forget(name)

    def _start_reading(self, record: Record, version: str | None, previous: Opened | None) -> Future[Opened]:
        """Read scores in a thread, unless they are being read or the last attempt has just ended."""
        name, target = record.experiment.name, (record.fingerprint, version)
        last = self._readings.get(name)
        if last is not None and (not last.opened.done() or (last.target == target and time.monotonic() < last.ended + _RETRY_AFTER)):
            return last.opened
        reading = self._readings[name] = _Reading(target)

        def read() -> None:
            try:
                with self._slots:
                    opened = self._read(record, version, previous)
                self._keep(opened)
            except Exception as error:
                log.warning("scores not read", experiment=name, error=str(error), exc_info=not isinstance(error, MemtailError))
                reading.ended = time.monotonic()
                reading.opened.set_exception(error)
            else:
                reading.ended = time.monotonic()
                reading.opened.set_result(opened)

        threading.Thread(target=read, name="read-scores", daemon=True).start()
        return reading.opened

    def _read(self, record: Record, version: str | None, previous: Opened | None) -> Opened:
        settings = Settings()
        dataset, missing = None, ""
        try:
            dataset = fetch(self._store, record.canonical["dataset"]["fingerprint"], settings.cache, settings.cache_limit)
        except DatasetError as error:
            missing = str(error)
        if previous is not None and version in (None, previous.version):
            return replace(previous, dataset=dataset, missing=missing)
        files = _SCORE_FILES if dataset is not None else (*_SCORE_FILES, INFLUENCE_MATRIX, INDEX)
        scores = open_scores(self._store, record.experiment.name, files)
        if dataset is not None:
            scores.test_labels = np.asarray(dataset.test_labels)  # otherwise read from the largest score file
        # no page shows influence on training examples
        without = None if scores.scores_only else np.empty((len(scores.statistics.counted), 0), np.uint64)
        scores.statistics = replace(scores.statistics, train_correct=without, train_score=None)
        opened = Opened(record, scores, dataset, missing)
        # Read all that a page may need, since files of a version are removed some time after the next one is published; and compile the
        # influence kernels, or load them from numba's cache.
        _ = opened.memorization, opened.lower_files, scores.snapshots, scores.selected_pairs, scores.test_labels, opened.test_files
        _ = scores.estimated(train=0).value
        if scores.summary.n_test:
            _ = scores.estimated(test=0).value
        return opened

    def _keep(self, opened: Opened) -> None:
        with self._lock:
            self._opened[opened.name] = opened
            self._opened.move_to_end(opened.name)
            while len(self._opened) > 1 and sum(each.size for each in self._opened.values()) > _CACHE_BYTES:
                self._forget(next(iter(self._opened)))

    def _forget(self, name: str) -> None:
        self._opened.pop(name, None)
        self._readings.pop(name, None)
