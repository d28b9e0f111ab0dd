"""The experiments of a store as pages need them: read anew after some seconds, and the scores kept open from one page to the next."""

import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import structlog

from memtail.archive import ExperimentArchive, Record, experiment_names
from memtail.datasets.image_dataset import ImageDataset
from memtail.datasets.staging import fetch
from memtail.errors import DatasetError, MemtailError, ScoresError
from memtail.progress import ExperimentProgress, progress_of
from memtail.report.publish import latest_report
from memtail.scores.fetch import open_scores
from memtail.scores.pointer import latest_version
from memtail.scores.reader import Column, Scores
from memtail.settings import Settings
from memtail.storage import ObjectNotFound, ObjectStore, keys
from memtail.studies.names import studied
from memtail.studies.result import StudyResult, load_results

log = structlog.get_logger()

# Seconds for which what was read of the store is shown again.
_FRESH = 3.0
# Experiments whose scores are kept open: those opened last.
_KEPT = 3


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
        return [f"class {label}" for label in range(int(self.memorization["label"].max(initial=0)) + 1)]

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


class Library:
    """All experiments of a store. Its methods may be called from any thread.

    Args:
        store: where they are.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._seen: dict[Hashable, tuple[float, Any]] = {}
        self._locks: defaultdict[Hashable, threading.Lock] = defaultdict(threading.Lock)
        self._opened: OrderedDict[str, Opened] = OrderedDict()
        self._renewing: set[str] = set()
        self._renewer = ThreadPoolExecutor(1, "renew-scores")

    @property
    def address(self) -> str:
        """Of the store."""
        return self._store.address

    def names(self) -> list[str]:
        """The experiments. Raises: StoreError."""
        names: list[str] = self._fresh("names", lambda: experiment_names(self._store))
        return names

    def own_names(self) -> dict[str, list[str]]:
        """The experiments but for those that studies of others train, each with those that its studies train. Raises: StoreError."""
        names = self.names()
        own: dict[str, list[str]] = {name: [] for name in names if studied(name) not in names}
        for name in names:
            if name not in own:
                own.setdefault(str(studied(name)), []).append(name)
        return own

    def progress(self, name: str) -> ExperimentProgress:
        """How far an experiment is, as of some seconds ago. Raises: ObjectNotFound: there is none of this name; StoreError."""
        self._record(name)
        progress: ExperimentProgress = self._fresh(("progress", name), lambda: progress_of(self._store, name))
        return progress

    def report(self, name: str) -> str | None:
        """The version of the published report; None if there is none. Raises: StoreError."""
        version: str | None = self._fresh(("report", name), lambda: (latest_report(self._store, name) or {}).get("version"))
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
        results: list[StudyResult] = self._fresh(("studies", name), lambda: load_results(self._store, name))
        return results

    def open(self, name: str) -> Opened:
        """An experiment with the version of its scores that is published.

        The first call waits until they are read. When another version is published, calls go on to get the one before until the new one
        is read.

        Raises:
            ObjectNotFound: there is no such experiment.
            ScoresError: it has no scores yet.
            StoreError: the store cannot be read.
        """
        record = self._record(name)
        version = self._fresh(("version", name), lambda: (latest_version(self._store, name) or {}).get("version"))
        with self._locks["open", name]:
            opened = self._opened.get(name)
            if opened is None or opened.record.fingerprint != record.fingerprint:
                if version is None:
                    raise ScoresError(f"experiment '{name}' has no published scores yet")
                opened = self._open(record)
                self._keep(opened)
            elif version not in (None, opened.version) and name not in self._renewing:
                self._renewing.add(name)
                self._renewer.submit(self._renew, record)
        return opened

    def _record(self, name: str) -> Record:
        if name not in self.names():  # so that nothing is remembered of names that somebody makes up
            raise ObjectNotFound(f"there is no experiment '{name}' in the store; there: {', '.join(self.names()) or 'none'}")
        record: Record = self._fresh(("record", name), ExperimentArchive(self._store, name).record)
        return record

    def _open(self, record: Record) -> Opened:
        scores = open_scores(self._store, record.experiment.name)
        settings = Settings()
        dataset, missing = None, ""
        try:
            dataset = fetch(self._store, record.canonical["dataset"]["fingerprint"], settings.cache, settings.cache_limit)
        except DatasetError as error:
            missing = str(error)
        opened = Opened(record, scores, dataset, missing)
        # All that a page may need is read now: files of a version are removed some time after the next is published. What counts pairs
        # is compiled, or read from where it was compiled to.
        _ = opened.memorization, opened.lower_files, scores.test_labels, opened.test_files
        _ = scores.influence(train=0).value, scores.influence(test=0).value
        return opened

    def _renew(self, record: Record) -> None:
        name = record.experiment.name
        try:
            self._keep(self._open(record))
        except (MemtailError, OSError) as error:
            log.warning("scores not read, the version before is shown", experiment=name, error=str(error))
        finally:
            self._renewing.discard(name)

    def _keep(self, opened: Opened) -> None:
        with self._locks["keep"]:
            self._opened[opened.name] = opened
            self._opened.move_to_end(opened.name)
            while len(self._opened) > _KEPT:
                self._opened.popitem(last=False)

    def _fresh(self, what: Hashable, read: Callable[[], Any]) -> Any:
        with self._locks[what]:
            when, value = self._seen.get(what, (float("-inf"), None))
            if time.monotonic() - when > _FRESH:
                value = read()
                self._seen[what] = time.monotonic(), value
            return value
