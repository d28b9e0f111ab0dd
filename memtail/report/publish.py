"""Making the report of an experiment from its published scores, and moving it into the store, with a pointer to it afterwards.

In `experiments/<name>/report/<version>/` lie `report.html` and each figure as SVG and PNG; `report/latest.json` names the version:
`version`, `files`, `page` (one of them), `scores` (the version of the scores that it is of) and `studies` (those that it shows).
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memtail.datasets.staged_dataset import fetch
from memtail.errors import ScoresError
from memtail.experiment_store import ExperimentStore
from memtail.scores.fetch import fetch_scores
from memtail.scores.names import MEMORIZATION, PAIRS_TABLE, STATISTICS, SUMMARY
from memtail.scores.pointer import latest_version
from memtail.scores.reader import Scores
from memtail.settings import Settings
from memtail.storage import ObjectNotFound, ObjectStore, keys
from memtail.studies.result import StudyResult, load_results

#: The page's file.
PAGE = "report.html"
# The score files that the report is made of.
_NEEDED = (MEMORIZATION, PAIRS_TABLE, STATISTICS, SUMMARY)


def latest_report(store: ObjectStore, name: str) -> dict[str, Any] | None:
    """The pointer to the latest report; None if there is none."""
    try:
        pointer: dict[str, Any] = json.loads(store.get(keys.latest_report(name)))
        return pointer if {"version", "files", "page", "scores", "studies"} <= pointer.keys() else None
    except (ObjectNotFound, ValueError, AttributeError):
        return None  # not there, or damaged: the next report writes it


def is_current(store: ObjectStore, name: str) -> bool:
    """Whether the latest report shows the latest scores and all studies."""
    report, scores = latest_report(store, name), latest_version(store, name)
    if report is None or scores is None:
        return False
    return (report["scores"], report["studies"]) == (scores["version"], _dates(load_results(store, name)))


def publish_report(store: ObjectStore, name: str) -> dict[str, Any]:
    """Make the report of the latest scores and studies, and point readers to it; returns the pointer.

    The version's name follows from the content: equal scores and studies give equal bytes. The pointer does not go back to
    scores of fewer trials.

    Raises:
        ScoresError: there are no scores, or they are damaged.
        DatasetError: the images are neither in the cache nor in the store.
        StoreError: the store cannot be read or written.
    """
    from memtail.report.content import content  # these take a moment to import
    from memtail.report.page import draw, render

    record = ExperimentStore(store, name).read_record()
    published = latest_version(store, name)
    if published is None:
        raise ScoresError(f"experiment '{name}' has no published scores yet to report on: see memtail status")
    settings = Settings()
    dataset = fetch(store, record.canonical["dataset"]["fingerprint"], settings.cache, settings.cache_limit)
    studies = load_results(store, name)
    with _scores(store, name, published) as scores:
        shown = content(record, scores, dataset, studies)
    figures = draw(shown)
    made = {PAGE: render(shown, figures, dataset, published["version"]).encode()}
    for figure, drawn in figures.items():
        made |= {f"{figure}.{kind}": data for kind, data in drawn.items()}
    digest = hashlib.sha256(b"".join(made[file] for file in sorted(made))).hexdigest()[:8]
    version = f"{published['version'].partition('-')[0]}-{digest}"
    for file, data in made.items():
        store.put(keys.report(name, version) + file, data)
    pointer = {
        "version": version,
        "files": sorted(made),
        "page": PAGE,
        "scores": published["version"],
        "studies": _dates(studies),
    }
    before = latest_report(store, name)
    if before is None or _trials(before["version"]) <= _trials(version):
        store.put(keys.latest_report(name), json.dumps(pointer, indent=1).encode())
        _remove_old(store, name, {version, before["version"]} if before else {version})
    return pointer


def fetch_report(store: ObjectStore, name: str, pointer: dict[str, Any], folder: Path) -> None:
    """Copy the files of the version that a pointer names to a folder. Raises: StoreError."""
    for file in pointer["files"]:
        store.download(keys.check(keys.report(name, pointer["version"]) + file), folder / file)


@contextmanager
def _scores(store: ObjectStore, name: str, pointer: dict[str, Any]) -> Iterator[Scores]:
    """The scores where they lie, or for a while a copy of what is needed of them."""
    if folder := store.local_path(keys.scores(name, pointer["version"]).rstrip("/")):
        yield Scores(folder)
        return
    with tempfile.TemporaryDirectory(prefix="memtail-") as temporary:
        fetch_scores(store, name, {**pointer, "files": _NEEDED}, Path(temporary))
        yield Scores(Path(temporary))


def _dates(studies: list[StudyResult]) -> dict[str, str]:
    return {study.study: study.finished for study in studies}


def _trials(version: str) -> str:
    return version.partition("-")[0]


def _remove_old(store: ObjectStore, name: str, kept: set[str]) -> None:
    """Leave the version before, which a reader may have begun to read, and those of more trials, which may be in the making."""
    newest = max(map(_trials, kept))
    for version in list(store.folders(keys.all_reports(name))):
        if version not in kept and _trials(version) <= newest:
            for key in list(store.list(keys.report(name, version))):
                store.delete(key)
