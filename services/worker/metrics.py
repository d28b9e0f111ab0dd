"""Metrics of a worker, exported by its parent process from the reports of its training processes.

The series of an experiment are removed some time after the worker last trained it.
"""

from prometheus_client import Counter, Gauge, Histogram

from services.common.metrics import LONG_BUCKETS

ATTEMPTS = Counter(
    "memtail_shard_attempts_total",
    "Assignments that a worker received, by outcome: committed, lost race, verified, done before, leased by another, not wanted, failed, "
    "handed back, worker fault, unsupported, left to another or died",
    ["experiment", "outcome"],
)
TRIALS = Counter("memtail_trials_trained_total", "Trials trained and committed", ["experiment"])
EXAMPLES = Counter("memtail_examples_trained_total", "Training examples processed, counted once per epoch", ["experiment"])
TRIAL_SECONDS = Histogram(
    "memtail_trial_seconds", "Training time of a shard divided by its number of trials", ["experiment"], buckets=LONG_BUCKETS
)
PHASE_SECONDS = Histogram(
    "memtail_trial_phase_seconds",
    "Time of a phase of training per trial: data, forward/backward, optimizer or evaluation; the last three are computation",
    ["experiment", "phase"],
    buckets=LONG_BUCKETS,
)
HELD_SECONDS = Counter(
    "memtail_shard_held_seconds_total",
    "Time for which trained shards held their device, from the message to the end of the commit",
    ["experiment"],
)
QUEUE_SECONDS = Histogram(
    "memtail_shard_queue_seconds", "Time from the dispatcher to a worker, by the broker's clock", ["experiment"], buckets=LONG_BUCKETS
)
REPLICAS_DIFFER = Counter(
    "memtail_replicas_differ_total",
    "Shards trained twice with different outcomes, by the kinds of the two devices: equal (which must not happen) or different",
    ["experiment", "kinds"],
)
DROPPED = Counter("memtail_messages_dropped_total", "Messages that were dropped because they are not assignments")
UNREADABLE = Counter("memtail_worker_reports_unreadable_total", "Reports of training processes that could not be read or counted")
FAULTS = Counter("memtail_worker_faults_total", "Shards handed back because this worker was at fault: its device, disk or cache")

DEVICES = Gauge("memtail_worker_devices", "Devices of a worker, with one training process each")
DEVICES_BUSY = Gauge("memtail_worker_devices_busy", "Devices of a worker that are training")
DEVICE_MEMORY = Gauge("memtail_device_memory_used_bytes", "Memory in use on a GPU, by all processes", ["device"])
DEVICE_MEMORY_SIZE = Gauge("memtail_device_memory_size_bytes", "Memory of a GPU", ["device"])
DEVICE_UTILIZATION = Gauge("memtail_device_utilization_ratio", "Share of the sampling period in which a GPU computed, 0 to 1", ["device"])
DEVICE_UP = Gauge("memtail_device_up", "1 if NVML has read a GPU within the last minute, 0 if it is lost or its driver fails", ["device"])
DEVICE_XIDS = Counter(
    "memtail_device_xids_total",
    "Errors of a GPU that the driver reported since the worker started, by NVIDIA's Xid number",
    ["device", "xid"],
)
DEVICE_ECC_ERRORS = Gauge(
    "memtail_device_uncorrected_ecc_errors",
    "Uncorrected memory errors of a GPU since its last reset or its manufacture",
    ["device", "since"],
)
DEVICE_REMAPPED = Gauge(
    "memtail_device_remapped_rows",
    "Remapped rows of a GPU's memory, or retired pages of an older GPU, by cause: corrected or uncorrected errors",
    ["device", "cause"],
)
DEVICE_REMAPPING = Gauge(
    "memtail_device_remapping",
    "1 if a remapping of rows or a retirement of pages is in a state: pending until the GPU is reset, or failed",
    ["device", "state"],
)
DEVICE_THROTTLED = Gauge(
    "memtail_device_throttled",
    "1 if a GPU's clocks are reduced by a reason: hw thermal, hw power brake, sw thermal or sw power cap",
    ["device", "reason"],
)
