"""The experiments of a store as pages need them: read anew after some seconds, and the scores kept open from one page to the next."""

import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import structlog

from memtail.datasets.image_dataset import ImageDataset
from memtail.datasets.staged_dataset import fetch
from memtail.errors import DatasetError, MemtailError, ScoresError
from memtail.execution.progress import ExperimentProgress, progress_of
from memtail.experiment_store import Record
from memtail.report.publish import latest_report
from memtail.scores.fetch import open_scores
from memtail.scores.names import INFLUENCE_MATRIX, MEMORIZATION, STATISTICS, SUMMARY
from memtail.scores.pointer import latest_version
from memtail.scores.reader import Column, Scores
from memtail.settings import Settings
from memtail.spec import NAME
from memtail.storage import ObjectNotFound, ObjectStore, UnreachableError, keys
from memtail.studies.experiment_names import parent_of
from memtail.studies.result import StudyResult, load_results

log = structlog.get_logger()
T = TypeVar("T")

# Seconds for which what was read of the store is shown again; and that it could not be read.
_FRESH = 3.0
# Experiments that the page of all reads at the same time.
_AT_ONCE = 8
# Experiments whose scores are read at the same time.
_OPENED_AT_ONCE = 2
# Bytes of statistics kept open, of the experiments looked at last; those of the very last stay, however large.
_KEPT_BYTES = 2 << 30
# Seconds for which a page waits for scores that nobody has looked at yet.
_PATIENCE = 3.0
# Seconds until what could not be had, scores or images, is tried again.
_AGAIN = 10.0
# The files of a version that pages are made of.
_NEEDED = (MEMORIZATION, STATISTICS, SUMMARY)


class NotPublishedError(ScoresError):
    """An experiment has no scores yet."""


class BeingReadError(MemtailError):
    """The scores are on their way, and the images."""


@dataclass(frozen=True, eq=False)
class Opened:
    """One experiment with one version of its scores, in memory.

    Attributes:
        dataset: the images, and the names of classes and files; None where it can be had neither from the cache nor from the store.
        missing: the reason why.
    """

    record: Record
    scores: Scores
    dataset: ImageDataset | None
    missing: str

    @property
    def name(self) -> str:
        """Of the experiment."""
        return self.record.experiment.name

    @property
    def version(self) -> str:
        """Of the scores."""
        return self.scores.folder.name

    @property
    def memorization(self) -> dict[str, Column]:
        """The columns of the published table."""
        return self.scores.memorization

    @cached_property
    def classes(self) -> list[str]:
        """The classes' names."""
        if self.dataset is not None:
            return list(self.dataset.classes)
        last = max(int(labels.max(initial=0)) for labels in (self.memorization["label"], self.scores.test_labels))
        return [f"class {label}" for label in range(last + 1)]

    @property
    def size(self) -> int:
        """Bytes of the statistics."""
        packed = self.scores.statistics
        return packed.membership.nbytes + packed.test_correct.nbytes

    @cached_property
    def train_files(self) -> list[str] | None:
        """The training images' file names, if there are any."""
        return self.memorization["filename"].tolist() if "filename" in self.memorization else None

    @cached_property
    def test_files(self) -> list[str] | None:
        """The test images' file names, if there are any."""
        if self.dataset is None or self.dataset.test_files is None:
            return None
        return [name.decode(errors="replace") for name in self.dataset.test_files.tolist()]

    @cached_property
    def lower_files(self) -> list[str] | None:
        """`train_files` in lower case, to be searched."""
        return None if self.train_files is None else [name.lower() for name in self.train_files]


@dataclass
class _Reading:
    """Scores as they are read, or were last.

    Attributes:
        wanted: of what: the experiment's fingerprint, and the version.
        opened: what comes of it.
        ended: when that came, by the monotonic clock.
    """

    wanted: tuple[str, str | None]
    opened: Future[Opened] = field(default_factory=Future)
    ended: float = float("inf")


class Library:
    """All experiments of a store. Its methods may be called from any thread.

    Args:
        store: where they are.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        # of an experiment, or of "" for the store itself, and of what
        self._seen: dict[tuple[str, str], tuple[float, Any]] = {}
        self._locks: defaultdict[tuple[str, str], threading.Lock] = defaultdict(threading.Lock)
        self._readers = ThreadPoolExecutor(_AT_ONCE, "read-experiments")
        self._opening = threading.Lock()
        self._opened: OrderedDict[str, Opened] = OrderedDict()
        self._readings: dict[str, _Reading] = {}
        self._places = threading.Semaphore(_OPENED_AT_ONCE)

    @property
    def address(self) -> str:
        """Of the store."""
        return self._store.address

    def names(self) -> list[str]:
        """The experiments. Raises: StoreError."""
        names: list[str] = self._fresh("", "names", self._names)
        return names

    def own_names(self) -> dict[str, list[str]]:
        """The experiments but for those that studies of others train, each with those that its studies train. Raises: StoreError."""
        names = self.names()
        own: dict[str, list[str]] = {name: [] for name in names if parent_of(name) not in names}
        for name in names:
            if name not in own:
                own.setdefault(str(parent_of(name)), []).append(name)
        return own

    def each(self, read: Callable[[str], T]) -> tuple[dict[str, T], list[str]]:
        """What `read` gives of each experiment; and a line for each of which it cannot, since the others can be shown all the same.

        Raises:
            StoreError: the store itself cannot be read.
        """

        def attempt(name: str) -> T | MemtailError:
            try:
                return read(name)
            except UnreachableError:  # nor can the others
                raise
            except MemtailError as error:
                return error

        found: dict[str, T] = {}
        damaged = []
        names = self.names()
        for name, given in zip(names, self._readers.map(attempt, names), strict=True):
            if not isinstance(given, MemtailError):
                found[name] = given
            elif not isinstance(given, ObjectNotFound):  # which was removed just now
                damaged.append(f"{name}: {given}")
        return found, damaged

    def progress(self, name: str) -> ExperimentProgress:
        """How far an experiment is, as of some seconds ago. Raises: ObjectNotFound: there is none of this name; StoreError."""
        self._record(name)
        progress: ExperimentProgress = self._fresh(name, "progress", lambda: progress_of(self._store, name))
        return progress

    def report(self, name: str) -> str | None:
        """The version of the published report; None if there is none. Raises: StoreError."""
        version: str | None = self._fresh(name, "report", lambda: (latest_report(self._store, name) or {}).get("version"))
        return version

    def report_file(self, name: str, file: str) -> bytes:
        """One file of the published report. Raises: ObjectNotFound, StoreError."""
        self._record(name)
        version = self.report(name)
        if version is None:
            raise ObjectNotFound(f"experiment '{name}' has no report: memtail report {name} makes one")
        return self._store.get(keys.check(keys.report(name, version) + file))

    def studies(self, name: str) -> list[StudyResult]:
        """The results of an experiment's studies. Raises: ObjectNotFound: there is no such experiment; StoreError."""
        self._record(name)
        results: list[StudyResult] = self._fresh(name, "studies", lambda: load_results(self._store, name))
        return results

    def open(self, name: str) -> Opened:
        """An experiment with the version of its scores that is published.

        Scores are read beside the pages. The first calls wait for them, for some seconds. When another version is published, calls go on to
        get the one before until the new one is read.

        Raises:
            ObjectNotFound: there is no such experiment.
            NotPublishedError: it has no scores yet.
            BeingReadError: they are still being read.
            ScoresError: they are damaged.
            StoreError: the store cannot be read.
        """
        record = self._record(name)
        version: str | None = self._fresh(name, "version", lambda: self._published_version(name))
        with self._opening:
            opened = self._opened.get(name)
            if opened is not None and opened.record.fingerprint != record.fingerprint:
                opened = None
            if opened is not None:
                self._opened.move_to_end(name)
                if version in (None, opened.version) and opened.dataset is not None:
                    return opened
            elif version is None:
                raise NotPublishedError(f"experiment '{name}' has no published scores yet")
            reading = self._read(record, version, opened)
        if opened is not None:
            return opened
        try:
            return reading.result(_PATIENCE)
        except TimeoutError:
            raise BeingReadError(f"the scores of experiment '{name}' are being read: look again in a moment") from None

    def _published_version(self, name: str) -> str | None:
        pointer = latest_version(self._store, name)
        return None if pointer is None else pointer.version

    def _names(self) -> list[str]:
        names = [name for name in self._store.folders(keys.experiments()) if NAME.fullmatch(name)]
        there = {"", *names}
        for what in [what for what in list(self._locks) if what[0] not in there]:
            self._locks.pop(what, None)
            self._seen.pop(what, None)
        with self._opening:
            for name in self._readings.keys() - there:
                self._forget(name)
        return names

    def _record(self, name: str) -> Record:
        if name not in (names := self.names()):  # so that nothing is remembered of names that somebody makes up
            raise ObjectNotFound(f"there is no experiment '{name}' in the store; there: {', '.join(names) or 'none'}")
        key = keys.experiment(name)
        record: Record = self._fresh(name, "record", lambda: Record.from_bytes(self._store.get(key), key))
        return record

    def _read(self, record: Record, version: str | None, before: Opened | None) -> Future[Opened]:
        """Read scores in a thread of their own, unless they are being read, or were tried just now."""
        name, wanted = record.experiment.name, (record.fingerprint, version)
        last = self._readings.get(name)
        if last is not None and (not last.opened.done() or (last.wanted == wanted and time.monotonic() < last.ended + _AGAIN)):
            return last.opened
        reading = self._readings[name] = _Reading(wanted)

        def read() -> None:
            try:
                with self._places:
                    opened = self._open(record, version, before)
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

    def _open(self, record: Record, version: str | None, before: Opened | None) -> Opened:
        settings = Settings()
        dataset, missing = None, ""
        try:
            dataset = fetch(self._store, record.canonical["dataset"]["fingerprint"], settings.cache, settings.cache_limit)
        except DatasetError as error:
            missing = str(error)
        if before is not None and version in (None, before.version):
            return replace(before, dataset=dataset, missing=missing)
        files = _NEEDED if dataset is not None else (*_NEEDED, INFLUENCE_MATRIX)
        scores = open_scores(self._store, record.experiment.name, files)
        if dataset is not None:
            scores.test_labels = np.asarray(dataset.test_labels)  # which otherwise the largest of the files has
        # no page shows influence on training examples
        scores.statistics = replace(scores.statistics, train_correct=np.empty((len(scores.statistics.counted), 0), np.uint64))
        opened = Opened(record, scores, dataset, missing)
        # All that a page may need is read now: files of a version are removed some time after the next is published. What counts pairs
        # is compiled, or read from where it was compiled to.
        _ = opened.memorization, opened.lower_files, scores.test_labels, opened.test_files
        _ = scores.influence(train=0).value, scores.influence(test=0).value
        return opened

    def _keep(self, opened: Opened) -> None:
        with self._opening:
            self._opened[opened.name] = opened
            self._opened.move_to_end(opened.name)
            while len(self._opened) > 1 and sum(each.size for each in self._opened.values()) > _KEPT_BYTES:
                self._forget(next(iter(self._opened)))

    def _forget(self, name: str) -> None:
        self._opened.pop(name, None)
        self._readings.pop(name, None)

    def _fresh(self, name: str, what: str, read: Callable[[], Any]) -> Any:
        with self._locks[name, what]:
            when, value = self._seen.get((name, what), (float("-inf"), None))
            if time.monotonic() - when > _FRESH:
                try:
                    value = read()
                except MemtailError as error:  # all who wait for the same get this, too, and need not wait as long again
                    value = error
                self._seen[name, what] = time.monotonic(), value
        if isinstance(value, MemtailError):
            raise value.with_traceback(None)
        return value
