"""GPU metrics of a worker's machine, read through NVML at each scrape. Machines without NVIDIA GPUs export none."""

import math
from collections.abc import Callable
from typing import Any

from services.worker import metrics


def register_gpu_metrics() -> None:
    """Export memory and utilization of each GPU that is visible to this process, as far as NVML reports them."""
    try:
        import pynvml
    except ModuleNotFoundError:
        return
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:  # no driver, or a driver that does not respond
        return
    for index, handle in enumerate(handles):
        for gauge, read in (
            (metrics.DEVICE_MEMORY, lambda handle=handle: pynvml.nvmlDeviceGetMemoryInfo(handle).used),
            (metrics.DEVICE_MEMORY_SIZE, lambda handle=handle: pynvml.nvmlDeviceGetMemoryInfo(handle).total),
            (metrics.DEVICE_UTILIZATION, lambda handle=handle: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100),
        ):
            reading = _or_nan(read, pynvml.NVMLError)
            if not math.isnan(reading()):  # a MIG instance, for one, has no utilization
                gauge.labels(str(index)).set_function(reading)


def _or_nan(read: Callable[[], Any], error: type[Exception]) -> Callable[[], float]:
    def reading() -> float:
        try:
            return float(read())
        except error:
            return math.nan

    return reading
