"""Publishes scores: moves a version of them into the store, and then the pointer to it."""

import hashlib
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from memtail.datasets import ImageDataset
from memtail.errors import ScoresError
from memtail.experiment_store import Record
from memtail.scores.files import write_scores
from memtail.scores.pointer import ScorePointer, latest_version, superseded
from memtail.scores.summary import ScoreSummary
from memtail.statistics import Statistics
from memtail.storage import ObjectStore, keys


def publish(store: ObjectStore, record: Record, statistics: Statistics, dataset: ImageDataset) -> ScoreSummary:
    """Write the scores of all accumulated trials and point readers to them.

    The name of the version is derived from the counted trials, so publishing equal trials twice writes one version. The pointer does not
    move if another run of the experiment has published more trials.

    Args:
        store: for the scores.
        record: of the experiment.
        statistics: of its trials.
        dataset: of the experiment.

    Returns:
        The summary of the version.

    Raises:
        ScoresError: no trial counts.
        StoreError: the store cannot be read or written.
    """
    if statistics.trials == 0:
        fix = "lower the learning rate" if statistics.diverged else "run it first"
        raise ScoresError(f"experiment '{record.experiment.name}' has no trial to take scores from ({statistics.diverged} diverged): {fix}")
    name = record.experiment.name
    version = _version(record.fingerprint, statistics)
    current = latest_version(store, name)
    if current is not None and current.version == version:
        return current.summary
    with tempfile.TemporaryDirectory(prefix="memtail-") as temporary:
        folder = Path(temporary)
        summary = write_scores(folder, name, record.fingerprint, statistics, dataset)
        files = sorted(path.name for path in folder.iterdir())
        for file in files:
            store.upload(keys.scores(name, version) + file, folder / file)
    if (
        current is not None
        and current.summary.accumulated_trials > summary.accumulated_trials
        and current.summary.fingerprint == record.fingerprint
    ):
        return summary
    pointer = ScorePointer(version, datetime.now(UTC).isoformat(timespec="seconds"), tuple(files), summary)
    store.put(keys.latest_scores(name), pointer.to_json().encode())
    _remove_old(store, name, version)
    return summary


def versions(store: ObjectStore, name: str) -> list[str]:
    """List the versions in the store, by number of trials."""
    return list(store.folders(keys.all_scores(name)))


def _version(fingerprint: str, statistics: Statistics) -> str:
    outcomes = [[trial, statistics.metrics[trial].diverged] for trial in sorted(statistics.metrics)]
    return f"{statistics.trials:08d}-{hashlib.sha256(f'{fingerprint} {outcomes}'.encode()).hexdigest()[:8]}"


def _remove_old(store: ObjectStore, name: str, current: str) -> None:
    # not the versions after it, which another run may be writing
    for version in superseded(versions(store, name), current):
        for key in list(store.list(keys.scores(name, version))):
            store.delete(key)
