"""Metrics of the dispatcher. The series of an experiment are removed some time after its end."""

from prometheus_client import Counter, Gauge, Info

EXPERIMENTS = Gauge(
    "memtail_experiments",
    "Experiments by state: running, paused, broken (paused because its first shards failed alike), cancelled, finished or unreadable",
    ["state"],
)
TRIALS = Gauge("memtail_trials", "Trials of an experiment by state: waiting, queued, training, committed or dead", ["experiment", "state"])
OUTSTANDING = Gauge(
    "memtail_shards_outstanding",
    "Shards that are neither committed nor given up, including those in training; 0 while an experiment is paused or cancelled, or if only "
    "another version trains it",
    ["experiment"],
)
COMPLETION = Gauge(
    "memtail_completion_timestamp_seconds",
    "Estimated time at which all trials are committed, from the rate of the last minutes, as Unix time",
    ["experiment"],
)
SENT = Counter("memtail_shards_sent_total", "Shards sent to the queue", ["experiment"])
REDELIVERIES = Counter("memtail_redeliveries_total", "Shards sent to the queue that had been sent before", ["experiment"])
LEASES_EXPIRED = Counter("memtail_leases_expired_total", "Leases that expired because their worker was lost", ["experiment"])
LEADER = Gauge("memtail_dispatcher_leader", "1 for the dispatcher that leads, 0 for a standby")

BROKER = Info("memtail_broker", "Prefix of the keys in Redis, which follows from name and identity of the bucket; always 1")
QUEUED = Gauge("memtail_broker_queued_messages", "Messages in the broker's queues")
BROKER_MEMORY = Gauge("memtail_broker_memory_bytes", "Memory in use by the broker")
BROKER_MEMORY_LIMIT = Gauge("memtail_broker_memory_limit_bytes", "Memory that the broker may use (`maxmemory`); 0 without a limit")
BROKER_CLIENTS = Gauge("memtail_broker_clients", "Connections to the broker")

WORKERS = Gauge(
    "memtail_fleet_workers",
    "Workers of an experiment in the cluster by state: wanted (the target), running, pending or failed",
    ["experiment", "state"],
)
POD_TROUBLES = Counter("memtail_fleet_pod_troubles_total", "Pods of workers that failed, were disrupted or cannot start", ["reason"])
MISSING = Gauge("memtail_fleet_missing_workers", "Workers in the cluster whose experiment is missing from the bucket")
WATCHED = Gauge(
    "memtail_fleet_watched_timestamp_seconds",
    "Last time the API server answered the watch of jobs or pods, as Unix time; it does so at least once a minute",
    ["kind"],
)
WATCH_INTERRUPTIONS = Counter("memtail_fleet_watch_interruptions_total", "Interruptions of the watch of jobs or pods", ["kind"])
