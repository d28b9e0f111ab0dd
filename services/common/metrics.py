"""The metrics that every service has, and what their declarations share. Each service declares its own in its `metrics` module.

Names and units are those of Prometheus's conventions. No label may take values without bound: there are experiments and outcomes, but no
trials, shards, pods or tasks.
"""

import platform
from importlib.metadata import version

from prometheus_client import Counter, Histogram, Info

#: Upper bounds in seconds, from a small network on a fast device to a large one on a slow one.
LONG_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200, 1800, 3600)
#: The same for what is over soon.
SHORT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

BUILD = Info("memtail_build", "The version of memtail and of Python that a service runs; always 1")
PASSES = Counter(
    "memtail_passes_total", "Passes of a service's loop: completed, or given up, which is made up for by the next", ["outcome"]
)
PASS_SECONDS = Histogram("memtail_pass_seconds", "Seconds of a pass of a service's loop", buckets=SHORT_BUCKETS)
STORE_REQUESTS = Counter(
    "memtail_store_requests_total",
    "Requests to the object store, retries included: get, put, list, head or delete; ok, absent, exists (a conditional write that another "
    "was before), refused, or failed",
    ["operation", "outcome"],
)
STORE_SECONDS = Histogram("memtail_store_request_seconds", "Seconds of a request to the object store", ["operation"], buckets=SHORT_BUCKETS)
STORE_BYTES = Counter("memtail_store_bytes_total", "Bytes of objects read from the store and written to it", ["direction"])

# There from the start, so that the first of them is an increase.
for _operation in ("get", "put", "list", "head", "delete"):
    for _outcome in ("ok", "refused", "failed"):
        STORE_REQUESTS.labels(_operation, _outcome)

BUILD.info({"version": version("memtail"), "python": platform.python_version()})


def count_request(operation: str, outcome: str, seconds: float, size: int) -> None:
    """Count a request to the object store, as `memtail.storage.Observer` is told of it."""
    STORE_REQUESTS.labels(operation, outcome).inc()
    STORE_SECONDS.labels(operation).observe(seconds)
    if size:
        STORE_BYTES.labels("read" if operation == "get" else "written").inc(size)
