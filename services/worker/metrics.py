"""The metrics of a worker. Its parent process owns them, and its training processes report to it.

Those of an experiment go away when the worker has not trained it for some time.
"""

from prometheus_client import Counter, Gauge, Histogram

from services.common.metrics import LONG_BUCKETS

ATTEMPTS = Counter(
    "memtail_shard_attempts_total",
    "Assignments that a worker took, by what became of them: committed, lost race, done before, leased by another, not wanted, failed, "
    "handed back, or died",
    ["experiment", "outcome"],
)
TRIALS = Counter("memtail_trials_trained_total", "Trials trained and committed", ["experiment"])
EXAMPLES = Counter("memtail_examples_trained_total", "Training examples that went through networks, once an epoch", ["experiment"])
TRIAL_SECONDS = Histogram(
    "memtail_trial_seconds", "Seconds of a shard's training for each of its trials", ["experiment"], buckets=LONG_BUCKETS
)
PHASE_SECONDS = Histogram(
    "memtail_trial_phase_seconds",
    "Of those, the seconds of a phase; measured on some shards only",
    ["experiment", "phase"],
    buckets=LONG_BUCKETS,
)
QUEUE_SECONDS = Histogram(
    "memtail_shard_queue_seconds", "Seconds from the dispatcher to a worker, by the broker's clock", ["experiment"], buckets=LONG_BUCKETS
)
DROPPED = Counter("memtail_messages_dropped_total", "Messages in the queue that are no assignments")

DEVICES = Gauge("memtail_worker_devices", "Devices that a worker trains on, one process each")
DEVICES_BUSY = Gauge("memtail_worker_devices_busy", "Of those, the devices that train at present")
DEVICE_MEMORY = Gauge("memtail_device_memory_used_bytes", "Memory in use on a GPU, whoever uses it", ["device"])
DEVICE_MEMORY_SIZE = Gauge("memtail_device_memory_size_bytes", "Memory of a GPU", ["device"])
DEVICE_UTILIZATION = Gauge("memtail_device_utilization_ratio", "Share of the last moment in which a GPU computed, 0 to 1", ["device"])
