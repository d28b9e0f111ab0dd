"""Dashboard of the workers: number, utilization, health, queue and failures."""

from grafana_foundation_sdk.builders import dashboard

from services.monitoring.dashboards.layout import build_dashboard
from services.monitoring.dashboards.panels import GREEN, ORANGE, RED, Rows, gauge_panel, increase, stat_panel, time_series_panel

_BUSY = "sum(memtail_worker_devices_busy{NAMESPACE}) / sum(memtail_worker_devices{NAMESPACE})"
_FAILED = 'memtail_shard_attempts_total{EXPERIMENT, outcome=~"failed|died"}'
_BY_PHASE = "sum by (phase) (memtail_trial_phase_seconds_{}{{EXPERIMENT}})"
# Both increase when a shard ends, so the window must be longer than a shard.
_COMPUTATION = (
    "sum by (instance) (rate(memtail_trial_phase_seconds_sum{EXPERIMENT, phase!='data'}[1h]))"
    " / sum by (instance) (rate(memtail_shard_held_seconds_total{EXPERIMENT}[1h]))"
)


def fleet() -> dashboard.Dashboard:
    """Build the dashboard."""
    rows: Rows = {
        "Status": [
            stat_panel(
                "Workers",
                "Workers that Prometheus scrapes. 'Workers in the cluster' below also counts pods that do not start.",
                "none",
                ("count(memtail_worker_devices{NAMESPACE})", ""),
                thresholds=((None, RED), (1, GREEN)),
                no_value="0",
            ),
            gauge_panel(
                "Busy devices",
                "Share of all workers' devices that are training. Idle devices while shards are outstanding indicate a fault.",
                (_BUSY, ""),
                ((None, ORANGE), (0.5, GREEN)),
            ),
            gauge_panel(
                "Mean GPU utilization",
                "Mean share of time in which GPUs computed. Empty without GPUs.",
                ("avg(memtail_device_utilization_ratio{NAMESPACE})", ""),
                ((None, ORANGE), (0.5, GREEN)),
            ),
            stat_panel(
                "Shards outstanding",
                "Shards that are neither committed nor given up, including those in training.",
                "short",
                ("sum(max by (experiment) (memtail_shards_outstanding{EXPERIMENT}))", ""),
                no_value="0",
            ),
            stat_panel(
                "Time in the queue",
                "95% quantile of the time from the dispatcher to a worker, over five minutes.",
                "s",
                ("histogram_quantile(0.95, sum by (le) (rate(memtail_shard_queue_seconds_bucket{EXPERIMENT}[5m])))", ""),
            ),
            stat_panel(
                "Failed attempts",
                "Attempts of the last hour that failed or whose process died. Each shard has three attempts.",
                "short",
                (f"sum{increase(_FAILED, '1h')}", ""),
                decimals=0,
                thresholds=((None, GREEN), (1, RED)),
                no_value="0",
            ),
        ],
        "Workers and devices": [
            time_series_panel(
                "Workers in the cluster",
                "Target number of workers, and existing pods by state. Pending pods wait for a node or an image. Empty unless the "
                "dispatcher starts the workers.",
                "short",
                ("sum by (state) (max by (experiment, state) (memtail_fleet_workers{EXPERIMENT}))", "{{state}}"),
                dashed="wanted",
            ),
            time_series_panel(
                "Workers and devices",
                "Workers that Prometheus scrapes, their devices, and the devices that are training.",
                "short",
                ("count(memtail_worker_devices{NAMESPACE})", "workers"),
                ("sum(memtail_worker_devices{NAMESPACE})", "devices"),
                ("sum(memtail_worker_devices_busy{NAMESPACE})", "busy devices"),
                dashed="^devices$",
            ),
            time_series_panel(
                "Pod problems",
                "Pods of workers that failed, were disrupted or cannot start, by Kubernetes's reason.",
                "short",
                (f"sum by (reason) {increase('memtail_fleet_pod_troubles_total{NAMESPACE}', '$__rate_interval')}", "{{reason}}"),
                stacked=True,
            ),
            time_series_panel(
                "GPU utilization",
                "Share of time in which a GPU computed. If it is low during training, shards are too small or loading images is too slow.",
                "percentunit",
                ("max by (instance, device) (memtail_device_utilization_ratio{NAMESPACE})", "{{instance}} {{device}}"),
                width=12,
                maximum=1,
            ),
            time_series_panel(
                "GPU memory in use",
                "Share of a GPU's memory in use, by all processes.",
                "percentunit",
                (
                    "max by (instance, device) (memtail_device_memory_used_bytes{NAMESPACE} / memtail_device_memory_size_bytes{NAMESPACE})",
                    "{{instance}} {{device}}",
                ),
                width=12,
                maximum=1,
                limit=0.95,
            ),
        ],
        "Queue": [
            time_series_panel(
                "Shards outstanding and queued",
                "Outstanding shards by experiment, and messages in the broker. The dispatcher limits the length of the queue, so the queue "
                "holds a part of the shards.",
                "short",
                ("max by (experiment) (memtail_shards_outstanding{EXPERIMENT})", "{{experiment}}"),
                ("max(memtail_broker_queued_messages{NAMESPACE})", "messages in the broker"),
                dashed="^messages",
            ),
            time_series_panel(
                "Time in the queue",
                "Time from the dispatcher to a worker.",
                "s",
                (
                    "histogram_quantile(0.95, sum by (le) (rate(memtail_shard_queue_seconds_bucket{EXPERIMENT}[$__rate_interval])))",
                    "95% quantile",
                ),
                ("histogram_quantile(0.5, sum by (le) (rate(memtail_shard_queue_seconds_bucket{EXPERIMENT}[$__rate_interval])))", "median"),
            ),
            time_series_panel(
                "Sent, redelivered, leases expired",
                "Shards sent to the queue; shards sent again after a failure or a loss; leases that expired because their worker was lost.",
                "count:shards/s",
                ("sum(rate(memtail_shards_sent_total{EXPERIMENT}[$__rate_interval]))", "sent"),
                ("sum(rate(memtail_redeliveries_total{EXPERIMENT}[$__rate_interval]))", "redelivered"),
                ("sum(rate(memtail_leases_expired_total{EXPERIMENT}[$__rate_interval]))", "leases expired"),
            ),
        ],
        "Training": [
            time_series_panel(
                "Attempts by outcome",
                "Outcomes of the assignments that workers received. Lost race: another worker had committed the shard first, so that the "
                "work was done twice.",
                "count:shards/s",
                ("sum by (outcome) (rate(memtail_shard_attempts_total{EXPERIMENT}[$__rate_interval]))", "{{outcome}}"),
                width=12,
                stacked=True,
                colors={"committed": GREEN, "failed": RED, "died": RED},
            ),
            time_series_panel(
                "Phases of a trial",
                "Mean time of each phase since the workers started. The remaining time of a trial is spent on building networks and on "
                "startup.",
                "s",
                (f"{_BY_PHASE.format('sum')} / {_BY_PHASE.format('count')}", "{{phase}}"),
                width=12,
                stacked=True,
            ),
            time_series_panel(
                "Computation",
                "Share of the time of the last hour's shards, from the message to the commit, in which their devices computed: forward and "
                "backward passes, optimizer, evaluation. The rest is data, new networks and commits. Empty for training code of your own.",
                "percentunit",
                (_COMPUTATION, "{{instance}}"),
                width=12,
                maximum=1,
            ),
            time_series_panel(
                "Examples per second",
                "Training examples processed, by experiment.",
                "count:examples/s",
                ("sum by (experiment) (rate(memtail_examples_trained_total{EXPERIMENT}[$__rate_interval]))", "{{experiment}}"),
                width=12,
                stacked=True,
            ),
        ],
        "GPU health": [
            time_series_panel(
                "GPUs down",
                "GPUs that the driver does not answer about: lost, or the driver fails. Their other metrics are missing meanwhile.",
                "short",
                ("1 - min by (instance, device) (memtail_device_up{NAMESPACE})", "{{instance}} {{device}}"),
                maximum=1,
            ),
            time_series_panel(
                "Xid errors",
                "Errors that the driver reported, by NVIDIA's Xid number. 13, 31 and 43 are caused by a program, most others by the GPU.",
                "short",
                (
                    f"sum by (instance, device, xid) {increase('memtail_device_xids_total{NAMESPACE}', '$__rate_interval')}",
                    "{{instance}} {{device}}: {{xid}}",
                ),
                stacked=True,
            ),
            time_series_panel(
                "Failed attempts by worker",
                "Share of a worker's attempts in an hour that failed or whose process died. One worker far above the others has a fault.",
                "percentunit",
                (
                    "sum by (instance) (rate(memtail_shard_attempts_total{EXPERIMENT, outcome=~'failed|died'}[1h]))"
                    " / sum by (instance) (rate(memtail_shard_attempts_total{EXPERIMENT, outcome=~'committed|lost race|failed|died'}[1h]))",
                    "{{instance}}",
                ),
                maximum=1,
            ),
            time_series_panel(
                "Memory errors",
                "Uncorrected errors since the last reset of a GPU, and remappings of rows that wait for a reset or failed.",
                "short",
                (
                    'max by (instance, device) (memtail_device_uncorrected_ecc_errors{NAMESPACE, since="reset"}) > 0',
                    "{{instance}} {{device}}: errors",
                ),
                (
                    "max by (instance, device, state) (memtail_device_remapping{NAMESPACE}) > 0",
                    "{{instance}} {{device}}: remapping {{state}}",
                ),
                width=12,
            ),
            time_series_panel(
                "Throttling",
                "GPUs whose clocks are reduced, by reason. At the power cap a GPU is busy; heat and the power brake are faults.",
                "short",
                ("sum by (reason) (memtail_device_throttled{NAMESPACE})", "{{reason}}"),
                width=12,
            ),
        ],
    }
    return build_dashboard("Fleet", "Workers: devices, health, queue, attempts, phases.", rows, experiments="many")
