"""Checkpoints of unfinished shards, and the models of their trained trials, kept in the store."""

from collections.abc import Iterable

import structlog

from memtail.errors import StoreError
from memtail.experiment_store import ExperimentStore
from memtail.storage import ObjectNotFound, keys
from memtail.trials import Shard

log = structlog.get_logger()


class StoredCheckpoints:
    """`memtail.trainers.checkpoints.Checkpoints` of one shard.

    A checkpoint only saves time, so a store that refuses one never ends training: the refusal is logged.

    Args:
        experiment_store: the experiment's objects.
        fingerprint: of the experiment.
        shard: the unfinished shard.
        second: whether it is trained a second time, for a comparison that must not begin with a state of the first training. The models
            of the first are kept.
    """

    def __init__(self, experiment_store: ExperimentStore, fingerprint: str, shard: Shard, second: bool = False) -> None:
        self._experiment_store, self._fingerprint, self._second = experiment_store, fingerprint, second
        self._store = experiment_store.store
        self._key = keys.checkpoint(experiment_store.name, shard.first, shard.last, second)

    def load(self) -> bytes | None:
        """Return the last saved state, None if there is none. Raises: StoreError."""
        try:
            return self._store.get(self._key)
        except ObjectNotFound:
            return None

    def save(self, state: bytes) -> None:
        """Replace the saved state; log a store that refuses it."""
        try:
            self._store.put(self._key, state)
        except StoreError as error:
            log.warning("checkpoint not written, training continues", key=self._key, error=str(error))

    def keep_model(self, trial: int, model: bytes) -> None:
        """Write the model of a trained trial, in place of that of an attempt that was interrupted.

        Raises:
            StoreError: the store refuses, or the experiment was removed, or another one has its name now.
        """
        if self._second:
            return
        self._experiment_store.check_registered(self._fingerprint)
        self._store.put(keys.model(self._experiment_store.name, trial), model)

    def remove(self) -> None:
        """Remove the saved state of a committed shard; log a store that refuses."""
        try:
            self._store.delete(self._key)
        except StoreError as error:
            log.warning("checkpoint not removed", key=self._key, error=str(error))


def left_over(experiment_store: ExperimentStore, checkpoints: Iterable[str]) -> set[str]:
    """Select those keys of checkpoints from which no training continues: the shard is committed, or for a second training, compared.

    Raises:
        StoreError: the store cannot be read.
    """
    committed, compared = set(experiment_store.committed()), experiment_store.trained_twice().keys()
    spans = ((key, keys.parse_span(key)) for key in checkpoints)
    return {key for key, span in spans if span and Shard(*span) in (compared if keys.is_second_checkpoint(key) else committed)}
