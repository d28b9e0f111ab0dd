"""Masks of explicit designs in a store: staged once, and fetched into the cache of each machine that needs them."""

from pathlib import Path

from memtail.datasets.cache_lock import exclusive, usable
from memtail.digests import file_digest
from memtail.errors import DatasetError
from memtail.storage import ObjectNotFound, ObjectStore, keys


def stage_masks(masks: Path, digest: str, store: ObjectStore) -> None:
    """Upload the masks of an explicit design, unless the store has them.

    Args:
        masks: the .npy file.
        digest: its SHA-256 (hex).
        store: the store.

    Raises:
        StoreError: the store cannot be written.
    """
    if not store.exists(keys.masks(digest)):
        store.upload(keys.masks(digest), masks)


def fetch_masks(store: ObjectStore, digest: str, cache: Path) -> Path:
    """Return the file of an explicit design's masks, downloaded unless the cache has it.

    Args:
        store: the store.
        digest: SHA-256 (hex) of the file.
        cache: the folder of the cache.

    Raises:
        DatasetError: the masks are not staged, or are damaged in the store; or the cache cannot be written.
        StoreError: the store cannot be read.
    """
    key = keys.check(keys.masks(digest))
    path = cache / key
    if path.exists():
        return path
    with usable(path.parent), exclusive(path):
        if not path.exists():  # another process may have fetched it meanwhile
            unfinished = path.with_suffix(".unfinished")
            try:
                store.download(key, unfinished)
            except ObjectNotFound:
                raise DatasetError(f"{key} is not in {store.address}: memtail submit SPEC puts it there") from None
            if file_digest(unfinished) != digest:
                raise DatasetError(f"{key} in {store.address} is damaged: remove it, then memtail submit SPEC")
            unfinished.rename(path)
    return path
