"""Experiments of a store as the pages need them: read from the store, cached for some seconds."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from memtail.errors import MemtailError
from memtail.execution.progress import ExperimentProgress, progress_of
from memtail.experiment_store import Record
from memtail.explorer.opened import Opened
from memtail.explorer.score_cache import ScoreCache
from memtail.report.pointer import ReportPointer, latest_report
from memtail.scores.pointer import latest_version
from memtail.spec import NAME
from memtail.storage import ObjectNotFound, ObjectStore, UnreachableError, keys
from memtail.studies.experiment_names import parent_of
from memtail.studies.result import StudyResult, load_results

T = TypeVar("T")

# TTL in seconds of what was read from the store, errors included.
_TTL = 3.0
# Experiments that the list of experiments reads at the same time.
_CONCURRENT_READS = 8


class Library:
    """All experiments of a store. Methods may be called from any thread.

    Args:
        store: the store.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        # by experiment ("" for the store) and kind of value: time of the read, and the value or the error
        self._cache: dict[tuple[str, str], tuple[float, Any]] = {}
        self._locks: defaultdict[tuple[str, str], threading.Lock] = defaultdict(threading.Lock)
        self._readers = ThreadPoolExecutor(_CONCURRENT_READS, "read-experiments")
        self._scores = ScoreCache(store)

    @property
    def address(self) -> str:
        """Address of the store."""
        return self._store.address

    def names(self) -> list[str]:
        """Return the names of the experiments. Raises: StoreError."""
        names: list[str] = self._cached("", "names", self._list_names)
        return names

    def own_names(self) -> dict[str, list[str]]:
        """Return the experiments that no study trains, each with the experiments that its studies train. Raises: StoreError."""
        names = self.names()
        own: dict[str, list[str]] = {name: [] for name in names if parent_of(name) not in names}
        for name in names:
            if name not in own:
                own.setdefault(str(parent_of(name)), []).append(name)
        return own

    def read_each(self, read: Callable[[str], T]) -> tuple[dict[str, T], list[str]]:
        """Read every experiment.

        Args:
            read: reads one experiment, by name.

        Returns:
            The results by experiment, and an error line for each experiment that cannot be read.

        Raises:
            StoreError: the store cannot be read.
        """

        def attempt(name: str) -> T | MemtailError:
            try:
                return read(name)
            except UnreachableError:  # the others cannot be read either
                raise
            except MemtailError as error:
                return error

        results: dict[str, T] = {}
        damaged = []
        names = self.names()
        for name, result in zip(names, self._readers.map(attempt, names), strict=True):
            if not isinstance(result, MemtailError):
                results[name] = result
            elif not isinstance(result, ObjectNotFound):  # else it has just been removed
                damaged.append(f"{name}: {result}")
        return results, damaged

    def progress(self, name: str) -> ExperimentProgress:
        """Return the progress of an experiment. Raises: ObjectNotFound: there is no such experiment; StoreError."""
        self._record(name)
        progress: ExperimentProgress = self._cached(name, "progress", lambda: progress_of(self._store, name))
        return progress

    def report(self, name: str) -> ReportPointer | None:
        """Return the pointer to the published report; None if there is none. Raises: StoreError."""
        pointer: ReportPointer | None = self._cached(name, "report", lambda: latest_report(self._store, name))
        return pointer

    def report_file(self, name: str, file: str) -> bytes:
        """Read a file of the published report. Raises: ObjectNotFound, StoreError."""
        self._record(name)
        pointer = self.report(name)
        if pointer is None:
            raise ObjectNotFound(f"experiment '{name}' has no report: memtail report {name} makes one")
        return self._store.get(keys.check(keys.report(name, pointer.version) + file))

    def studies(self, name: str) -> list[StudyResult]:
        """Return the results of an experiment's studies. Raises: ObjectNotFound: there is no such experiment; StoreError."""
        self._record(name)
        results: list[StudyResult] = self._cached(name, "studies", lambda: load_results(self._store, name))
        return results

    def open(self, name: str) -> Opened:
        """Open an experiment with its published scores (see `ScoreCache.open`).

        Raises:
            ObjectNotFound: there is no such experiment.
            NotPublishedError: there are no scores yet.
            BeingReadError: the scores are still being read.
            ScoresError: the scores are damaged.
            StoreError: the store cannot be read.
        """
        record = self._record(name)
        version: str | None = self._cached(name, "version", lambda: self._published_version(name))
        return self._scores.open(record, version)

    def _published_version(self, name: str) -> str | None:
        pointer = latest_version(self._store, name)
        return None if pointer is None else pointer.version

    def _list_names(self) -> list[str]:
        names = [name for name in self._store.folders(keys.experiments()) if NAME.fullmatch(name)]
        present = {"", *names}
        for key in [key for key in list(self._locks) if key[0] not in present]:
            self._locks.pop(key, None)
            self._cache.pop(key, None)
        self._scores.keep_only(present)
        return names

    def _record(self, name: str) -> Record:
        if name not in (names := self.names()):  # before the cache, which must not grow by made-up names
            raise ObjectNotFound(f"there is no experiment '{name}' in the store; there: {', '.join(names) or 'none'}")
        key = keys.experiment(name)
        record: Record = self._cached(name, "record", lambda: Record.from_bytes(self._store.get(key), key))
        return record

    def _cached(self, name: str, kind: str, read: Callable[[], Any]) -> Any:
        with self._locks[name, kind]:
            when, value = self._cache.get((name, kind), (float("-inf"), None))
            if time.monotonic() - when > _TTL:
                try:
                    value = read()
                except MemtailError as error:  # cached too, so that waiting requests need not wait for another timeout
                    value = error
                self._cache[name, kind] = time.monotonic(), value
        if isinstance(value, MemtailError):
            raise value.with_traceback(None)
        return value
