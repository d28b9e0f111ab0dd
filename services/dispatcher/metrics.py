"""The metrics of the dispatcher. Those of an experiment go away some time after it has ended."""

from prometheus_client import Counter, Gauge

EXPERIMENTS = Gauge("memtail_experiments", "Experiments: running, paused, cancelled, finished, or unreadable", ["state"])
TRIALS = Gauge("memtail_trials", "Trials of an experiment: waiting, queued, training, committed, or dead", ["experiment", "state"])
OUTSTANDING = Gauge(
    "memtail_shards_outstanding",
    "Shards to be trained, or being trained: neither committed nor given up; 0 while an experiment is paused or cancelled",
    ["experiment"],
)
COMPLETION = Gauge(
    "memtail_completion_timestamp_seconds", "When all trials will be committed, as the last minutes went; a Unix time", ["experiment"]
)
SENT = Counter("memtail_shards_sent_total", "Shards put into the queue", ["experiment"])
REDELIVERIES = Counter("memtail_redeliveries_total", "Shards put into the queue once more", ["experiment"])
LEASES_EXPIRED = Counter("memtail_leases_expired_total", "Leases whose worker vanished without giving them back", ["experiment"])
LEADER = Gauge("memtail_dispatcher_leader", "1 for the dispatcher that acts, 0 for one that waits to take over")

QUEUED = Gauge("memtail_broker_queued_messages", "Messages that wait in the broker")
BROKER_MEMORY = Gauge("memtail_broker_memory_bytes", "Memory that the broker uses")
BROKER_CLIENTS = Gauge("memtail_broker_clients", "Connections to the broker")

WORKERS = Gauge(
    "memtail_fleet_workers", "Workers of an experiment in the cluster: wanted, running, pending or failed", ["experiment", "state"]
)
POD_TROUBLES = Counter("memtail_fleet_pod_troubles_total", "Pods of workers that failed, were taken away, or do not start", ["reason"])
