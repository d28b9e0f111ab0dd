"""Files that a declaration names, in a store: the masks of an explicit design, and the weights that networks start from.

They are staged once, by the digest of their content, and fetched into the cache of each machine that needs them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memtail.datasets.cache_lock import exclusive, usable
from memtail.digests import file_digest
from memtail.errors import DatasetError
from memtail.spec import Experiment
from memtail.storage import ObjectNotFound, ObjectStore, keys


def stage_inputs(experiment: Experiment, canonical: dict[str, Any], store: ObjectStore) -> None:
    """Upload the masks and the weights of an experiment, unless the store has them.

    Args:
        experiment: the declaration.
        canonical: the canonical declaration, which holds their digests.
        store: the store.

    Raises:
        StoreError: the store cannot be written.
    """
    for path, key, _ in _inputs(experiment, canonical):
        if not store.exists(key):
            store.upload(key, path)


def fetch_inputs(experiment: Experiment, canonical: dict[str, Any], store: ObjectStore, cache: Path) -> Experiment:
    """Return an experiment with its masks and weights, if any, in files of this machine; they are downloaded unless the cache has them.

    Args:
        experiment: the declaration.
        canonical: the canonical declaration, which holds their digests.
        store: the store.
        cache: the folder of the cache.

    Raises:
        DatasetError: a file is not staged, or is damaged in the store; or the cache cannot be written.
        StoreError: the store cannot be read.
    """
    files = {path: _fetch(store, keys.check(key), digest, cache) for path, key, digest in _inputs(experiment, canonical)}
    return experiment.with_files(files)


def _inputs(experiment: Experiment, canonical: dict[str, Any]) -> Iterator[tuple[Path, str, str]]:
    """Yield the declared path, the key and the digest of each file."""
    if (masks := experiment.subsets.masks) is not None:
        digest = str(canonical["subsets"]["masks"])
        yield masks, keys.masks(digest), digest
    if (weights := experiment.model.weights_file) is not None:
        digest = str(canonical["model"]["weights"])
        yield weights, keys.weights(digest), digest


def _fetch(store: ObjectStore, key: str, digest: str, cache: Path) -> Path:
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
