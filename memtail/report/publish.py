"""Publication of an experiment's report: made from the published scores, written to the store, then pointed to.

`experiments/<name>/report/<version>/` holds `report.html` and each figure as SVG and PNG; `report/latest.json` points to the version
(see `memtail.report.pointer`).
"""

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memtail.datasets.staged_dataset import fetch
from memtail.errors import ScoresError
from memtail.experiment_store import ExperimentStore
from memtail.report.pointer import ReportPointer, latest_report
from memtail.scores.fetch import fetch_scores
from memtail.scores.names import MEMORIZATION, PAIRS_TABLE, SELECTED_PAIRS, SNAPSHOTS, STATISTICS, SUMMARY
from memtail.scores.pointer import ScorePointer, latest_version
from memtail.scores.reader import Scores
from memtail.settings import Settings
from memtail.storage import ObjectStore, keys
from memtail.studies.result import StudyResult, load_results
from memtail.trials import Shard

#: File name of the page.
PAGE = "report.html"
# Score files that the report is made from.
_SCORE_FILES = (MEMORIZATION, PAIRS_TABLE, SELECTED_PAIRS, SNAPSHOTS, STATISTICS, SUMMARY)


def is_current(store: ObjectStore, name: str) -> bool:
    """Check whether the latest report shows the latest scores, all studies, and all differences between two trainings of a shard."""
    report, scores = latest_report(store, name), latest_version(store, name)
    if report is None or scores is None:
        return False
    shown = report.scores, report.studies, report.different
    return shown == (scores.version, _finish_times(load_results(store, name)), len(_different(ExperimentStore(store, name))))


def publish_report(store: ObjectStore, name: str) -> ReportPointer:
    """Make the report of the latest scores and studies, and point readers to it.

    The version is derived from the content: equal scores and studies give equal bytes. The pointer never moves back to scores of fewer
    trials.

    Raises:
        ScoresError: there are no scores, or they are damaged.
        DatasetError: the images are neither in the cache nor in the store.
        StoreError: the store cannot be read or written.
    """
    from memtail.report.content import choose_content  # slow to import
    from memtail.report.page import draw, render

    experiment_store = ExperimentStore(store, name)
    record, different = experiment_store.read_record(), _different(experiment_store)
    published = latest_version(store, name)
    if published is None:
        raise ScoresError(f"experiment '{name}' has no published scores yet to report on: see memtail status")
    settings = Settings()
    dataset = fetch(store, record.canonical["dataset"]["fingerprint"], settings.cache, settings.cache_limit)
    studies = load_results(store, name)
    with _scores(store, name, published) as scores:
        content = choose_content(record, scores, dataset, studies, different)
    figures = draw(content)
    files = {PAGE: render(content, figures, dataset, published.version).encode()}
    for figure, encoded in figures.items():
        files |= {f"{figure}.{kind}": data for kind, data in encoded.items()}
    digest = hashlib.sha256(b"".join(files[file] for file in sorted(files))).hexdigest()[:8]
    version = f"{published.version.partition('-')[0]}-{digest}"
    experiment_store.check_registered(record.fingerprint)  # removed while it was drawn
    for file, data in files.items():
        store.put(keys.report(name, version) + file, data)
    pointer = ReportPointer(version, sorted(files), PAGE, published.version, _finish_times(studies), len(different))
    previous = latest_report(store, name)
    if previous is None or previous.trials <= pointer.trials:
        store.put(keys.latest_report(name), pointer.to_json().encode())
        _remove_superseded(store, name, pointer, previous)
    return pointer


def fetch_report(store: ObjectStore, name: str, pointer: ReportPointer, folder: Path) -> None:
    """Copy the files of a report to a folder. Raises: StoreError."""
    for file in pointer.files:
        store.download(keys.check(keys.report(name, pointer.version) + file), folder / file)


@contextmanager
def _scores(store: ObjectStore, name: str, pointer: ScorePointer) -> Iterator[Scores]:
    """Open the scores in a local store, or a temporary copy of the files needed."""
    if folder := store.local_path(keys.scores(name, pointer.version).rstrip("/")):
        yield Scores(folder)
        return
    with tempfile.TemporaryDirectory(prefix="memtail-") as temporary:
        fetch_scores(store, name, pointer.only(_SCORE_FILES), Path(temporary))
        yield Scores(Path(temporary))


def _different(experiment_store: ExperimentStore) -> list[Shard]:
    return [shard for shard, differs in experiment_store.trained_twice().items() if differs]


def _finish_times(studies: list[StudyResult]) -> dict[str, str]:
    return {study.study: study.finished for study in studies}


def _remove_superseded(store: ObjectStore, name: str, pointer: ReportPointer, previous: ReportPointer | None) -> None:
    """Remove earlier versions, except the previous one, which a reader may still be reading.

    Versions of more trials stay: another process may be writing them.
    """
    kept = {pointer.version} if previous is None else {pointer.version, previous.version}
    for version in list(store.folders(keys.all_reports(name))):
        if version not in kept and version.partition("-")[0] <= pointer.trials:
            for key in list(store.list(keys.report(name, version))):
                store.delete(key)
