"""Drill: a bucket is copied as docs/operations/backup.md says, destroyed and restored; work goes on, and scores have the same bits."""

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

import memtail
from memtail.datasets.staged_dataset import fetch, stage
from memtail.execution import retention
from memtail.experiment_store import ExperimentStore
from memtail.scores.pointer import latest_version
from memtail.storage import keys
from memtail.storage.identity import make_identity, read_identity
from memtail.storage.local import LocalStore
from memtail.storage.s3 import S3Store

BACKUP = Path(__file__).parents[2] / "docs/operations/backup.md"
PER_SHARD, TRIALS = 4, 16


@pytest.fixture(params=["bucket", "folder"])
def new_store(request, tmp_path, monkeypatch):
    """Factory of empty stores."""
    if request.param == "folder":
        folders = iter(tmp_path / name for name in "abc")
        return lambda: LocalStore(next(folders))
    minio = request.getfixturevalue("minio")
    for variable, value in minio.environment().items():
        monkeypatch.setenv(variable, value)
    return lambda: S3Store(minio.new_bucket(), "team")


def copy(source, target, prefix="", exclude=()):
    """Copy objects one by one, in the order of their keys, as a mirror command does."""
    for key in source.list(prefix):
        if not any(fnmatch(f"/{key}", pattern) for pattern in exclude):
            target.put(key, source.get(key))


def scores(store, name):
    pointer = latest_version(store, name)
    return pointer.version, {file: store.get(keys.scores(name, pointer.version) + file) for file in pointer.files}


def test_a_store_is_backed_up_destroyed_and_restored(new_store, declare, digits, tmp_path):
    def declared(name):
        execution = {"trials_per_shard": PER_SHARD, "device": "cpu"}
        return declare(TRIALS, name=name, subsets={"design": "balanced"}, execution=execution, training={"epochs": 1})

    store = new_store()
    stage(digits, store)
    for name in ("archived", "finished", "half"):
        memtail.run(declared(name), store.address, dataset=digits)
    expected = {name: scores(store, name) for name in ("archived", "finished", "half")}
    half = ExperimentStore(store, "half")
    half.reopen("as if it had not ended")
    for shard in half.committed()[2:]:
        store.delete(keys.trial_batch("half", shard.first, shard.last))
    retention.archive(store, "archived", retention.planned_archival(store, "archived"))

    exclude = re.findall(r'--exclude "([^"]+)"', BACKUP.read_text())
    assert len(exclude) == 5
    make_identity(store)
    backup = LocalStore(tmp_path / "backup")
    copy(store, backup, exclude=exclude)
    copy(store, backup, "experiments/archived/")
    for key in list(store.list("")):
        store.delete(key)
    restored = new_store()
    copy(backup, restored)
    assert read_identity(restored) is None  # else services of both would share keys in Redis

    for name in ("archived", "finished", "half"):
        memtail.run(declared(name), restored.address, dataset=fetch(restored, digits.fingerprint, tmp_path / "cache"))
        assert scores(restored, name) == expected[name], name
    assert not list(restored.list(keys.trials("archived")))
    assert len(ExperimentStore(restored, "half").committed()) == TRIALS // PER_SHARD
