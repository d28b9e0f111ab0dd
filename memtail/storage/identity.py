"""Identity of a store: a small random object at its root, which is written once.

Services of a store recognize each other in Redis by it, under whatever name they reach the store's server.
"""

import json
import uuid

from memtail.errors import ObjectNotFound
from memtail.storage import ObjectStore, keys

# Largest object that is read; any content identifies a store.
_LARGEST = 4096


def read_identity(store: ObjectStore) -> bytes | None:
    """Return the identity of a store; None if it has none. Raises: StoreError."""
    try:
        return store.get(keys.identity(), _LARGEST)
    except ObjectNotFound:
        return None


def make_identity(store: ObjectStore) -> bytes:
    """Return the identity of a store, after writing one if it has none. Raises: StoreError."""
    while (identity := read_identity(store)) is None:
        store.put_if_absent(keys.identity(), json.dumps({"id": uuid.uuid4().hex}).encode())
    return identity
