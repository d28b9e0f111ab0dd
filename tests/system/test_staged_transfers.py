"""Datasets in parts on a real S3 server: a download that is killed in the middle of a part goes on from there."""

import multiprocessing
import time

import numpy as np

from memtail import datasets
from memtail.datasets import staged_dataset
from memtail.datasets.staged_dataset import fetch, stage
from memtail.spec import DatasetSpec
from memtail.storage.s3 import S3Store
from tests.support.arrays import write_arrays
from tests.support.proxies import ResettingProxy

_PART, _RANGE = 20 << 20, 5 << 20


def test_a_download_killed_in_the_middle_of_a_part_goes_on_with_the_bytes_that_it_has(minio, tmp_path, monkeypatch):
    monkeypatch.setattr(staged_dataset, "PART_BYTES", _PART)
    bucket, context = minio.new_bucket(), multiprocessing.get_context("fork")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (40, 1024, 1024)).astype(np.uint8)  # 40 MiB and a header: three parts
    path = write_arrays(tmp_path / "a.npz", train_images=images, test_images=images[:4], test_labels=np.arange(4) % 2)
    dataset = datasets.as_images(datasets.prepare(DatasetSpec(name="arrays", root=path)))
    assert stage(dataset, S3Store(bucket, settings=minio.settings()))
    received = context.Value("q", 0)

    def count(operation, outcome, seconds, size):
        with received.get_lock():
            received.value += size if operation == "get" else 0

    def through(proxy):
        return S3Store(bucket, settings=minio.settings(endpoint=proxy.endpoint), part_size=_RANGE, observe=count)

    size = sum(path.stat().st_size for path in dataset.folder.iterdir())
    with ResettingProxy(minio.port, rate=8 << 20) as slow:
        child = context.Process(target=fetch, args=(through(slow), dataset.fingerprint, tmp_path / "cache"))
        child.start()
        deadline = time.monotonic() + 60
        while received.value < _PART + 2 * _RANGE:  # in the second part
            assert time.monotonic() < deadline
            time.sleep(0.01)
        child.kill()
        child.join()
    had, received.value = received.value, 0
    with ResettingProxy(minio.port) as proxy:
        fetched = datasets.as_images(fetch(through(proxy), dataset.fingerprint, tmp_path / "cache"))
    assert received.value < size - had + 2 * _RANGE  # a range may have been received, and not been written yet
    np.testing.assert_array_equal(fetched.train_images, dataset.train_images)
