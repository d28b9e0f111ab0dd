"""The GPUs of a worker's machine, as NVIDIA's library sees them when metrics are asked for. Where there are none, nothing is shown."""

import math
from collections.abc import Callable
from typing import Any

from services.worker import metrics


def show() -> None:
    """Have the metrics show every GPU that this process may see, and of each what it can tell."""
    try:
        import pynvml
    except ModuleNotFoundError:
        return
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:  # no driver, or one that does not answer
        return
    for index, handle in enumerate(handles):
        for gauge, read in (
            (metrics.DEVICE_MEMORY, lambda handle=handle: pynvml.nvmlDeviceGetMemoryInfo(handle).used),
            (metrics.DEVICE_MEMORY_SIZE, lambda handle=handle: pynvml.nvmlDeviceGetMemoryInfo(handle).total),
            (metrics.DEVICE_UTILIZATION, lambda handle=handle: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100),
        ):
            reading = _or_nan(read, pynvml.NVMLError)
            if not math.isnan(reading()):  # a part of a GPU, for one, does not know how busy it is
                gauge.labels(str(index)).set_function(reading)


def _or_nan(read: Callable[[], Any], error: type[Exception]) -> Callable[[], float]:
    def reading() -> float:
        try:
            return float(read())
        except error:
            return math.nan

    return reading
