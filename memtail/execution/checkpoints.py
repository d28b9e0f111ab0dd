"""Checkpoints of unfinished shards, kept in the store."""

import structlog

from memtail.errors import StoreError
from memtail.storage import ObjectNotFound, ObjectStore, keys
from memtail.trials import Shard

log = structlog.get_logger()


class StoredCheckpoints:
    """`memtail.trainers.images.Checkpoints` of one shard.

    A checkpoint only saves time, so a store that refuses one never ends training: the refusal is logged.

    Args:
        store: the object store.
        name: name of the experiment.
        shard: the unfinished shard.
    """

    def __init__(self, store: ObjectStore, name: str, shard: Shard) -> None:
        self._store = store
        self._key = keys.checkpoint(name, shard.first, shard.last)

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

    def remove(self) -> None:
        """Remove the saved state of a committed shard; log a store that refuses."""
        try:
            self._store.delete(self._key)
        except StoreError as error:
            log.warning("checkpoint not removed", key=self._key, error=str(error))
