"""Publishes scores: moves a version of them into the store, and then the pointer to it."""

import hashlib
import tempfile
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from memtail.datasets import DatasetLabels
from memtail.errors import ScoresError, StoreError, UnreachableError
from memtail.experiment_store import ExperimentStore, Record
from memtail.scores.files import write_scores
from memtail.scores.pointer import ScorePointer, latest_version, superseded
from memtail.scores.summary import SCHEMA, ScoreSummary
from memtail.spec import ImportedTrainer
from memtail.statistics import Statistics
from memtail.storage import ObjectNotFound, ObjectStore, keys


def publish(
    store: ObjectStore,
    record: Record,
    statistics: Statistics,
    dataset: DatasetLabels,
    discards: int = 0,
    progress: Callable[[], object] = lambda: None,
) -> ScoreSummary:
    """Write the scores of all accumulated trials and point readers to them.

    The name of the version is derived from the bits of the counted trials, so publishing equal trials twice writes one version, and a
    replaced batch changes it. The pointer does not move if another run of the experiment has published more trials, unless batches were
    discarded since.

    Args:
        store: for the scores.
        record: of the experiment.
        statistics: of its trials.
        dataset: labels and names of the experiment's dataset.
        discards: number of records of discards when the trial batches of the statistics were listed. Those of a later discard may be
            counted, so that the next scores take the place of these.
        progress: called after each piece of work.

    Returns:
        The summary of the version.

    Raises:
        ScoresError: no trial counts.
        ObjectNotFound: the experiment was removed.
        StoreError: another experiment has the name now, or the store cannot be read or written.
    """
    if statistics.trials == 0:
        fix = "lower the learning rate" if statistics.diverged else "run it first"
        raise ScoresError(f"experiment '{record.experiment.name}' has no trial to take scores from ({statistics.diverged} diverged): {fix}")
    name = record.experiment.name
    version = score_version(record.fingerprint, statistics)
    current = latest_version(store, name)
    if current is not None and current.version == version and current.discards >= discards:
        return current.summary
    with tempfile.TemporaryDirectory(prefix="memtail-") as temporary:
        folder = Path(temporary)
        extendable = not isinstance(record.experiment.trainer, ImportedTrainer)
        summary = write_scores(folder, name, record.fingerprint, statistics, dataset, progress, extendable)
        files = sorted(path.name for path in folder.iterdir())
        for file in files:
            store.upload(keys.scores(name, version) + file, folder / file)
            progress()
    experiment_store = ExperimentStore(store, name)
    try:
        experiment_store.check_registered(record.fingerprint)
    except UnreachableError:
        raise
    except StoreError:  # removed while the files were written
        for file in files:
            store.delete(keys.scores(name, version) + file)
        raise
    pointer = ScorePointer(version, datetime.now(UTC).isoformat(timespec="seconds"), tuple(files), summary, discards)
    if _move_pointer(store, name, pointer):
        _remove_old(experiment_store, pointer)
    return summary


def _move_pointer(store: ObjectStore, name: str, pointer: ScorePointer) -> bool:
    """Point readers to a version, unless the pointer names a later one; it may have moved while the version was written."""
    key, data = keys.latest_scores(name), pointer.to_json().encode()
    while True:
        try:
            held, tag = store.get_tagged(key)
        except ObjectNotFound:
            if store.put_if_absent(key, data):
                return True
            continue
        with suppress(ValueError, KeyError, TypeError):  # a damaged pointer is replaced
            current = ScorePointer.from_json(held)
            if current.summary.fingerprint == pointer.summary.fingerprint and current.order > pointer.order:
                return False
        if store.put_if_match(key, data, tag):
            return True


def versions(store: ObjectStore, name: str) -> list[str]:
    """List the versions in the store, by number of trials."""
    return list(store.folders(keys.all_scores(name)))


def score_version(fingerprint: str, statistics: Statistics) -> str:
    """Name the version of the scores of these trials."""
    content = f"{fingerprint} {SCHEMA} {statistics.digest()}"
    return f"{statistics.trials:08d}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def _remove_old(experiment_store: ExperimentStore, current: ScorePointer) -> None:
    store, name = experiment_store.store, experiment_store.name
    # not the versions after it, which another run may be writing; after a discard one of fewer trials may take the place of this one
    old = superseded(versions(store, name), current.version)
    if old and experiment_store.discards() != current.discards:
        return
    for version in old:
        pointer = latest_version(store, name)
        if pointer is None or pointer.version != current.version:  # moved by another run, which removes what is old for it
            return
        for key in list(store.list(keys.scores(name, version))):
            store.delete(key)
