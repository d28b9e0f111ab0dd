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
from memtail.storage.open import open_store
from memtail.storage.s3 import S3Store


def _s3_store(request):
    minio = request.getfixturevalue("minio")
    return S3Store(minio.new_bucket(), "some/prefix", minio.settings())


STORES = {"local": lambda request: LocalStore(request.getfixturevalue("tmp_path") / "store"), "s3": _s3_store}


@pytest.fixture(params=STORES)
def store(request):
    return STORES[request.param](request)


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


@pytest.mark.parametrize("equal", [False, True])
def test_of_many_concurrent_writers_exactly_one_wins(store, equal):
    for attempt in range(20):
        values = [b"same" if equal else str(value).encode() for value in range(8)]
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda value, key=f"k/{attempt}": store.put_if_absent(key, value), values))
        assert sum(won) == 1
        assert store.get(f"k/{attempt}") == values[won.index(True)]


def test_list_gives_keys_in_order_and_only_those_with_the_prefix(store):
    for key in ("x/b/2", "x/a", "x/b/10", "xy", "z/x/a"):
        store.put(key, b"")
    assert list(store.list("x/")) == ["x/a", "x/b/10", "x/b/2"]
    assert list(store.list("x")) == ["x/a", "x/b/10", "x/b/2", "xy"]
    assert list(store.list("x/b/1")) == ["x/b/10"]
    assert list(store.list("nothing/")) == []
    assert list(store.list("")) == ["x/a", "x/b/10", "x/b/2", "xy", "z/x/a"]


def test_folders_gives_each_name_once_and_in_order_and_no_objects(store):
    for key in ("x/b/2", "x/b/1/deep", "x/b-c/1", "x/a/1", "x/ü +%/1", "x/file", "xy/1", "file"):
        store.put(key, b"")
    assert list(store.folders("x/")) == ["a", "b", "b-c", "ü +%"]
    assert list(store.folders("x/b/")) == ["1"]
    assert list(store.folders("")) == ["x", "xy"]
    assert list(store.folders("x/a/")) == list(store.folders("nothing/")) == list(store.folders("file/")) == []
    store.delete("x/a/1")
    assert list(store.folders("x/")) == ["b", "b-c", "ü +%"]


def test_an_object_exists_from_its_writing_to_its_removal(store):
    assert not store.exists("a/b")
    store.put("a/b", b"")
    assert store.exists("a/b")
    assert not store.exists("a")
    assert not store.exists("a/b/c")
    store.delete("a/b")
    assert not store.exists("a/b")


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


def test_a_large_object_is_refused_where_a_limit_is_given(store):
    store.put("k", b"12345")
    assert store.get("k", limit=5) == b"12345"
    with pytest.raises(StoreError, match="'k' has 5 bytes, more than the 4"):
        store.get("k", limit=4)
    assert store.get("k") == b"12345"


def test_keys_that_leave_the_store_are_refused(store, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for key in ("", "/etc/passwd", "../x", "a//b", "a/./b", "a/", "a\nb", "a\0b"):
        for action in (
            lambda key: store.put(key, b""),
            lambda key: store.put_if_absent(key, b""),
            store.get,
            store.exists,
            store.delete,
            lambda key: store.upload(key, tmp_path / "file"),
            lambda key: store.download(key, tmp_path / "file"),
        ):
            with pytest.raises(StoreError, match="is not a key"):
                action(key)


def test_a_file_that_cannot_be_read_or_written_is_one_clear_error(store, tmp_path):
    store.put("k", b"")
    with pytest.raises(StoreError, match=r"'k' cannot be written .*No such file"):
        store.upload("k", tmp_path / "missing")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match=r"file/k cannot be written .*choose another folder"):
        store.download("k", tmp_path / "file" / "k")


def test_a_forked_process_uses_the_store_at_the_same_time(store):
    def use(name):
        for number in range(20):
            store.put(f"{name}/{number}", f"{name} {number}".encode() * 1000)
            assert store.get(f"{name}/{number}") == f"{name} {number}".encode() * 1000

    use("before")
    children = [multiprocessing.get_context("fork").Process(target=use, args=(f"child {name}",)) for name in range(3)]
    for child in children:
        child.start()
    use("parent")
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    use("after")


def test_its_address_opens_it_again(store, monkeypatch, request):
    if isinstance(store, S3Store):
        for variable, value in request.getfixturevalue("minio").environment().items():
            monkeypatch.setenv(variable, value)
    store.put("k", b"there")
    again = open_store(store.address)
    assert type(again) is type(store)
    assert again.address == store.address
    assert again.get("k") == b"there"


def _write_for_ever(store):
    while True:
        store.put("object", os.urandom(1) * (4 << 20))


def test_a_writer_killed_half_way_leaves_the_whole_old_or_the_whole_new_object(store):
    store.put("object", b"\0" * (4 << 20))
    for _ in range(5):
        writer = multiprocessing.get_context("fork").Process(target=_write_for_ever, args=(store,))
        writer.start()
        before = time.monotonic()
        while time.monotonic() - before < 0.1:
            data = store.get("object")
            assert len(data) == 4 << 20
            assert len(set(data[:: 1 << 16])) == 1
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        data = store.get("object")
        assert len(data) == 4 << 20
        assert data == data[:1] * len(data)
    assert list(store.list("")) == ["object"]


def test_a_file_in_place_of_the_folder_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        LocalStore(tmp_path / "file").put("k", b"")


def test_keys_are_read_back_from_what_they_spell():
    assert keys.parse_span(keys.trial_batch("x", 64, 127)) == (64, 127)
    assert keys.parse_span(keys.failure("x", 0, 9, 2)) == (0, 9)
