"""Staged datasets: uploaded once, downloaded whole and once, into a cache of limited size."""

import json
import multiprocessing
import shutil

import numpy as np
import pytest

from memtail import datasets
from memtail.datasets.cache_lock import exclusive
from memtail.datasets.staged_dataset import fetch, fetch_labels, stage
from memtail.errors import DatasetError
from memtail.storage import keys
from tests.support.staged import prepare


def change(store, fingerprint, **files):
    """Replace entries of a staged dataset's manifest."""
    key = keys.dataset(fingerprint, "manifest.json")
    manifest = json.loads(store.get(key))
    manifest["files"] |= files
    store.put(key, json.dumps(manifest).encode())


def test_a_staged_dataset_is_fetched_unchanged_and_once(tmp_path, store, cache):
    dataset = prepare(tmp_path)
    assert stage(dataset, store)
    assert not stage(dataset, store)
    fetched = datasets.as_images(fetch(store, dataset.fingerprint, cache))
    assert fetched.folder == cache / "datasets" / dataset.fingerprint
    assert fetched.fingerprint == dataset.fingerprint
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        np.testing.assert_array_equal(getattr(fetched, name), getattr(dataset, name))
    assert (fetched.classes, fetched.mean, fetched.std) == (dataset.classes, dataset.mean, dataset.std)
    before = store.noted("downloads")
    assert before
    fetch(store, dataset.fingerprint, cache)
    assert store.noted("downloads") == before
    assert not list((cache / "datasets").glob(".unfinished-*"))


def test_labels_and_names_are_fetched_without_images_also_while_images_are_fetched(tmp_path, store, cache):
    dataset = prepare(tmp_path)
    stage(dataset, store)
    with exclusive(cache / "datasets" / dataset.fingerprint):
        labels = fetch_labels(store, dataset.fingerprint, cache)
    assert not any("images" in key for key in store.noted("downloads"))
    np.testing.assert_array_equal(labels.train_labels, dataset.train_labels)
    np.testing.assert_array_equal(labels.test_labels, dataset.test_labels)
    assert (labels.classes, labels.fingerprint, labels.n_train, labels.n_test) == (dataset.classes, dataset.fingerprint, 40, dataset.n_test)
    before = store.noted("downloads")
    fetch_labels(store, dataset.fingerprint, cache)
    assert store.noted("downloads") == before
    assert fetch(store, dataset.fingerprint, cache).n_train == 40


def test_damaged_labels_are_refused(tmp_path, store, cache):
    dataset = prepare(tmp_path)
    stage(dataset, store)
    key = keys.dataset(dataset.fingerprint, "train_labels.npy")
    store.put(key, store.get(key)[:-1] + b"x")
    with pytest.raises(DatasetError, match=r"train_labels\.npy is damaged"):
        fetch_labels(store, dataset.fingerprint, cache)
    store.delete(key)
    with pytest.raises(DatasetError, match=r"train_labels\.npy is missing"):
        fetch_labels(store, dataset.fingerprint, cache)


def test_interrupted_staging_is_not_taken_for_complete(tmp_path, store, cache):
    dataset = prepare(tmp_path)
    store.upload(keys.dataset(dataset.fingerprint, "train_images.npy"), dataset.folder / "train_images.npy")
    with pytest.raises(DatasetError, match=r"is not in .*: memtail stage SPEC puts it there"):
        fetch(store, dataset.fingerprint, cache)
    assert stage(dataset, store)
    assert fetch(store, dataset.fingerprint, cache).n_train == 40


def test_a_damaged_staged_file_is_named_and_staged_again_after_its_manifest_is_removed(tmp_path, store, cache):
    dataset = prepare(tmp_path)
    manifest = keys.dataset(dataset.fingerprint, "manifest.json")
    key = keys.dataset(dataset.fingerprint, "train_images.npy")
    stage(dataset, store)
    whole = store.get(key)
    for damage, message in (
        (lambda: store.put(key, whole[:-1] + b"x"), "train_images.npy is damaged"),
        (lambda: store.delete(key), "train_images.npy is missing"),
        (lambda: store.put(manifest, b"{"), "its manifest is damaged"),
        (lambda: store.put(manifest, b'{"files": {}}'), "its files make no dataset"),
    ):
        damage()
        with pytest.raises(DatasetError) as caught:
            fetch(store, dataset.fingerprint, cache)
        text = str(caught.value)
        assert message in text
        assert f"remove {manifest} there, then memtail stage SPEC" in text
        assert "\n" not in text
        assert not (cache / "datasets" / dataset.fingerprint).exists()
        store.delete(manifest)
        assert stage(dataset, store)
    assert fetch(store, dataset.fingerprint, cache).n_train == 40


def test_another_dataset_under_the_fingerprint_is_refused(tmp_path, store, cache):
    dataset, other = prepare(tmp_path), prepare(tmp_path, 1)
    stage(dataset, store)
    shutil.move(store.local_path(f"datasets/{dataset.fingerprint}"), store.local_path(f"datasets/{other.fingerprint}"))
    with pytest.raises(DatasetError, match=f"its fingerprint is {dataset.fingerprint[:8]}..."):
        fetch(store, other.fingerprint, cache)
    assert not (cache / "datasets" / other.fingerprint).exists()


@pytest.mark.parametrize("name", ["../../escaped.npy", "/var/escaped.npy", "a/b.npy", "..", "train_images.npy\n", "run.sh"])
def test_a_manifest_that_names_a_path_is_refused_unread(tmp_path, store, cache, name):
    dataset = prepare(tmp_path)
    stage(dataset, store)
    change(store, dataset.fingerprint, **{name: {"size": 1, "sha256": "0" * 64}})
    with pytest.raises(DatasetError, match="its manifest is damaged"):
        fetch(store, dataset.fingerprint, cache)
    assert not store.noted("downloads")
    assert not list(tmp_path.rglob("*escaped*"))


def test_a_dataset_larger_than_the_cache_limit_is_refused_without_an_eviction(tmp_path, store, cache):
    small, large = prepare(tmp_path), prepare(tmp_path, 1)
    stage(small, store)
    stage(large, store)
    fetch(store, small.fingerprint, cache)
    before = store.noted("downloads")
    with pytest.raises(DatasetError, match=r"has \d+ bytes, more than the cache may hold: set MEMTAIL_CACHE_LIMIT to more"):
        fetch(store, large.fingerprint, cache, limit=100)
    assert store.noted("downloads") == before
    assert (cache / "datasets" / small.fingerprint).exists()


def _fetch_at_once(start, store, fingerprint, cache):
    start.wait()
    assert fetch(store, fingerprint, cache).n_train == 40


def test_one_of_several_processes_downloads_a_dataset(tmp_path, store, cache):
    dataset = prepare(tmp_path)
    stage(dataset, store)
    context = multiprocessing.get_context("fork")
    start = context.Barrier(3)
    processes = [context.Process(target=_fetch_at_once, args=(start, store, dataset.fingerprint, cache)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(store.noted("downloads")) == len(list(dataset.folder.iterdir()))
