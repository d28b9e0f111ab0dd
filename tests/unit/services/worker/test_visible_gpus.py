"""Devices of a worker's processes, and which GPU each shows to CUDA."""

import os

import pynvml
import pytest

from services.worker.visible_gpus import show_only, worker_devices


@pytest.fixture
def machine(monkeypatch):
    """Return a function that sets the number of the machine's GPUs, and the variable."""

    def make(count, visible):
        monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
        monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: count)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")  # also restores it after the test
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")

    return make


@pytest.mark.parametrize(("count", "visible", "devices"), [
    (2, None, ["cuda:0", "cuda:1"]), (8, "2,5", ["cuda:0", "cuda:1"]), (8, "GPU-8932f937, MIG-1", ["cuda:0", "cuda:1"]),
    (2, "", ["auto"]), (2, "-1", ["auto"]), (2, "1,-1,0", ["cuda:0"]), (2, "1,7,0", ["cuda:0"]), (0, None, ["auto"]), (0, "0", ["auto"]),
])  # fmt: skip
def test_by_default_a_worker_has_a_process_for_every_visible_gpu(machine, count, visible, devices):
    machine(count, visible)
    assert worker_devices("auto") == devices


def test_without_a_driver_torch_chooses_the_device(monkeypatch):
    def fail():
        raise pynvml.NVMLError_LibraryNotFound

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert worker_devices("auto") == ["auto"]


def test_named_devices_are_taken_as_they_are(machine):
    machine(0, None)
    assert worker_devices("cuda:0,cuda:1") == ["cuda:0", "cuda:1"]
    assert worker_devices("cpu") == ["cpu"]


@pytest.mark.parametrize(("visible", "index", "shown"), [
    (None, 1, "1"), ("2,5", 0, "2"), ("2,5", 1, "5"), ("GPU-8932f937,MIG-1", 1, "MIG-1"), ("2,5", 2, ""), ("", 0, ""),
])  # fmt: skip
def test_a_process_shows_cuda_its_own_of_the_visible_gpus(machine, visible, index, shown):
    machine(8, visible)
    show_only(index)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == shown
