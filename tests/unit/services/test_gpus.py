"""GPU metrics of a worker, with a driver that fails on demand behind the real module `pynvml`."""

import inspect
import threading
from collections import deque
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
from prometheus_client import REGISTRY
from prometheus_client.metrics import MetricWrapperBase

from services.worker import gpus, metrics
from services.worker.gpus import Gpus


class Driver:
    """NVIDIA's driver with a number of H200: its methods replace those of `pynvml`."""

    def __init__(self, count: int = 1) -> None:
        self.count, self.initialized, self.event_sets = count, 0, 0
        self.fails: type[Exception] | None = None  # at any call
        self.lost: dict[int, type[Exception]] = {}  # by device
        self.xids: dict[int, deque[int]] = {index: deque() for index in range(count)}
        self.ecc = {pynvml.NVML_VOLATILE_ECC: 0, pynvml.NVML_AGGREGATE_ECC: 0}
        self.rows, self.reasons = (0, 0, 0, 0), pynvml.nvmlClocksEventReasonGpuIdle
        self.retired: list[int] | None = None  # pages, if the GPU retires pages instead of remapping rows

    def _check(self, handle: Any = None) -> None:
        if self.fails:
            raise self.fails()
        if not self.initialized:
            raise pynvml.NVMLError_Uninitialized()
        if handle in self.lost:
            raise self.lost[handle]()

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's name, as all below
        if self.fails:
            raise self.fails()
        self.initialized += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self._check()
        self.initialized -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        self._check()
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        self._check(index)
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: Any = None) -> Any:  # noqa: N802
        self._check(handle)
        return SimpleNamespace(used=1 << 30, total=140 << 30)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:  # noqa: N802
        self._check(handle)
        return SimpleNamespace(gpu=93, memory=40)

    def nvmlDeviceGetTotalEccErrors(self, handle: int, errorType: int, counterType: int) -> int:  # noqa: N802
        self._check(handle)
        assert errorType == pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
        return self.ecc[counterType]

    def nvmlDeviceGetRemappedRows(self, device: int) -> tuple[int, int, int, int]:  # noqa: N802
        self._check(device)
        if self.retired is not None:
            raise pynvml.NVMLError_NotSupported()
        return self.rows

    def nvmlDeviceGetRetiredPagesPendingStatus(self, device: int) -> int:  # noqa: N802
        self._check(device)
        if self.retired is None:
            raise pynvml.NVMLError_NotSupported()
        return 1

    def nvmlDeviceGetRetiredPages(self, device: int, sourceFilter: int) -> list[int]:  # noqa: N802
        self._check(device)
        assert self.retired is not None
        return self.retired[: sourceFilter + 1]

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: int) -> int:  # noqa: N802
        self._check(handle)
        return self.reasons

    def nvmlEventSetCreate(self) -> Any:  # noqa: N802
        self._check()
        self.event_sets += 1
        return SimpleNamespace(device=None)

    def nvmlDeviceRegisterEvents(self, handle: int, eventTypes: int, eventSet: Any) -> None:  # noqa: N802
        self._check(handle)
        assert eventTypes == pynvml.nvmlEventTypeXidCriticalError
        eventSet.device = handle

    def nvmlEventSetWait(self, eventSet: Any, timeoutms: int) -> Any:  # noqa: N802
        if not self.xids[eventSet.device]:
            raise pynvml.NVMLError_Timeout()
        return SimpleNamespace(eventType=pynvml.nvmlEventTypeXidCriticalError, eventData=self.xids[eventSet.device].popleft())

    def nvmlEventSetFree(self, eventSet: Any) -> None:  # noqa: N802
        self.event_sets -= 1


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch):
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase) and "device" in metric._labelnames:
            metric.clear()
    driver = Driver()
    for name, function in inspect.getmembers(driver, inspect.ismethod):
        if name.startswith("nvml"):
            assert [*inspect.signature(function).parameters] == [*inspect.signature(getattr(pynvml, name)).parameters], name
            monkeypatch.setattr(pynvml, name, function)
    return driver


def value(name: str, device: str = "0", **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, {"device": device, **labels})


def test_health_of_a_gpu_is_exported(driver):
    driver.ecc = {pynvml.NVML_VOLATILE_ECC: 2, pynvml.NVML_AGGREGATE_ECC: 5}
    driver.rows = (1, 3, 1, 0)
    driver.reasons = pynvml.nvmlClocksEventReasonHwThermalSlowdown | pynvml.nvmlClocksEventReasonHwSlowdown
    driver.xids[0].extend([31, 79, 31])
    Gpus(["cuda:0"]).read(pynvml)
    assert value("memtail_device_up") == 1
    assert value("memtail_device_utilization_ratio") == 0.93
    assert value("memtail_device_uncorrected_ecc_errors", since="reset") == 2
    assert value("memtail_device_uncorrected_ecc_errors", since="manufacture") == 5
    assert value("memtail_device_remapped_rows", cause="uncorrected") == 3
    assert value("memtail_device_remapping", state="pending") == 1
    assert value("memtail_device_remapping", state="failed") == 0
    assert value("memtail_device_throttled", reason="hw thermal") == 1
    assert value("memtail_device_throttled", reason="hw power brake") == 0
    assert value("memtail_device_xids_total", xid="31") == 2
    assert value("memtail_device_xids_total", xid="79") == 1


def test_an_older_gpu_has_retired_pages(driver):
    driver.retired = [4096, 8192]
    Gpus(["cuda:0"]).read(pynvml)
    assert value("memtail_device_remapped_rows", cause="corrected") == 1
    assert value("memtail_device_remapped_rows", cause="uncorrected") == 2
    assert value("memtail_device_remapping", state="pending") == 1
    assert value("memtail_device_remapping", state="failed") is None


def test_a_lost_gpu_is_down_and_has_no_state_beside_a_healthy_one(driver):
    driver.count = 2
    driver.xids[1] = deque()
    exported = Gpus(["cuda:0", "cuda:1"])
    exported.read(pynvml)
    driver.lost[1] = pynvml.NVMLError_GpuIsLost
    driver.xids[1].append(79)
    exported.read(pynvml)
    assert (value("memtail_device_up", "0"), value("memtail_device_up", "1")) == (1, 0)
    assert value("memtail_device_utilization_ratio", "0") == 0.93
    assert value("memtail_device_utilization_ratio", "1") is None
    assert value("memtail_device_remapping", "1", state="pending") is None
    assert value("memtail_device_xids_total", "1", xid="79") == 1
    driver.lost.clear()
    exported.read(pynvml)
    assert value("memtail_device_up", "1") == 1


@pytest.mark.parametrize("error", ["DriverNotLoaded", "LibRmVersionMismatch", "Unknown", "GpuIsLost", "LibraryNotFound"])
def test_a_driver_that_fails_at_start_shows_the_configured_gpus_as_down_until_it_works(driver, error):
    driver.fails = getattr(pynvml, f"NVMLError_{error}")
    exported = Gpus(["cuda:0"])
    for _ in range(2):
        try:
            exported.read(pynvml)
        except pynvml.NVMLError_LibraryNotFound:
            assert error == "LibraryNotFound"
        assert value("memtail_device_up") == 0
        assert value("memtail_device_utilization_ratio") is None
    driver.fails = None
    exported.read(pynvml)
    assert value("memtail_device_up") == 1
    assert driver.initialized == 1


def test_a_driver_that_fails_later_is_initialized_again_and_leaks_no_event_set(driver):
    exported = Gpus(["cuda:0"])
    exported.read(pynvml)
    for _ in range(3):
        driver.lost[0] = pynvml.NVMLError_ResetRequired
        exported.read(pynvml)
        assert value("memtail_device_up") == 0
    assert driver.event_sets == driver.initialized == 0
    driver.lost.clear()
    exported.read(pynvml)
    assert value("memtail_device_up") == 1
    assert driver.event_sets == driver.initialized == 1


def test_a_gpu_beyond_those_of_the_machine_is_down(driver):
    Gpus(["cuda:3"]).read(pynvml)
    assert (value("memtail_device_up", "0"), value("memtail_device_up", "3")) == (1, 0)


def test_a_gpu_that_hides_its_memory_is_up(driver, monkeypatch):
    def hidden(handle: Any, version: Any = None) -> Any:
        raise pynvml.NVMLError_NoPermission()

    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", hidden)
    Gpus(["cuda:0"]).read(pynvml)
    assert value("memtail_device_up") == 1
    assert value("memtail_device_memory_used_bytes") is None


def test_a_call_of_the_driver_that_hangs_shows_the_gpu_as_down(driver, monkeypatch):
    hangs, ends = threading.Event(), threading.Event()

    def hang(handle: Any, version: Any = None) -> Any:
        hangs.set()
        ends.wait()
        raise pynvml.NVMLError_Unknown()

    monkeypatch.setattr(gpus, "_INTERVAL", 0.01)
    monkeypatch.setattr(gpus, "_FORK_WAIT", 0.01)
    Gpus(["cuda:0"]).follow()
    assert value("memtail_device_up") == 1
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", hang)
    assert hangs.wait(60)
    monkeypatch.setattr(gpus, "_TIMEOUT", 0.0)
    assert value("memtail_device_up") == 0
    monkeypatch.setattr(gpus, "_INTERVAL", 1e6)
    ends.set()


def test_a_machine_without_gpus_exports_none(driver):
    driver.fails = pynvml.NVMLError_LibraryNotFound
    before = threading.active_count()
    Gpus(["cpu"]).follow()
    assert threading.active_count() == before
    assert not [sample for metric in REGISTRY.collect() for sample in metric.samples if "device" in sample.labels]
