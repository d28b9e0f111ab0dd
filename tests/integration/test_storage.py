"""One conformance suite for every object store; another store is one more entry in STORES."""

import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from memtail.errors import StoreError
from memtail.storage import ObjectNotFound, keys
from memtail.storage.local import LocalStore

STORES = {"local": lambda tmp_path: LocalStore(tmp_path / "store")}


@pytest.fixture(params=STORES)
def store(request, tmp_path):
    return STORES[request.param](tmp_path)


def test_what_was_put_is_got(store):
    store.put("a/b", b"one")
    assert store.get("a/b") == b"one"
    store.put("a/b", b"two")
    assert store.get("a/b") == b"two"
    store.put("empty", b"")
    assert store.get("empty") == b""


def test_a_missing_object_is_named(store):
    with pytest.raises(ObjectNotFound, match="'a/missing'"):
        store.get("a/missing")
    store.put("a/b/c", b"")
    with pytest.raises(ObjectNotFound):
        store.get("a/b")


def test_the_first_writer_wins(store):
    assert store.put_if_absent("k", b"first")
    assert not store.put_if_absent("k", b"second")
    assert store.get("k") == b"first"


def test_of_many_concurrent_writers_exactly_one_wins(store):
    for attempt in range(20):
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda value, key=f"k/{attempt}": store.put_if_absent(key, str(value).encode()), range(8)))
        assert sum(won) == 1
        assert store.get(f"k/{attempt}") == str(won.index(True)).encode()


def test_list_gives_keys_in_order_and_only_those_with_the_prefix(store):
    for key in ("x/b/2", "x/a", "x/b/10", "xy", "z/x/a"):
        store.put(key, b"")
    assert list(store.list("x/")) == ["x/a", "x/b/10", "x/b/2"]
    assert list(store.list("x")) == ["x/a", "x/b/10", "x/b/2", "xy"]
    assert list(store.list("x/b/1")) == ["x/b/10"]
    assert list(store.list("nothing/")) == []
    assert list(store.list("")) == ["x/a", "x/b/10", "x/b/2", "xy", "z/x/a"]


def test_delete_removes_and_is_silent_about_what_is_not_there(store):
    store.put("k", b"")
    store.delete("k")
    store.delete("k")
    with pytest.raises(ObjectNotFound):
        store.get("k")
    assert store.put_if_absent("k", b"again")


def test_files_go_up_and_come_down_whole(store, tmp_path):
    (tmp_path / "up").write_bytes(os.urandom(3 << 20))
    store.upload("big", tmp_path / "up")
    store.download("big", tmp_path / "new" / "down")
    assert (tmp_path / "new" / "down").read_bytes() == (tmp_path / "up").read_bytes() == store.get("big")
    with pytest.raises(ObjectNotFound):
        store.download("missing", tmp_path / "new" / "missing")
    assert not (tmp_path / "new" / "missing").exists()


def test_keys_that_leave_the_store_are_refused(tmp_path):
    for key in ("", "/etc/passwd", "../x", "a//b", "a/./b"):
        with pytest.raises(StoreError, match="is not a key"):
            LocalStore(tmp_path).put(key, b"")


def _write_for_ever(root):
    store = LocalStore(root)
    while True:
        store.put("object", os.urandom(1) * (4 << 20))


def test_a_writer_killed_half_way_leaves_the_whole_old_or_the_whole_new_object(tmp_path):
    store = LocalStore(tmp_path)
    store.put("object", b"\0" * (4 << 20))
    for _ in range(5):
        writer = multiprocessing.get_context("fork").Process(target=_write_for_ever, args=(tmp_path,))
        writer.start()
        before = time.monotonic()
        while time.monotonic() - before < 0.1:
            data = store.get("object")
            assert len(data) == 4 << 20 and len(set(data[:: 1 << 16])) == 1
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        data = store.get("object")
        assert len(data) == 4 << 20 and data == data[:1] * len(data)
    assert list(store.list("")) == ["object"]


def test_a_file_in_place_of_the_folder_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        LocalStore(tmp_path / "file").put("k", b"")


def test_keys_are_read_back_from_what_they_spell():
    assert keys.parse_span(keys.trial_batch("x", 64, 127)) == (64, 127)
    assert keys.parse_span(keys.failure("x", 0, 9, 2)) == (0, 9)
    assert keys.parse_experiment(keys.experiment("x")) == "x" and keys.parse_experiment(keys.latest_scores("x")) is None
