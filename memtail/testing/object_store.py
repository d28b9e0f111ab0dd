"""Conformance suite of the object store contract."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from memtail.errors import ForeignObjectError, StoreError
from memtail.storage import ObjectNotFound, ObjectStore
from memtail.storage.open import open_store

_BYTES = 4 << 20


class ObjectStoreContract:
    """Tests of the guarantees of `memtail.storage.ObjectStore`.

    A subclass whose name begins with `Test` provides a fixture `store`: an empty store for each test, which `open_store` opens again by its
    address (a store with a URL needs an opener in `memtail.storage.open`). Some tests fork processes, which Windows cannot.
    """

    def test_get_returns_the_bytes_of_the_last_put(self, store: ObjectStore) -> None:
        store.put("a/b", b"one")
        assert store.get("a/b") == b"one"
        store.put("a/b", b"two")
        assert store.get("a/b") == b"two"
        store.put("empty", b"")
        assert store.get("empty") == b""

    def test_a_missing_object_is_named(self, store: ObjectStore) -> None:
        with pytest.raises(ObjectNotFound, match="'a/missing'"):
            store.get("a/missing")
        store.put("a/b/c", b"")
        with pytest.raises(ObjectNotFound):
            store.get("a/b")

    def test_the_first_writer_wins(self, store: ObjectStore) -> None:
        assert store.put_if_absent("k", b"first")
        assert not store.put_if_absent("k", b"second")
        assert store.get("k") == b"first"

    @pytest.mark.parametrize("equal", [False, True])
    def test_of_many_concurrent_writers_exactly_one_wins(self, store: ObjectStore, equal: bool) -> None:
        for attempt in range(20):
            values = [b"same" if equal else str(value).encode() for value in range(8)]
            with ThreadPoolExecutor(8) as pool:
                won = list(pool.map(store.put_if_absent, [f"k/{attempt}"] * 8, values))
            assert sum(won) == 1
            assert store.get(f"k/{attempt}") == values[won.index(True)]

    def test_list_yields_the_keys_with_a_prefix_in_order(self, store: ObjectStore) -> None:
        for key in ("x/b/2", "x/a", "x/b/10", "xy", "z/x/a"):
            store.put(key, b"")
        assert list(store.list("x/")) == ["x/a", "x/b/10", "x/b/2"]
        assert list(store.list("x")) == ["x/a", "x/b/10", "x/b/2", "xy"]
        assert list(store.list("x/b/1")) == ["x/b/10"]
        assert list(store.list("nothing/")) == []
        assert list(store.list("")) == ["x/a", "x/b/10", "x/b/2", "xy", "z/x/a"]

    def test_tags_change_when_an_object_is_replaced(self, store: ObjectStore) -> None:
        for key in ("x/b", "x/a", "y"):
            store.put(key, b"one")
        before = dict(store.list_tagged("x/"))
        assert list(before) == ["x/a", "x/b"]
        assert dict(store.list_tagged("x/")) == before
        store.put("x/b", b"two")
        after = dict(store.list_tagged("x/"))
        assert after["x/a"] == before["x/a"]
        assert after["x/b"] != before["x/b"]

    def test_an_object_is_replaced_only_if_it_still_has_the_tag(self, store: ObjectStore) -> None:
        assert not store.put_if_match("x/k", b"new", "0123456789abcdef0123456789abcdef")
        assert not store.exists("x/k")
        store.put("x/k", b"one")
        data, tag = store.get_tagged("x/k")
        assert data == b"one"
        assert dict(store.list_tagged("x/")) == {"x/k": tag}
        assert store.put_if_match("x/k", b"two", tag)
        assert not store.put_if_match("x/k", b"three", tag)
        data, changed = store.get_tagged("x/k")
        assert data == b"two"
        assert changed != tag
        store.delete("x/k")
        assert not store.put_if_match("x/k", b"three", changed)
        assert not store.exists("x/k")
        with pytest.raises(ObjectNotFound, match="'x/k'"):
            store.get_tagged("x/k")

    def test_no_concurrent_update_is_lost(self, store: ObjectStore) -> None:
        def add(name: int) -> None:
            while True:
                data, tag = store.get_tagged("set")
                if store.put_if_match("set", data + f"{name} ".encode(), tag):
                    return

        store.put("set", b"")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(add, range(24)))
        assert sorted(map(int, store.get("set").split())) == list(range(24))

    def test_a_range_is_the_bytes_that_the_object_has_of_it(self, store: ObjectStore) -> None:
        store.put("k", b"0123456789")
        store.put("empty", b"")
        for offset in (0, 1, 9, 10, 11):
            for length in (0, 1, 4, 10, 11):
                assert store.get_range("k", offset, length) == b"0123456789"[offset : offset + length]
        assert store.get_range("empty", 0, 5) == b""
        with pytest.raises(ObjectNotFound, match="'missing'"):
            store.get_range("missing", 0, 0)

    def test_an_inventory_has_sizes_and_ages(self, store: ObjectStore) -> None:
        began = time.time()
        for key, size in (("x/b/2", 3), ("x/a", 0), ("y", 5)):
            store.put(key, b"." * size)
        stored = list(store.inventory("x/"))
        assert [(each.key, each.bytes) for each in stored] == [("x/a", 0), ("x/b/2", 3)]
        assert all(-60 < each.modified - began < 60 for each in stored)

    def test_folders_yields_each_name_once_in_order_and_no_objects(self, store: ObjectStore) -> None:
        for key in ("x/b/2", "x/b/1/deep", "x/b-c/1", "x/a/1", "x/ü +%/1", "x/file", "xy/1", "file"):
            store.put(key, b"")
        assert list(store.folders("x/")) == ["a", "b", "b-c", "ü +%"]
        assert list(store.folders("x/b/")) == ["1"]
        assert list(store.folders("")) == ["x", "xy"]
        assert list(store.folders("x/a/")) == list(store.folders("nothing/")) == list(store.folders("file/")) == []
        store.delete("x/a/1")
        assert list(store.folders("x/")) == ["b", "b-c", "ü +%"]

    def test_an_object_exists_from_its_writing_to_its_removal(self, store: ObjectStore) -> None:
        assert not store.exists("a/b")
        store.put("a/b", b"")
        assert store.exists("a/b")
        assert not store.exists("a")
        assert not store.exists("a/b/c")
        store.delete("a/b")
        assert not store.exists("a/b")

    def test_delete_removes_an_object_and_ignores_a_missing_one(self, store: ObjectStore) -> None:
        store.put("k", b"")
        store.delete("k")
        store.delete("k")
        with pytest.raises(ObjectNotFound):
            store.get("k")
        assert store.put_if_absent("k", b"again")

    def test_upload_and_download_copy_whole_files(self, store: ObjectStore, tmp_path: Path) -> None:
        (tmp_path / "up").write_bytes(os.urandom(3 << 20))
        store.upload("big", tmp_path / "up")
        store.download("big", tmp_path / "new" / "down")
        assert (tmp_path / "new" / "down").read_bytes() == (tmp_path / "up").read_bytes() == store.get("big")
        with pytest.raises(ObjectNotFound):
            store.download("missing", tmp_path / "new" / "missing")
        assert not (tmp_path / "new" / "missing").exists()

    def test_a_part_of_a_file_is_uploaded(self, store: ObjectStore, tmp_path: Path) -> None:
        (tmp_path / "up").write_bytes(bytes(range(100)))
        store.upload("part", tmp_path / "up", 10, 20)
        assert store.get("part") == bytes(range(10, 30))
        store.upload("rest", tmp_path / "up", 90)
        assert store.get("rest") == bytes(range(90, 100))

    def test_an_object_beyond_the_limit_is_refused(self, store: ObjectStore) -> None:
        store.put("k", b"12345")
        assert store.get("k", limit=5) == b"12345"
        for read in (store.get, store.get_tagged):
            with pytest.raises(ForeignObjectError, match="'k' has 5 bytes, more than the 4"):
                read("k", limit=4)
        assert store.get("k") == b"12345"

    @pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a//b", "a/./b", "a/", "a\nb", "a\0b"])
    def test_a_key_that_could_leave_the_store_is_refused(self, store: ObjectStore, tmp_path: Path, key: str) -> None:
        (tmp_path / "file").write_bytes(b"")
        actions: list[Callable[[], object]] = [
            lambda: store.get(key),
            lambda: store.put(key, b""),
            lambda: store.put_if_absent(key, b""),
            lambda: store.get_tagged(key),
            lambda: store.get_range(key, 0, 1),
            lambda: store.put_if_match(key, b"", "tag"),
            lambda: store.exists(key),
            lambda: store.delete(key),
            lambda: store.upload(key, tmp_path / "file"),
            lambda: store.download(key, tmp_path / "file"),
            lambda: store.local_path(key),
        ]
        for action in actions:
            with pytest.raises(StoreError, match="is not a key"):
                action()

    def test_a_file_that_cannot_be_read_or_written_is_one_clear_error(self, store: ObjectStore, tmp_path: Path) -> None:
        store.put("k", b"")
        with pytest.raises(StoreError, match=r"'k' cannot be written .*No such file"):
            store.upload("k", tmp_path / "missing")
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(StoreError, match=r"file/k cannot be written"):
            store.download("k", tmp_path / "file" / "k")

    def test_a_local_path_is_the_file_of_the_object(self, store: ObjectStore) -> None:
        store.put("a/b", b"bytes")
        file, folder = store.local_path("a/b"), store.local_path("a")
        if file is None:
            assert folder is None
        else:
            assert file.read_bytes() == b"bytes"
            assert folder == file.parent

    def test_a_sweep_removes_no_object_and_disturbs_no_writer(self, store: ObjectStore) -> None:
        store.sweep()  # of an empty store
        with ThreadPoolExecutor(2) as pool:
            writes = [pool.submit(store.put_if_absent, f"k/{number}", bytes(_BYTES)) for number in range(8)]
            while not all(write.done() for write in writes):
                store.sweep()
            assert all(write.result() for write in writes)
        assert len(list(store.list("k/"))) == 8

    def test_a_forked_process_uses_the_store_at_the_same_time(self, store: ObjectStore) -> None:
        def use(name: str) -> None:
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

    def test_its_address_opens_it_again(self, store: ObjectStore) -> None:
        store.put("k", b"there")
        again = open_store(store.address)
        assert type(again) is type(store)
        assert again.address == store.address
        assert again.get("k") == b"there"

    def test_a_writer_killed_half_way_leaves_the_whole_old_or_the_whole_new_object(self, store: ObjectStore) -> None:
        def write_for_ever() -> None:
            while True:
                store.put("object", os.urandom(1) * _BYTES)

        store.put("object", bytes(_BYTES))
        for _ in range(5):
            writer = multiprocessing.get_context("fork").Process(target=write_for_ever)
            writer.start()
            try:
                began = time.monotonic()
                while time.monotonic() - began < 0.1:
                    self._check_whole(store.get("object"))
            finally:
                writer.kill()
                writer.join()
            assert writer.exitcode == -signal.SIGKILL
            self._check_whole(store.get("object"))
        assert list(store.list("")) == ["object"]

    def _check_whole(self, data: bytes) -> None:
        assert len(data) == _BYTES
        assert data == data[:1] * _BYTES
