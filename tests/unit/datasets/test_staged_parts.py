"""Files of staged datasets in parts: staging and downloads that continue, damaged parts, and the release that knows no parts."""

import json
import multiprocessing
import os

import numpy as np
import pytest

from memtail import datasets
from memtail.datasets import staged_dataset
from memtail.datasets.staged_dataset import fetch, fetch_labels, stage
from memtail.digests import file_digest
from memtail.errors import DatasetError, StoreError
from memtail.storage import keys
from tests.support import versions
from tests.support.staged import CountingStore, prepare

_PART = 500


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A dataset whose training images are staged in four parts: they take 1568 bytes."""
    monkeypatch.setattr(staged_dataset, "PART_BYTES", _PART)
    return prepare(tmp_path)


def parts_of(store, dataset):
    """Return the keys of the parts of the training images, in order."""
    manifest = json.loads(store.get(keys.dataset(dataset.fingerprint, "manifest.json")))
    parts = manifest["files"]["train_images.npy"]["parts"]
    return [keys.dataset_part(dataset.fingerprint, "train_images.npy", part["sha256"]) for part in parts]


def damage(store, key):
    data = store.get(key)
    store.put(key, data[:-1] + bytes([data[-1] ^ 1]))


def downloads_of_parts(store):
    return [key for key in store.noted("downloads") if "train_images.npy." in key]


def test_a_large_file_is_staged_in_parts_and_fetched_unchanged(dataset, store, cache):
    assert stage(dataset, store)
    parts = parts_of(store, dataset)
    assert [len(store.get(key)) for key in parts] == [500, 500, 500, 68]
    assert not store.exists(keys.dataset(dataset.fingerprint, "train_images.npy"))
    progress = []
    fetched = datasets.as_images(fetch(store, dataset.fingerprint, cache, on_progress=lambda *bytes_: progress.append(bytes_)))
    assert {path.name for path in fetched.folder.iterdir()} == {path.name for path in dataset.folder.iterdir()}
    for path in dataset.folder.iterdir():
        assert (fetched.folder / path.name).read_bytes() == path.read_bytes()
    total = sum(path.stat().st_size for path in dataset.folder.iterdir())
    assert progress[-1] == (total, total)
    assert progress == sorted(progress)
    assert len(progress) > 8
    assert fetch_labels(store, dataset.fingerprint, cache).n_train == 40


def test_a_dataset_of_small_files_is_staged_as_by_the_release_that_knows_no_parts(tmp_path, store, cache):
    dataset = prepare(tmp_path)
    stage(dataset, store)
    files = {path.name: {"size": path.stat().st_size, "sha256": file_digest(path)} for path in sorted(dataset.folder.iterdir())}
    assert store.get(keys.dataset(dataset.fingerprint, "manifest.json")) == json.dumps({"files": files}, indent=1).encode()
    assert {key.split("/")[-1] for key in store.list("datasets/")} == {"manifest.json", *files}


def test_release_0_1_0_refuses_a_dataset_in_parts(tmp_path, dataset, store):
    stage(dataset, store)
    code = versions.release_0_1_0(tmp_path / "0.1.0")
    fetching = (
        "import sys; from pathlib import Path; from memtail.datasets.staging import fetch; from memtail.storage.local import LocalStore\n"
        "try: fetch(LocalStore(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    said = versions.python(code, "-c", fetching, store.root, dataset.fingerprint, tmp_path / "old cache")
    assert said.startswith("DatasetError dataset ")
    assert "its manifest is damaged" in said


def test_staging_that_was_interrupted_does_not_upload_a_part_again(dataset, store, cache, monkeypatch):
    whole, uploaded = CountingStore.upload, []

    def fail_at_the_third_part(self, key, *arguments):
        uploaded.append(key)
        if sum(".npy." in each for each in uploaded) == 3:
            raise StoreError("the store is gone")
        whole(self, key, *arguments)

    monkeypatch.setattr(CountingStore, "upload", fail_at_the_third_part)
    with pytest.raises(StoreError, match="gone"):
        stage(dataset, store)
    held = [key for key in store.noted("uploads") if ".npy." in key]
    assert len(held) == 2
    monkeypatch.undo()
    monkeypatch.setattr(staged_dataset, "PART_BYTES", _PART)
    store.put(held[0], b"cut")  # of another size
    (store.root / "uploads").unlink()
    assert stage(dataset, store)
    again = store.noted("uploads")
    assert held[0] in again
    assert held[1] not in again
    assert fetch(store, dataset.fingerprint, cache).n_train == 40


def test_two_stagings_at_once_leave_a_whole_dataset(dataset, store, cache):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=stage, args=(dataset, store)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert fetch(store, dataset.fingerprint, cache).n_train == 40


class _DyingStore(CountingStore):
    """A store whose process dies in its sixth download."""

    def download(self, key, path):
        super().download(key, path)
        if len(self.noted("downloads")) == 6:
            os._exit(9)


def test_a_killed_download_goes_on_with_the_parts_that_it_has(dataset, store, cache):
    stage(dataset, store)
    process = multiprocessing.get_context("fork").Process(target=fetch, args=(_DyingStore(store.root), dataset.fingerprint, cache))
    process.start()
    process.join()
    assert process.exitcode == 9
    before = store.noted("downloads")
    unfinished = cache / "datasets" / f".unfinished-{dataset.fingerprint}"
    assert unfinished.is_dir()
    fetched = datasets.as_images(fetch(store, dataset.fingerprint, cache))
    assert not set(before) & set(store.noted("downloads")[6:])
    np.testing.assert_array_equal(fetched.train_images, dataset.train_images)
    assert not unfinished.exists()
    assert {path.name for path in fetched.folder.iterdir()} == {path.name for path in dataset.folder.iterdir()}


def test_a_part_damaged_on_the_disk_is_fetched_again_alone(dataset, store, cache):
    stage(dataset, store)
    parts = parts_of(store, dataset)
    damage(store, parts[-1])
    with pytest.raises(DatasetError):
        fetch(store, dataset.fingerprint, cache)
    path = cache / "datasets" / f".unfinished-{dataset.fingerprint}" / "train_images.npy"
    data = bytearray(path.read_bytes())
    data[_PART + 3] ^= 1
    path.write_bytes(data)
    damage(store, parts[-1])  # whole again
    (store.root / "downloads").unlink()
    fetched = datasets.as_images(fetch(store, dataset.fingerprint, cache))
    assert downloads_of_parts(store) == [parts[1], parts[3]]
    np.testing.assert_array_equal(fetched.train_images, dataset.train_images)


def test_a_part_damaged_on_the_way_is_fetched_again_alone(dataset, store, cache, monkeypatch):
    stage(dataset, store)
    parts, whole = parts_of(store, dataset), CountingStore.download
    damaged = []

    def damage_once(self, key, path):
        whole(self, key, path)
        if key == parts[1] and not damaged:
            damaged.append(key)
            path.write_bytes(path.read_bytes()[:-1] + b"x")

    monkeypatch.setattr(CountingStore, "download", damage_once)
    fetched = datasets.as_images(fetch(store, dataset.fingerprint, cache))
    assert downloads_of_parts(store) == [parts[0], parts[1], parts[1], *parts[2:]]
    np.testing.assert_array_equal(fetched.train_images, dataset.train_images)


def test_a_part_damaged_in_the_store_is_named_and_staged_again(dataset, store, cache):
    stage(dataset, store)
    parts, manifest = parts_of(store, dataset), keys.dataset(dataset.fingerprint, "manifest.json")
    damage(store, parts[2])
    with pytest.raises(DatasetError) as caught:
        fetch(store, dataset.fingerprint, cache)
    assert f"train_images.npy is damaged: remove {parts[2]} and {manifest} there, then memtail stage SPEC" in str(caught.value)
    assert downloads_of_parts(store).count(parts[2]) == 2
    store.delete(parts[2])
    with pytest.raises(DatasetError, match=r"train_images\.npy is missing: remove datasets/"):
        fetch(store, dataset.fingerprint, cache)
    store.delete(manifest)
    assert stage(dataset, store)
    assert fetch(store, dataset.fingerprint, cache).n_train == 40
