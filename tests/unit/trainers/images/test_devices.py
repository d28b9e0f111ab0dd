"""Faults of a device are told from those of a shard."""

import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch

from memtail.errors import WorkerFaultError
from memtail.trainers.images import devices
from memtail.trainers.images.devices import (
    attributed,
    check_device,
    check_in_new_process,
    fault_of_machine,
    is_device_error,
    is_out_of_memory,
)

CPU = torch.device("cpu")


class AcceleratorError(RuntimeError):
    """Named as torch names it."""


# As an H200 raised them with torch 2.11.
DEVICE_ERRORS = [
    AcceleratorError("CUDA error: device-side assert triggered\nSearch for `cudaErrorAssert' in https://docs.nvidia.com"),
    AcceleratorError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("No CUDA GPUs are available"),
    RuntimeError("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
]


@pytest.mark.parametrize("error", DEVICE_ERRORS, ids=lambda error: str(error)[:40])
def test_errors_of_the_driver_are_known(error):
    assert is_device_error(error)
    caused = ValueError("of a model")
    caused.__cause__ = error
    assert is_device_error(caused)


# As an H200 raised the first three with torch 2.11; the others are from reports of users.
FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: str(error)[:40])
def test_a_full_device_is_known_by_all_its_names_and_is_no_fault_of_the_driver(error):
    assert is_out_of_memory(error)
    assert not is_device_error(error)


@pytest.mark.parametrize("error", DEVICE_ERRORS, ids=lambda error: str(error)[:40])
def test_other_errors_of_the_driver_do_not_count_as_full_memory(error):
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("error", [AcceleratorError("CUDA error: out of memory"), ValueError("CUDA error"), RuntimeError("mat1 and mat2")])
def test_other_errors_are_not_the_drivers(error):
    assert not is_device_error(error)


def test_an_error_of_the_driver_is_checked_from_a_new_process(monkeypatch):
    checked = []

    def check(device):
        checked.append(device)
        raise WorkerFaultError("device cpu cannot be used")

    monkeypatch.setattr(devices, "check_in_new_process", checked.append)
    with pytest.raises(RuntimeError, match="illegal memory access"), attributed(CPU):
        raise DEVICE_ERRORS[2]
    monkeypatch.setattr(devices, "check_in_new_process", check)
    with pytest.raises(WorkerFaultError, match="cannot be used"), attributed(CPU):
        raise DEVICE_ERRORS[2]
    assert checked == [CPU, CPU]


def test_a_check_in_a_new_process_finds_what_a_check_here_finds():
    check_in_new_process(CPU)
    for check in (check_device, check_in_new_process):
        with pytest.raises(WorkerFaultError, match=r"^device cuda:31 cannot be used: [^:]"):
            check(torch.device("cuda", 31))


def test_a_disk_without_space_is_a_fault_of_the_machine(monkeypatch):
    assert fault_of_machine("cpu") is None
    monkeypatch.setattr(tempfile, "TemporaryFile", partial(Path("/dev/full").open, "wb"))
    assert "No space left on device" in str(fault_of_machine("cpu"))
