"""Datasets in a cache that processes share: in use they stay, others are evicted where room is needed, those used longest ago first."""

import errno
import fcntl
import multiprocessing
import os
import shutil
import time

import numpy as np
import pytest

from memtail import datasets
from memtail.datasets.cache_folder import note_use
from memtail.datasets.cache_lock import exclusive
from memtail.datasets.staged_dataset import fetch, stage
from memtail.errors import DatasetError
from memtail.spec import DatasetSpec
from tests.support.staged import CountingStore, prepare, size_of

_FORK = multiprocessing.get_context("fork")


@pytest.fixture
def staged(tmp_path, store):
    """Three staged datasets."""
    made = [prepare(tmp_path, shade) for shade in range(3)]
    for dataset in made:
        stage(dataset, store)
    return made


def there(cache):
    return {path.name for path in (cache / "datasets").iterdir() if path.is_dir()}


def room_for(datasets_):
    """Return a limit with room for as many datasets."""
    return sum(map(size_of, datasets_)) + 100


class Holder:
    """A process that has a dataset open until it is told to end."""

    def __init__(self, store, fingerprint, cache):
        self._ready, self._end = _FORK.Event(), _FORK.Event()
        self._process = _FORK.Process(target=self._hold, args=(store, fingerprint, cache))
        self._process.start()
        assert self._ready.wait(30)

    def _hold(self, store, fingerprint, cache):
        dataset = datasets.as_images(fetch(store, fingerprint, cache))
        self._ready.set()
        self._end.wait()
        assert dataset.train_images.sum() > 0

    def end(self):
        self._end.set()
        self._process.join()
        assert self._process.exitcode == 0

    def kill(self):
        self._process.kill()
        self._process.join()


@pytest.fixture
def hold(store, cache):
    holders = []

    def start(dataset):
        holders.append(Holder(store, dataset.fingerprint, cache))
        return holders[-1]

    yield start
    for holder in holders:
        holder.kill()


def test_the_dataset_used_longest_ago_is_evicted(staged, store, cache):
    limit = room_for(staged[:2])
    first, second = (fetch(store, dataset.fingerprint, cache, limit) for dataset in staged[:2])
    os.utime(first.folder, (1, 1))
    os.utime(second.folder, (2, 2))
    note_use(first)  # as a trainer does at each shard
    del first, second
    fetch(store, staged[2].fingerprint, cache, limit)
    assert there(cache) == {staged[0].fingerprint, staged[2].fingerprint}
    assert fetch(store, staged[1].fingerprint, cache, limit).n_train == 40


def test_opening_counts_as_use(staged, store, cache):
    limit = room_for(staged[:2])
    for dataset, when in zip(staged[:2], (1, 2), strict=True):
        os.utime(fetch(store, dataset.fingerprint, cache, limit).folder, (when, when))
    fetch(store, staged[0].fingerprint, cache, limit)
    fetch(store, staged[2].fingerprint, cache, limit)
    assert there(cache) == {staged[0].fingerprint, staged[2].fingerprint}


@pytest.mark.parametrize("ending", ["end", "kill"])
def test_a_dataset_in_use_by_another_process_is_not_evicted(staged, store, cache, hold, ending):
    limit = room_for(staged[:1])
    holder = hold(staged[0])
    before = store.noted("downloads")
    with pytest.raises(DatasetError, match=r"has \d+ bytes, \d+ more than are left in .*, since the datasets there are in use") as caught:
        fetch(store, staged[1].fingerprint, cache, limit)
    assert "\n" not in str(caught.value)
    assert there(cache) == {staged[0].fingerprint}
    assert store.noted("downloads") == before
    getattr(holder, ending)()
    assert fetch(store, staged[1].fingerprint, cache, limit).n_train == 40
    assert there(cache) == {staged[1].fingerprint}


def test_the_next_oldest_is_evicted_instead_of_a_dataset_in_use(staged, store, cache, hold):
    limit = room_for(staged[:2])
    hold(staged[0])
    fetch(store, staged[1].fingerprint, cache, limit)
    os.utime(cache / "datasets" / staged[0].fingerprint, (1, 1))
    fetch(store, staged[2].fingerprint, cache, limit)
    assert there(cache) == {staged[0].fingerprint, staged[2].fingerprint}


def test_a_dataset_is_in_use_while_a_view_of_an_array_exists(staged, store, cache):
    limit = room_for(staged[:1])
    labels = np.asarray(fetch(store, staged[0].fingerprint, cache, limit).test_labels)[1:]
    with pytest.raises(DatasetError, match="in use"):
        fetch(store, staged[1].fingerprint, cache, limit)
    np.testing.assert_array_equal(labels, staged[0].test_labels[1:])
    del labels
    assert fetch(store, staged[1].fingerprint, cache, limit).n_train == 40


def test_a_prepared_dataset_in_use_is_not_evicted(tmp_path, staged, store, monkeypatch):
    monkeypatch.setenv("MEMTAIL_CACHE", str(tmp_path / "cache"))
    spec = DatasetSpec(name="arrays", root=tmp_path / "0.npz")
    prepared = datasets.prepare(spec)
    with pytest.raises(DatasetError, match="in use"):
        fetch(store, staged[1].fingerprint, tmp_path / "cache", room_for(staged[:1]))
    del prepared
    fetch(store, staged[1].fingerprint, tmp_path / "cache", room_for(staged[:1]))
    assert datasets.prepare(spec).n_train == 40  # prepared again


def test_the_same_content_is_prepared_again_while_it_is_in_use(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMTAIL_CACHE", str(tmp_path / "cache"))
    opened = prepare(tmp_path)
    (tmp_path / "0.npz").rename(tmp_path / "renamed.npz")
    assert datasets.prepare(DatasetSpec(name="arrays", root=tmp_path / "renamed.npz")).folder == opened.folder


def _open(store, fingerprint, cache):
    assert fetch(store, fingerprint, cache).n_train == 40


def test_a_complete_dataset_is_opened_while_another_is_downloaded(staged, store, cache):
    fetch(store, staged[0].fingerprint, cache)
    with exclusive(cache / "datasets" / staged[1].fingerprint):  # as its download does
        process = _FORK.Process(target=_open, args=(store, staged[0].fingerprint, cache))
        process.start()
        process.join(30)
        assert process.exitcode == 0


def test_downloads_at_once_do_not_take_more_than_the_limit(staged, store, cache, monkeypatch):
    """The second finds the room reserved, before the first has written anything."""
    limit, download, refused = room_for(staged[:1]), CountingStore.download, []

    def download_and_try_another(self, key, path):
        if not refused:
            refused.append("")
            with pytest.raises(DatasetError) as caught:
                fetch(store, staged[1].fingerprint, cache, limit)
            refused.append(str(caught.value))
        download(self, key, path)

    monkeypatch.setattr(CountingStore, "download", download_and_try_another)
    assert fetch(store, staged[0].fingerprint, cache, limit).n_train == 40
    assert "in use" in refused[-1]


def _die_in_the_second_download(store, fingerprint, cache):
    def end(done, size):
        os._exit(9)

    fetch(store, fingerprint, cache, on_progress=end)


def test_a_download_that_nobody_continues_is_evicted(staged, store, cache):
    process = _FORK.Process(target=_die_in_the_second_download, args=(store, staged[0].fingerprint, cache))
    process.start()
    process.join()
    assert there(cache) == {f".unfinished-{staged[0].fingerprint}"}
    fetch(store, staged[1].fingerprint, cache, room_for(staged[:1]))
    assert there(cache) == {staged[1].fingerprint}


def test_a_preparation_in_progress_is_not_evicted_and_an_abandoned_one_is(staged, store, cache):
    folder = cache / "datasets" / ".unfinished-0123456789abcdef"
    folder.mkdir(parents=True)
    (folder / "train_images.npy").write_bytes(bytes(size_of(staged[0])))
    os.utime(folder, (1, 1))
    with pytest.raises(DatasetError, match="in use"):
        fetch(store, staged[0].fingerprint, cache, room_for(staged[:1]))
    for path in (folder / "train_images.npy", folder):
        os.utime(path, (time.time() - 25 * 3600,) * 2)
    fetch(store, staged[0].fingerprint, cache, room_for(staged[:1]))
    assert there(cache) == {staged[0].fingerprint}


def volume(monkeypatch, free):
    """Let the cache's volume have so many free bytes."""
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))


def test_without_a_limit_the_volume_sets_it(staged, store, cache, monkeypatch):
    size = size_of(staged[0])
    volume(monkeypatch, int(size / 0.95) - 10)
    with pytest.raises(DatasetError, match=rf"has {size} bytes, and .* has room for \d+: free some space there, or set MEMTAIL_CACHE"):
        fetch(store, staged[0].fingerprint, cache)
    assert not store.noted("downloads")
    volume(monkeypatch, int(size / 0.95) + 10)
    fetch(store, staged[0].fingerprint, cache)
    volume(monkeypatch, size // 10)  # beside the cached dataset, which counts as room
    fetch(store, staged[1].fingerprint, cache)
    assert there(cache) == {staged[1].fingerprint}


def test_a_file_system_without_locks_is_named(staged, store, cache, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(DatasetError, match=r"cache/datasets cannot be written \(No locks available\): set MEMTAIL_CACHE to another folder"):
        fetch(store, staged[0].fingerprint, cache)


def test_locks_work_as_nfs_implements_them(staged, store, cache, hold, monkeypatch):
    """NFS maps them to locks of byte ranges, which also depend on how the file was opened."""
    monkeypatch.setattr(fcntl, "flock", fcntl.lockf)
    holder = hold(staged[0])
    with pytest.raises(DatasetError, match="in use"):
        fetch(store, staged[1].fingerprint, cache, room_for(staged[:1]))
    holder.kill()
    assert fetch(store, staged[1].fingerprint, cache, room_for(staged[:1])).n_train == 40
