"""The metrics of the dispatcher."""

from prometheus_client import Counter, Gauge

OUTSTANDING = Gauge("memtail_shards_outstanding", "Shards neither committed nor given up: they wait, or are being trained", ["experiment"])
WORKERS = Gauge(
    "memtail_fleet_workers", "Workers of an experiment in the cluster: wanted, running, pending or failed", ["experiment", "state"]
)
POD_TROUBLES = Counter("memtail_fleet_pod_troubles_total", "Pods of workers that failed, were taken away, or do not start", ["reason"])
