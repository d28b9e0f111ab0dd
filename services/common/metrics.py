"""Metrics of every service, and histogram buckets. Each service declares further metrics in its `metrics` module.

Names and units follow Prometheus's conventions. Labels have few values: experiments and outcomes, but never trials, shards, pods or tasks.
"""

import math
import platform
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from prometheus_client import Counter, Gauge, Histogram, Info

#: Upper bounds in seconds for training: from a small network on a fast device to a large network on a slow device.
LONG_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200, 1800, 3600)
#: Upper bounds in seconds for short operations.
SHORT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")

BUILD = Info("memtail_build", "Versions of memtail and Python of a service; always 1")
PASSES = Counter(
    "memtail_passes_total", "Passes of a service's main loop: completed, or given up because of an outage and repeated", ["outcome"]
)
PASS_SECONDS = Histogram("memtail_pass_seconds", "Duration of a pass of a service's main loop", buckets=SHORT_BUCKETS)
MEMORY_LIMIT = Gauge("memtail_memory_limit_bytes", "Memory that the container of a service may use; +Inf without a limit")
STORE_REQUESTS = Counter(
    "memtail_store_requests_total",
    "Requests to the object store, including retries: get, put, list, head or delete; ok, absent, exists (a conditional write of an "
    "existing object), refused or failed",
    ["operation", "outcome"],
)
STORE_SECONDS = Histogram(
    "memtail_store_request_seconds", "Duration of a request to the object store", ["operation"], buckets=SHORT_BUCKETS
)
STORE_BYTES = Counter("memtail_store_bytes_total", "Bytes of objects read from and written to the object store", ["direction"])

# Exported with value 0 from the start, so that `increase` counts the first event.
for _operation in ("get", "put", "list", "head", "delete"):
    for _outcome in ("ok", "refused", "failed"):
        STORE_REQUESTS.labels(_operation, _outcome)

MEMORY_LIMIT.set(math.inf)
with suppress(OSError, ValueError):  # only Linux has it, and its value may be `max`
    MEMORY_LIMIT.set(int(_CGROUP_LIMIT.read_text()))

BUILD.info({"version": version("memtail"), "python": platform.python_version()})


def count_request(operation: str, outcome: str, seconds: float, size: int) -> None:
    """Count a request to the object store; a `memtail.storage.Observer`."""
    STORE_REQUESTS.labels(operation, outcome).inc()
    STORE_SECONDS.labels(operation).observe(seconds)
    if size:
        STORE_BYTES.labels("read" if operation == "get" else "written").inc(size)
