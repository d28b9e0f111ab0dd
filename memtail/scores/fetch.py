"""Opens published scores in any store: in place in a folder, else copied to the cache first."""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from memtail.errors import ScoresError
from memtail.scores.names import LATEST, SUMMARY
from memtail.scores.pointer import ScorePointer, latest_version, superseded
from memtail.scores.reader import Scores
from memtail.settings import Settings
from memtail.storage import ObjectStore, keys
from memtail.storage.open import is_url, open_store


def load_scores(path: str | Path) -> Scores:
    """Open published scores.

    Args:
        path: a folder of score files, or `STORE/experiments/NAME` for the latest version of an experiment in a store. If the store is a
            bucket, the files are copied to the cache.

    Raises:
        ScoresError: there are no scores, or they are damaged, or the address names no experiment.
        StoreError: the bucket cannot be read.
    """
    if is_url(path):
        address, _, name = str(path).rstrip("/").rpartition("/experiments/")
        if not address:
            raise ScoresError(f"{path}: names no experiment: give STORE/experiments/NAME")
        return open_scores(open_store(address, verify=False), name)
    path = Path(path)
    for scores in (path, path / "scores"):
        if (scores / LATEST).is_file():
            try:
                return Scores(scores / ScorePointer.from_json((scores / LATEST).read_bytes()).version)
            except (OSError, ValueError, KeyError, TypeError, ScoresError) as error:
                raise ScoresError(f"{scores / LATEST}: is damaged, or names scores that are ({error}): run the experiment again") from None
    if not (path / SUMMARY).is_file():
        raise ScoresError(f"{path}: holds no scores: give a folder with summary.json, or STORE/experiments/NAME after a run")
    return Scores(path)


def open_scores(store: ObjectStore, name: str, files: Sequence[str] | None = None) -> Scores:
    """Open the latest scores of an experiment; files in the cache are not copied again.

    Args:
        store: with the experiment.
        name: of the experiment.
        files: names of those to be read, if they are published; by default all.

    Raises:
        ScoresError: there are no scores, or they are damaged.
        StoreError: the store cannot be read, or the cache cannot be written.
    """
    if local := store.local_path(keys.all_scores(name).rstrip("/")):
        return load_scores(local)
    pointer = latest_version(store, name)
    if pointer is None:
        raise ScoresError(f"experiment '{name}' has no published scores yet: see memtail status")
    digest = hashlib.sha256(store.address.encode()).hexdigest()[:16]
    folder = Settings().cache / "scores" / digest / keys.check(f"{name}/{pointer.version}")
    fetch_scores(store, name, pointer if files is None else pointer.only(files), folder, again=False)
    _remove_old(folder)
    return Scores(folder)


def fetch_scores(store: ObjectStore, name: str, pointer: ScorePointer, folder: Path, *, again: bool = True) -> None:
    """Copy a pointer's files to a folder.

    Args:
        store: with the experiment.
        name: of the experiment.
        pointer: from `latest_version`.
        folder: the destination; each file appears whole.
        again: whether to copy files that the folder has already.

    Raises:
        StoreError: the store cannot be read, or the folder cannot be written.
    """
    for file in pointer.files:
        key = keys.check(keys.scores(name, pointer.version) + file)
        if again or not (folder / file).is_file():
            store.download(key, folder / file)


def _remove_old(current: Path) -> None:
    """Keep as many versions in the cache as the store does, for readers that have begun to read the previous one."""
    try:
        cached = [folder.name for folder in current.parent.iterdir() if folder.is_dir()]
    except OSError as error:
        raise ScoresError(f"{current.parent} cannot be listed ({error.strerror}): set MEMTAIL_CACHE to another folder") from None
    for version in superseded(cached, current.name):
        shutil.rmtree(current.parent / version, ignore_errors=True)
