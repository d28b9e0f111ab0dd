"""Removal of objects that are not needed any more: an experiment, the trial batches of a finished one, and what no experiment needs.

Each removal is planned as a list of objects in a safe order. One that was interrupted is completed by planning and carrying it out again.
"""

import json
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from itertools import groupby

from memtail.errors import ScoresError, StoreError, UnreachableError, UnsupportedError
from memtail.execution.checkpoints import left_over
from memtail.execution.progress import progress_of
from memtail.experiment_store import ExperimentStore, Finished
from memtail.scores.pointer import latest_version
from memtail.spec.experiment import NAME
from memtail.storage import ObjectNotFound, ObjectStore, Stored, keys

# Kinds of objects by the folder or file below an experiment; the others are records.
_KINDS = {
    "trials": "trial batches",
    "checkpoints": "checkpoints",
    "models": "models",
    "statistics": "snapshot",
    "scores": "scores",
    "report": "report",
    "studies": "studies",
}
# Size in bytes of the largest record that is read.
_RECORD = 16 << 20


def kind_of(key: str) -> str:
    """Name the kind of an object."""
    top, _, rest = key.partition("/")
    return _KINDS.get(rest.split("/")[1], "records") if top == "experiments" else top


def planned_removal(store: ObjectStore, name: str) -> list[Stored]:
    """List all objects of an experiment.

    The record comes first: from then on nothing is sent to workers, and commits are refused. The experiment may have none any more, after
    an interrupted removal.

    Raises:
        ObjectNotFound: there is nothing of this name.
        StoreError: the experiment is running, or the store cannot be read.
    """
    stored = list(store.inventory(keys.everything(name))) if NAME.fullmatch(name) else []
    if not stored:
        raise ObjectNotFound(f"there is nothing of an experiment '{name}' in {store.address}: list the experiments with memtail status")
    _refuse_running(store, name)
    return sorted(stored, key=lambda each: each.key != keys.experiment(name))


def remove(store: ObjectStore, name: str, planned: Iterable[Stored]) -> None:
    """Carry out a planned removal.

    Raises:
        StoreError: the experiment is running again, or was submitted again meanwhile; or the store cannot be written.
    """
    _refuse_running(store, name)
    _delete(store, planned)
    written = list(store.inventory(keys.everything(name)))  # by workers, meanwhile
    store.delete(keys.change(name))
    if store.exists(keys.experiment(name)):
        ExperimentStore(store, name).mark_changed()  # the marker may have been of this experiment
        raise StoreError(
            f"experiment '{name}' was submitted again while it was removed, and is kept: see memtail status {name}, "
            f"and set its priority again"
        )
    _delete(store, written)


def _refuse_running(store: ObjectStore, name: str) -> None:
    if _is_running(store, name):
        raise StoreError(f"experiment '{name}' is running: stop it first with memtail cancel {name}")


def _is_running(store: ObjectStore, name: str) -> bool:
    try:
        return progress_of(store, name).ending is None
    except UnreachableError:
        raise
    except ObjectNotFound:
        return False
    except UnsupportedError:
        return ExperimentStore(store, name).control().state != "cancelled"
    except StoreError:  # damaged, so that no service works on it
        return False


def planned_archival(store: ObjectStore, name: str) -> list[Stored]:
    """List the objects of a finished experiment that its scores and report do not need: snapshot, checkpoints and trial batches.

    Raises:
        ObjectNotFound: there is no experiment of this name.
        ScoresError: published files are missing.
        StoreError: the experiment is not finished, or the store cannot be read.
    """
    finished, _ = _finished(store, name)
    pointer = latest_version(store, name)
    if pointer is None or pointer.version != finished.version:
        raise ScoresError(f"the scores of experiment '{name}' are missing: publish them again with memtail resume {name}")
    lost = next((key for file in pointer.files if not store.exists(key := keys.scores(name, pointer.version) + file)), None)
    if lost:
        raise ScoresError(f"{lost} is missing: remove {keys.latest_scores(name)}, then memtail resume {name} publishes it again")
    prefixes = keys.statistics(name), keys.checkpoints(name), keys.trials(name)
    return [stored for prefix in prefixes for stored in store.inventory(prefix)]


def archive(store: ObjectStore, name: str, planned: Iterable[Stored]) -> None:
    """Carry out a planned archival.

    Raises:
        StoreError: the experiment is not finished any more, was changed meanwhile, or the store cannot be written.
    """
    (finished, tag), when = _finished(store, name), datetime.now(UTC).isoformat(timespec="seconds")
    archived = replace(finished, archived=finished.archived or when)
    if not store.put_if_match(keys.finished(name), archived.to_bytes(), tag):
        raise StoreError(f"experiment '{name}' was changed meanwhile: look at memtail status {name}, then archive it again")
    _finished(store, name)  # not extended meanwhile
    _delete(store, planned)


def _finished(store: ObjectStore, name: str) -> tuple[Finished, str]:
    """Read the record of an experiment's end, and a tag that it does not have any more if it was replaced since."""
    experiment_store = ExperimentStore(store, name)
    record = experiment_store.read_record()
    with suppress(ObjectNotFound):
        tag = store.get_tagged(keys.finished(name))[1]
        if finished := experiment_store.finished(record):
            return finished, tag
    raise StoreError(
        f"experiment '{name}' is not finished, so its trial batches are needed: see memtail status {name}; "
        f"memtail run SPEC or the aggregator records the end"
    )


def planned_collection(store: ObjectStore, seconds: float, clock: Callable[[], float] = time.time) -> list[Stored]:
    """List datasets, masks and weights that no experiment needs, and checkpoints from which no shard continues.

    Args:
        store: the store.
        seconds: age below which nothing is listed: a dataset is staged before its experiment is registered.
        clock: Unix time.

    Raises:
        StoreError: a record cannot be read, so that it is unknown what the experiment needs; or the store cannot be read.
    """
    before = clock() - seconds
    needed = _needed(store)
    planned: list[Stored] = []
    for fingerprint, files in groupby(store.inventory(keys.datasets()), lambda each: _digest(each.key)):
        dataset = list(files)
        if fingerprint not in needed and all(each.modified < before for each in dataset):
            # the manifest first: without it a dataset is staged again
            planned += sorted(dataset, key=lambda each: each.key != _manifest(fingerprint))
    inputs = [each for prefix in (keys.all_masks(), keys.all_weights()) for each in store.inventory(prefix)]
    inputs = [each for each in inputs if _digest(each.key) not in needed]
    return planned + [each for each in inputs + _useless_checkpoints(store) if each.modified < before]


def _digest(key: str) -> str:
    """The fingerprint of a dataset, the digest of masks or weights, or the name of a checkpoint's experiment, in a key."""
    return key.split("/")[1].removesuffix(".npy")


def _manifest(fingerprint: str) -> str:
    return keys.dataset(fingerprint, "manifest.json")


def collect(store: ObjectStore, planned: Iterable[Stored]) -> None:
    """Carry out a planned collection, without what has come to be needed since, or was written again.

    A dataset that is being staged is left alone as a whole: its objects are written before the experiment that needs it.

    Raises:
        StoreError: the store cannot be read or written.
    """
    for kind, objects in groupby(planned, lambda each: kind_of(each.key)):
        for digest, files in groupby(objects, lambda each: _digest(each.key)):
            old = list(files)
            if kind == "checkpoints":
                current = set(store.inventory(keys.checkpoints(digest)))
                _delete(store, [each for each in old if each in current])
            else:
                prefix = {"datasets": keys.dataset(digest, ""), "masks": keys.masks(digest), "weights": keys.weights(digest)}[kind]
                if set(store.inventory(prefix)) <= set(old) and digest not in _needed(store):
                    _delete(store, old)
                    if kind == "datasets":
                        store.delete(_manifest(digest))  # if it was staged meanwhile, it lacks objects, and is to be staged again


def _needed(store: ObjectStore) -> set[str]:
    """The fingerprints of datasets and digests of masks and weights that experiments name; records of any version are read."""
    needed: set[str] = set()
    for name in store.folders(keys.experiments()):
        try:
            canonical = json.loads(store.get(keys.experiment(name), limit=_RECORD))["canonical"]
            needed |= {canonical["dataset"]["fingerprint"], canonical["subsets"].get("masks"), canonical["model"].get("weights")}
            needed.add(json.loads(store.get(keys.features(name), limit=_RECORD))["dataset"])
        except ObjectNotFound:
            continue
        except (ValueError, KeyError, TypeError, AttributeError):
            raise StoreError(
                f"an object of experiment '{name}' is damaged, so it is unknown which datasets it needs: "
                f"restore {keys.experiment(name)} and {keys.features(name)}, or memtail remove {name}"
            ) from None
    return needed


def _useless_checkpoints(store: ObjectStore) -> list[Stored]:
    """Checkpoints from which no shard continues, of finished experiments, and of experiments that are removed."""
    found: list[Stored] = []
    for name in store.folders(keys.experiments()):
        checkpoints = list(store.inventory(keys.checkpoints(name))) if NAME.fullmatch(name) else []
        if not checkpoints:
            continue
        experiment_store = ExperimentStore(store, name)
        try:
            finished = experiment_store.finished(experiment_store.read_record()) is not None
        except ObjectNotFound:
            finished = True
        except UnsupportedError:  # left to the version that can read it
            continue
        useless = left_over(experiment_store, (each.key for each in checkpoints))
        found += [each for each in checkpoints if finished or each.key in useless]
    return found


def _delete(store: ObjectStore, objects: Iterable[Stored]) -> None:
    for each in objects:
        store.delete(each.key)
