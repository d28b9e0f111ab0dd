"""Published scores out of any store: read where they lie in a folder, else copied to the cache first."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memtail.errors import ScoresError
from memtail.scores.names import LATEST, SUMMARY
from memtail.scores.pointer import KEPT_VERSIONS, latest_version
from memtail.scores.reader import Scores
from memtail.settings import Settings
from memtail.storage import ObjectStore, keys
from memtail.storage.open import is_url, open_store


def load_scores(path: str | Path) -> Scores:
    """Open published scores.

    Args:
        path: a folder of score files; or an experiment in a store, `STORE/experiments/NAME`, whose latest version is taken. Of a store in a
            bucket it is copied to the cache.

    Raises:
        ScoresError: there are none.
        StoreError: the bucket cannot be read.
    """
    if is_url(path):
        address, _, name = str(path).rstrip("/").rpartition("/experiments/")
        return open_scores(open_store(address, verify=False), name)
    path = Path(path)
    for scores in (path, path / "scores"):
        if (scores / LATEST).is_file():
            try:
                return Scores(scores / json.loads((scores / LATEST).read_text())["version"])
            except (OSError, ValueError, KeyError, TypeError, ScoresError) as error:
                raise ScoresError(f"{scores / LATEST}: is damaged, or names scores that are ({error}): run the experiment again") from None
    if not (path / SUMMARY).is_file():
        raise ScoresError(f"{path}: holds no scores: give a folder with summary.json, or STORE/experiments/NAME after a run")
    return Scores(path)


def open_scores(store: ObjectStore, name: str, files: Sequence[str] | None = None) -> Scores:
    """The latest scores of an experiment. What is in the cache is not copied again.

    Args:
        store, name: where they are.
        files: those that will be read; by default all.

    Raises:
        ScoresError: there are none, or they are damaged.
        StoreError: the store cannot be read, or the cache not written.
    """
    if local := store.local_path(keys.all_scores(name).rstrip("/")):
        return load_scores(local)
    pointer = latest_version(store, name)
    if pointer is None:
        raise ScoresError(f"experiment '{name}' has no published scores yet: see memtail status")
    place = hashlib.sha256(store.address.encode()).hexdigest()[:16]
    folder = Settings().cache / "scores" / place / keys.check(f"{name}/{pointer['version']}")
    fetch_scores(store, name, pointer if files is None else {**pointer, "files": files}, folder, again=False)
    _remove_old(folder)
    return Scores(folder)


def fetch_scores(store: ObjectStore, name: str, pointer: dict[str, Any], folder: Path, *, again: bool = True) -> None:
    """Copy the files of the version that a pointer names to a folder.

    Args:
        store, name: where they are.
        pointer: as `latest_version` gives it.
        folder: where they go; each file appears whole.
        again: whether to copy those that are there already.

    Raises:
        StoreError: the store cannot be read, or the folder not written.
    """
    for file in pointer["files"]:
        key = keys.check(keys.scores(name, pointer["version"]) + file)
        if again or not (folder / file).is_file():
            store.download(key, folder / file)


def _remove_old(current: Path) -> None:
    """Leave in the cache as many versions of an experiment as the store keeps: a reader may have begun to read the one before."""
    try:
        others = sorted(folder for folder in current.parent.iterdir() if folder.is_dir() and folder.name < current.name)
    except OSError as error:
        raise ScoresError(f"{current.parent} cannot be listed ({error.strerror}): set MEMTAIL_CACHE to another folder") from None
    for folder in others[: max(0, len(others) - KEPT_VERSIONS + 1)]:
        shutil.rmtree(folder, ignore_errors=True)
