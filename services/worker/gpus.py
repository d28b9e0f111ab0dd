"""GPU metrics of a worker's machine: load, and health as NVML sees it. Machines without NVIDIA GPUs export none.

A background thread reads NVML, because a call can hang while a GPU fails, and neither training nor the health checks may wait for it. The
thread does not log.
"""

import os
import threading
import time
from contextlib import suppress
from typing import Any

from services.worker import metrics

# Seconds between two readings.
_INTERVAL = 10.0
# Age in seconds of a device's last reading from which the device counts as down.
_TIMEOUT = 60.0
# Milliseconds to wait for an event: only those that have happened are of interest.
_POLL = 1
# Longest wait in seconds of a fork for the end of a reading.
_FORK_WAIT = 5.0

# Gauges of a device's state, which is unknown while it cannot be read.
_STATE = (
    metrics.DEVICE_MEMORY,
    metrics.DEVICE_MEMORY_SIZE,
    metrics.DEVICE_UTILIZATION,
    metrics.DEVICE_ECC_ERRORS,
    metrics.DEVICE_REMAPPED,
    metrics.DEVICE_REMAPPING,
    metrics.DEVICE_THROTTLED,
)


class Gpus:
    """Exports the metrics of all GPUs that are visible to this process.

    Args:
        devices: devices of the worker. Its GPUs count as down until NVML reads them.
    """

    def __init__(self, devices: list[str]) -> None:
        self._configured = [device.partition(":")[2] or "0" for device in devices if device.startswith("cuda")]
        self._handles: dict[str, Any] = {}
        self._events: dict[str, Any] = {}  # NVML's event set of each device that reports Xids
        self._read_at: dict[str, float] = {}
        self._reading = threading.Lock()
        self._held_for_fork = False
        for device in self._configured:
            self._show(device)

    def follow(self) -> None:
        """Read once, then periodically in a background thread."""
        try:
            import pynvml
        except ModuleNotFoundError:
            return
        try:
            self.read(pynvml)
        except pynvml.NVMLError_LibraryNotFound:
            if not self._configured:
                return
        # a training process forked during a call of NVML would inherit NVML's locks, and hang in torch
        os.register_at_fork(before=self._before_fork, after_in_parent=self._after_fork, after_in_child=self._after_fork)
        threading.Thread(target=self._follow, args=(pynvml,), daemon=True).start()

    def _follow(self, nvml: Any) -> None:
        while True:
            time.sleep(_INTERVAL)
            with self._reading, suppress(nvml.NVMLError_LibraryNotFound):
                self.read(nvml)

    def _before_fork(self) -> None:
        self._held_for_fork = self._reading.acquire(timeout=_FORK_WAIT)

    def _after_fork(self) -> None:
        if self._held_for_fork:
            self._reading.release()

    def read(self, nvml: Any) -> None:
        """Update the metrics of all devices; if none can be read, NVML is initialized again by the next call.

        Args:
            nvml: the module `pynvml`.

        Raises:
            NVMLError_LibraryNotFound: this machine has no NVIDIA driver.
        """
        try:
            if not self._handles:
                nvml.nvmlInit()
                self._open(nvml)
        except nvml.NVMLError_LibraryNotFound:
            raise
        except nvml.NVMLError:  # a driver that is not loaded, of another version than the library, or without an answer
            pass
        readable = [device for device, handle in self._handles.items() if self._read_device(nvml, device, handle)]
        if not readable:
            self._close(nvml)

    def _open(self, nvml: Any) -> None:
        for index in range(nvml.nvmlDeviceGetCount()):
            device = str(index)
            self._show(device)
            with suppress(nvml.NVMLError):
                self._handles[device] = nvml.nvmlDeviceGetHandleByIndex(index)
                events = self._events[device] = nvml.nvmlEventSetCreate()
                nvml.nvmlDeviceRegisterEvents(self._handles[device], nvml.nvmlEventTypeXidCriticalError, events)

    def _close(self, nvml: Any) -> None:
        with suppress(nvml.NVMLError):
            for events in self._events.values():
                nvml.nvmlEventSetFree(events)
            nvml.nvmlShutdown()
        self._handles, self._events = {}, {}

    def _show(self, device: str) -> None:
        def is_up() -> bool:
            read_at = self._read_at.get(device)
            return read_at is not None and time.monotonic() - read_at < _TIMEOUT

        metrics.DEVICE_UP.labels(device).set_function(is_up)

    def _read_device(self, nvml: Any, device: str, handle: Any) -> bool:
        """Update the metrics of a device; if it cannot be read, remove those of its state."""
        with suppress(nvml.NVMLError):  # a timeout: there are no more events
            while device in self._events:
                xid = nvml.nvmlEventSetWait(self._events[device], _POLL).eventData
                metrics.DEVICE_XIDS.labels(device, str(xid)).inc()
        try:
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            metrics.DEVICE_MEMORY.labels(device).set(memory.used)
            metrics.DEVICE_MEMORY_SIZE.labels(device).set(memory.total)
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_NoPermission):
            pass
        except nvml.NVMLError:
            self._read_at.pop(device, None)
            for gauge in _STATE:
                gauge.remove_by_labels({"device": device})
            return False
        self._read_at[device] = time.monotonic()
        for read in (_read_utilization, _read_ecc_errors, _read_remapped_rows, _read_retired_pages, _read_throttling):
            with suppress(nvml.NVMLError):  # not every GPU supports all; a MIG instance, for one, has no utilization
                read(nvml, device, handle)
        return True


def _read_utilization(nvml: Any, device: str, handle: Any) -> None:
    metrics.DEVICE_UTILIZATION.labels(device).set(nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)


def _read_ecc_errors(nvml: Any, device: str, handle: Any) -> None:
    for since, counter in (("reset", nvml.NVML_VOLATILE_ECC), ("manufacture", nvml.NVML_AGGREGATE_ECC)):
        errors = nvml.nvmlDeviceGetTotalEccErrors(handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, counter)
        metrics.DEVICE_ECC_ERRORS.labels(device, since).set(errors)


def _read_remapped_rows(nvml: Any, device: str, handle: Any) -> None:
    corrected, uncorrected, pending, failed = nvml.nvmlDeviceGetRemappedRows(handle)
    metrics.DEVICE_REMAPPED.labels(device, "corrected").set(corrected)
    metrics.DEVICE_REMAPPED.labels(device, "uncorrected").set(uncorrected)
    metrics.DEVICE_REMAPPING.labels(device, "pending").set(pending)
    metrics.DEVICE_REMAPPING.labels(device, "failed").set(failed)


def _read_retired_pages(nvml: Any, device: str, handle: Any) -> None:
    """GPUs before Ampere retire pages instead of remapping rows."""
    pending = nvml.nvmlDeviceGetRetiredPagesPendingStatus(handle)
    for cause, number in (
        ("corrected", nvml.NVML_PAGE_RETIREMENT_CAUSE_MULTIPLE_SINGLE_BIT_ECC_ERRORS),
        ("uncorrected", nvml.NVML_PAGE_RETIREMENT_CAUSE_DOUBLE_BIT_ECC_ERROR),
    ):
        metrics.DEVICE_REMAPPED.labels(device, cause).set(len(nvml.nvmlDeviceGetRetiredPages(handle, number)))
    metrics.DEVICE_REMAPPING.labels(device, "pending").set(pending)


def _read_throttling(nvml: Any, device: str, handle: Any) -> None:
    reasons = nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    for reason, bit in (
        ("hw thermal", nvml.nvmlClocksEventReasonHwThermalSlowdown),
        ("hw power brake", nvml.nvmlClocksEventReasonHwPowerBrakeSlowdown),
        ("sw thermal", nvml.nvmlClocksEventReasonSwThermalSlowdown),
        ("sw power cap", nvml.nvmlClocksEventReasonSwPowerCap),
    ):
        metrics.DEVICE_THROTTLED.labels(device, reason).set(bool(reasons & bit))
