"""Names of experiments in a store: those that are taken, those that are marked as changed, and those with leftovers of another one."""

import json
from collections.abc import Container
from contextlib import suppress
from itertools import islice

from memtail.errors import ForeignObjectError, ObjectNotFound, StoreError
from memtail.spec.experiment import NAME
from memtail.storage import ObjectStore, keys
from memtail.trials import TrialBatch


def experiment_names(store: ObjectStore, known: Container[str] = ()) -> list[str]:
    """List the names of all experiments in a store, ascending.

    Args:
        store: the store.
        known: names whose record is not looked up again while there is any object of the experiment.
    """
    names = (name for name in store.folders(keys.experiments()) if NAME.fullmatch(name))
    return [name for name in names if name in known or store.exists(keys.experiment(name))]


def change_tags(store: ObjectStore) -> dict[str, str]:
    """List the names of the experiments with a change marker, and tags that differ when a marker is written again."""
    return {key.removeprefix(keys.changes()): tag for key, tag in store.list_tagged(keys.changes())}


def refuse_leftovers(store: ObjectStore, name: str, fingerprint: str) -> None:
    """Refuse a name without a record under which an experiment of another fingerprint left trials or scores.

    Those of this experiment will count.

    Raises:
        StoreError: there are such objects, or the store cannot be read.
    """
    for key in islice(store.list(keys.trials(name)), 1):
        with suppress(ObjectNotFound, ForeignObjectError):  # a damaged batch is refused later
            if TrialBatch.from_bytes(store.get(key), key).fingerprint != fingerprint:
                raise _left(store, name, "trials", key)
    with suppress(ObjectNotFound, ValueError, KeyError, TypeError):  # a damaged pointer is replaced
        if json.loads(store.get(keys.latest_scores(name)))["summary"]["fingerprint"] != fingerprint:
            raise _left(store, name, "scores", keys.latest_scores(name))


def _left(store: ObjectStore, name: str, what: str, key: str) -> StoreError:
    return StoreError(
        f"{what} of another experiment '{name}', whose record was removed, are left in {store.address} ({key}): "
        f"memtail remove {name}, or choose another name"
    )
