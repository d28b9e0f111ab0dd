"""Transfers of large objects: connections that are reset, processes that are killed, objects that are replaced, files that are damaged."""

import hashlib
import multiprocessing
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import structlog
from filelock import FileLock

from memtail.errors import StoreError
from memtail.storage import UnreachableError
from memtail.storage.s3 import S3Store
from tests.support.fake_s3 import FakeS3
from tests.support.proxies import ResettingProxy
from tests.support.servers import LossyProxy, MinioServer

_PART = 5 << 20
_CONTENT = os.urandom(8 * _PART - 7)


@pytest.fixture
def store(minio):
    return S3Store(minio.new_bucket(), settings=minio.settings(), part_size=_PART)


@pytest.fixture
def file(tmp_path):
    (tmp_path / "file").write_bytes(_CONTENT)
    return tmp_path / "file"


@pytest.fixture
def connect(minio, store):
    """Function that opens the bucket through a proxy."""

    def through(proxy, **options):
        return S3Store(store.address.removeprefix("s3://"), settings=minio.settings(endpoint=proxy.endpoint), part_size=_PART, **options)

    return through


def test_large_objects_pass_a_network_that_resets_every_connection(minio, store, connect, file):
    """A connection lives for 7 MB, less than two parts, and no transfer may fail four times in a row."""
    with ResettingProxy(minio.port, after_bytes=7 << 20) as proxy, structlog.testing.capture_logs():
        through = connect(proxy, attempts=4)
        through.upload("up", file)
        through.put("put", _CONTENT)
        assert store.get("up") == store.get("put") == _CONTENT
        assert proxy.resets >= 8
        proxy.resets = 0
        through.download("up", file.with_name("down"))
        assert through.get("put") == file.with_name("down").read_bytes() == _CONTENT
        assert proxy.resets >= 8
    assert {path.name for path in file.parent.iterdir()} == {"file", "down"}


def test_a_part_continues_at_the_byte_that_it_reached(minio, store, connect, file):
    """A connection lives for 2 MB: no part ever passes in one piece."""
    store.put("k", _CONTENT)
    with ResettingProxy(minio.port, after_bytes=2 << 20) as proxy, structlog.testing.capture_logs():
        connect(proxy, attempts=4).download("k", file.with_name("down"))
        assert proxy.resets >= 16
    assert file.with_name("down").read_bytes() == _CONTENT


def test_patience_counts_from_the_last_progress(minio, store, connect, file):
    store.put("k", _CONTENT)
    began = time.monotonic()
    with ResettingProxy(minio.port, after_seconds=0.15, rate=8 << 20) as proxy, structlog.testing.capture_logs():
        connect(proxy, patience=0.5).download("k", file.with_name("down"))
    assert file.with_name("down").read_bytes() == _CONTENT
    assert time.monotonic() - began > 0.5


def test_a_killed_download_is_continued(minio, store, connect, file):
    store.put("k", _CONTENT)
    down, journal = file.with_name("down"), file.with_name(".down.journal")
    with ResettingProxy(minio.port, rate=4 << 20) as slow:
        child = multiprocessing.get_context("fork").Process(target=connect(slow).download, args=("k", down))
        child.start()
        while not journal.exists() or len(journal.read_text().splitlines()) < 4:
            time.sleep(0.01)
        child.kill()
        child.join()
    finished = len(journal.read_text().splitlines()) - 1
    assert not down.exists()
    with ResettingProxy(minio.port) as proxy:
        connect(proxy).download("k", down)
        reads = [request for request in proxy.requests if request.startswith(b"GET") and b"/k " in request]
        assert len(reads) == 8 - finished + 1  # the first asks for the size
    assert down.read_bytes() == _CONTENT
    assert {path.name for path in file.parent.iterdir()} == {"file", "down"}


def test_a_download_is_continued_although_the_lock_empties_and_removes_its_file(minio, store, connect, file, monkeypatch):
    @contextmanager
    def lock(path, timeout):
        """Lock as filelock does before release 4.3."""
        with FileLock(path, timeout=timeout):
            path.write_bytes(b"")
            yield
        path.unlink(missing_ok=True)

    monkeypatch.setattr("memtail.storage.s3_reader.FileLock", lock)
    store.put("k", _CONTENT)
    down = file.with_name("down")
    with ResettingProxy(minio.port, after_bytes=6 << 20) as proxy, pytest.raises(UnreachableError):
        connect(proxy, attempts=1).download("k", down)
    with ResettingProxy(minio.port) as proxy:
        connect(proxy).download("k", down)
        reads = [request for request in proxy.requests if request.startswith(b"GET") and b"/k " in request]
        assert len(reads) < 8 + 1  # the first asks for the size
    assert down.read_bytes() == _CONTENT
    assert {path.name for path in file.parent.iterdir()} == {"file", "down"}


@pytest.mark.parametrize("damage", ["part", "journal", "file"])
def test_a_download_cut_off_by_an_outage_is_continued_without_its_damaged_parts(minio, store, connect, file, damage):
    store.put("k", _CONTENT)
    down, journal, partial = (file.with_name(name) for name in ("down", ".down.journal", ".down.partial"))
    with ResettingProxy(minio.port, after_bytes=6 << 20) as proxy, pytest.raises(UnreachableError):
        connect(proxy, attempts=1).download("k", down)
    lines = journal.read_text().splitlines()
    assert len(lines) > 1
    if damage == "part":
        with partial.open("r+b") as written:
            written.seek(int(lines[1].split()[0]) * _PART + 100)
            written.write(b"damage")
    elif damage == "journal":
        journal.write_text("damage")
    else:
        partial.unlink()
    store.download("k", down)
    assert down.read_bytes() == _CONTENT


def test_an_object_that_is_replaced_during_a_read_is_not_mixed(minio, store, file):
    """It has more parts than are read at a time, and is replaced after the first of them."""
    old, new, lock = bytes(len(_CONTENT)), _CONTENT, threading.Lock()

    def replace(operation, outcome, seconds, size):
        if size == _PART:
            with lock:  # no further part begins meanwhile
                if store.get_range("k", 0, 9) == old[:9]:
                    store.put("k", new)

    reader = S3Store(store.address.removeprefix("s3://"), settings=minio.settings(), part_size=_PART, observe=replace)
    store.put("k", old)
    assert reader.get("k") == new
    store.put("k", old)
    reader.download("k", file.with_name("down"))
    assert file.with_name("down").read_bytes() == new


def test_an_object_that_is_always_replaced_is_one_clear_error(minio, store):
    def replace(operation, outcome, seconds, size):
        if operation == "get" and not size:  # also the request for the size
            store.put("k", os.urandom(_PART + 1))

    store.put("k", bytes(_PART + 1))
    reader = S3Store(store.address.removeprefix("s3://"), settings=minio.settings(), part_size=_PART, observe=replace)
    with pytest.raises(StoreError, match="'k' is replaced again and again while it is read: end its other writer"):
        reader.get("k")


def test_a_download_to_a_path_in_use_does_not_disturb_it(store, file):
    store.put("k", _CONTENT)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: store.download("k", file.with_name("down")), range(3)))
    assert file.with_name("down").read_bytes() == _CONTENT
    assert {path.name for path in file.parent.iterdir()} == {"file", "down"}


def test_a_killed_upload_is_continued(minio, store, connect, file):
    sent = multiprocessing.get_context("fork").Value("i", 0)

    def count(operation, outcome, seconds, size):
        with sent.get_lock():
            sent.value += size > 0

    with ResettingProxy(minio.port, rate=4 << 20) as slow:
        child = multiprocessing.get_context("fork").Process(target=connect(slow, observe=count).upload, args=("k", file))
        child.start()
        while sent.value < 3:
            time.sleep(0.01)
        child.kill()
        child.join()
    assert not store.exists("k")
    with ResettingProxy(minio.port) as proxy:
        connect(proxy).upload("k", file)
        assert sum(b"partNumber=" in request for request in proxy.requests) <= 5
    assert store.get("k") == _CONTENT


def test_an_upload_is_not_continued_with_the_content_of_another_file(minio, store, connect, file):
    with ResettingProxy(minio.port, after_bytes=7 << 20) as proxy, pytest.raises(UnreachableError):
        connect(proxy, attempts=1).upload("k", file)
    other = _CONTENT[::-1]
    file.write_bytes(other)
    store.upload("k", file)
    assert store.get("k") == other


def test_concurrent_uploads_of_one_key_leave_one_of_them_whole(store, file):
    contents = [_CONTENT, _CONTENT[::-1], _CONTENT]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda content: store.put("k", content), contents))
    assert store.get("k") in contents


def test_a_lost_response_to_the_end_of_an_upload_does_not_repeat_it(minio, store, file):
    with LossyProxy(minio) as proxy, structlog.testing.capture_logs():
        through = S3Store(store.address.removeprefix("s3://"), settings=minio.settings(endpoint=proxy.endpoint), part_size=_PART)
        proxy.cuts.append((f"POST /{store.address.removeprefix('s3://')}/k?uploadId".encode(), 0))
        through.upload("k", file)
        assert not proxy.cuts
        assert sum(b"partNumber=" in request for request in proxy.requests) == 8
    assert store.get("k") == _CONTENT


def test_a_refused_upload_is_aborted(file):
    with FakeS3("refuses-parts") as server, pytest.raises(StoreError, match="AccessDenied"):
        S3Store("bucket", settings=server.settings(), part_size=_PART).upload("k", file)
    assert server.requests[-1] == "DELETE"


def test_a_part_of_which_the_server_sends_less_is_continued(file):
    with FakeS3("sends-less") as server, structlog.testing.capture_logs():
        store = S3Store("bucket", settings=server.settings(), part_size=_PART, attempts=4)
        content = _CONTENT[: 2 * _PART - 7]  # the server computes a digest of all of it for each response
        server.objects["/bucket/k"] = (content, "")
        assert store.get("k") == content
        store.download("k", file.with_name("down"))
    assert file.with_name("down").read_bytes() == content


def test_an_upload_that_others_end_again_and_again_is_one_clear_error(file):
    with FakeS3("loses-uploads") as server, pytest.raises(UnreachableError, match=r"'k' cannot be written .*: end its other writer"):
        S3Store("bucket", settings=server.settings(), part_size=_PART).upload("k", file)


def test_a_file_that_changes_during_its_upload_is_refused(minio, store, file):
    def change(operation, outcome, seconds, size):
        if size:
            file.write_bytes(_CONTENT)

    reader = S3Store(store.address.removeprefix("s3://"), settings=minio.settings(), part_size=_PART, observe=change)
    with pytest.raises(StoreError, match=r"'k' cannot be written: .*file has changed: upload it again"):
        reader.upload("k", file)
    assert not store.exists("k")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_three_gigabytes_pass_a_network_that_resets_every_connection_after_20_seconds(tmp_path):
    if shutil.disk_usage(tmp_path).free < 12 << 30:
        pytest.skip("needs 12 GB of free disk")
    rate, block = 6 << 20, os.urandom(1 << 20)
    with (tmp_path / "up").open("wb") as file:
        for number in range(3 << 10):
            file.write(number.to_bytes(4, "big") + block[4:])
    with (
        MinioServer(tmp_path) as server,
        ResettingProxy(server.port, after_seconds=20, rate=rate) as proxy,
        structlog.testing.capture_logs(),
    ):
        store = S3Store(server.new_bucket(), settings=server.settings(endpoint=proxy.endpoint))
        for transfer, path in ((store.upload, tmp_path / "up"), (store.download, tmp_path / "down")):
            began, proxy.resets = time.monotonic(), 0
            transfer("k", path)
            print(f"{transfer.__name__}: {time.monotonic() - began:.0f} s, {proxy.resets} resets, {proxy.passed >> 20} MiB")
            assert proxy.resets >= 6
    digests = []
    for name in ("up", "down"):
        with (tmp_path / name).open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        (tmp_path / name).unlink()
    shutil.rmtree(tmp_path / "data")
    assert digests[0] == digests[1]
