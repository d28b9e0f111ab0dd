"""Stores: the conformance suite on each, temporary files of a folder, and openers by scheme."""

import os
import threading
import time

import pytest

from memtail.errors import StoreError
from memtail.storage import keys
from memtail.storage import open as open_module
from memtail.storage.local import LocalStore
from memtail.storage.open import open_store
from memtail.storage.proof import WRITERS, prove_races
from memtail.storage.s3 import S3Store
from memtail.testing import ObjectStoreContract


class TestLocalStore(ObjectStoreContract):
    @pytest.fixture
    def store(self, tmp_path):
        return LocalStore(tmp_path / "store")


class TestS3Store(ObjectStoreContract):
    @pytest.fixture
    def store(self, minio, monkeypatch):
        for variable, value in minio.environment().items():
            monkeypatch.setenv(variable, value)
        return S3Store(minio.new_bucket(), "some/prefix")


def test_a_sweep_removes_temporary_files_last_written_more_than_a_day_ago(tmp_path):
    store = LocalStore(tmp_path)
    store.put("k", b"")
    for name, hours in (("abandoned", 25), ("in-progress", 23)):
        file = tmp_path / ".unfinished" / name
        file.write_bytes(b"half an obj")
        os.utime(file, (time.time() - hours * 3600,) * 2)
    os.utime(tmp_path / ".unfinished" / ".lock", (0, 0))
    store.sweep()
    assert sorted(file.name for file in (tmp_path / ".unfinished").iterdir()) == [".lock", "in-progress"]
    assert list(store.list("")) == ["k"]


def test_a_further_store_is_opened_by_the_scheme_of_its_url(tmp_path, monkeypatch):
    opened = []

    def opener(address, **options):
        opened.append((address, options))
        return LocalStore(tmp_path)

    monkeypatch.setitem(open_module._OPENERS, "mem", opener)
    assert open_store("mem://x", verify=False, patience=3).address == str(tmp_path)
    assert opened == [("mem://x", {"verify": False, "patience": 3, "timeout": 60.0, "observe": None})]
    with pytest.raises(StoreError, match="memo://x is not the address of a store"):
        open_store("memo://x")


def test_a_file_in_place_of_the_folder_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        LocalStore(tmp_path / "file").put("k", b"")


def test_keys_are_parsed_to_their_shards():
    assert keys.parse_span(keys.trial_batch("x", 64, 127)) == (64, 127)
    assert keys.parse_span(keys.failure("x", 0, 9, 2)) == (0, 9)


def test_a_check_whose_threads_cannot_all_start_is_one_clear_error(tmp_path, monkeypatch):
    start, started = threading.Thread.start, []

    def limited(thread):
        if len(started) == WRITERS // 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    store = LocalStore(tmp_path)
    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(StoreError, match=r"16 threads do not start \(can't start new thread\): raise the limit of processes"):
        prove_races(store, store)
    monkeypatch.undo()
    assert prove_races(store, store) is None
