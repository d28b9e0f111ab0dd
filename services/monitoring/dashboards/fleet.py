"""The dashboard of the workers: are there enough, are they busy, and what goes wrong?"""

from grafana_foundation_sdk.builders import dashboard

from services.monitoring.dashboards.parts import GREEN, ORANGE, RED, Rows, course, grown, number, page, share

_BUSY = "sum(memtail_worker_devices_busy{NAMESPACE}) / sum(memtail_worker_devices{NAMESPACE})"
_FAILED = 'memtail_shard_attempts_total{EXPERIMENT, outcome=~"failed|died"}'
_BY_PHASE = "sum by (phase) (memtail_trial_phase_seconds_{}{{EXPERIMENT}})"


def fleet() -> dashboard.Dashboard:
    """Builds it."""
    rows: Rows = {
        "Is there work, and who does it?": [
            number(
                "Workers",
                "Workers that are scraped. A panel below has the pods of a cluster, those that do not start too.",
                "none",
                ("count(memtail_worker_devices{NAMESPACE})", ""),
                thresholds=((None, RED), (1, GREEN)),
                none="0",
            ),
            share(
                "Devices that train",
                "Of all devices of all workers. Idle ones beside outstanding shards are a fault.",
                (_BUSY, ""),
                ((None, ORANGE), (0.5, GREEN)),
            ),
            share(
                "GPUs compute",
                "Mean share of the time in which GPUs computed. Nothing where there are none.",
                ("avg(memtail_device_utilization_ratio{NAMESPACE})", ""),
                ((None, ORANGE), (0.5, GREEN)),
            ),
            number(
                "Shards outstanding",
                "Neither committed nor given up: they wait, or are being trained.",
                "short",
                ("sum(max by (experiment) (memtail_shards_outstanding{EXPERIMENT}))", ""),
                none="0",
            ),
            number(
                "Time in the queue",
                "95% of the shards of the last five minutes waited at most so long from the dispatcher to a worker.",
                "s",
                ("histogram_quantile(0.95, sum by (le) (rate(memtail_shard_queue_seconds_bucket{EXPERIMENT}[5m])))", ""),
            ),
            number(
                "Failed attempts",
                "Attempts at a shard in the last hour that failed, or whose process died. Each is tried three times.",
                "short",
                (f"sum{grown(_FAILED, '1h')}", ""),
                decimals=0,
                thresholds=((None, GREEN), (1, RED)),
                none="0",
            ),
        ],
        "Workers and devices": [
            course(
                "Workers in the cluster",
                "Pods that the dispatcher wants, and those that there are. Pending ones wait for a node or an image. Nothing where the "
                "dispatcher makes no workers.",
                "short",
                ("sum by (state) (max by (experiment, state) (memtail_fleet_workers{EXPERIMENT}))", "{{state}}"),
                dashed="wanted",
            ),
            course(
                "Workers and devices",
                "Workers that are scraped, the devices that they have, and the devices that train.",
                "short",
                ("count(memtail_worker_devices{NAMESPACE})", "workers"),
                ("sum(memtail_worker_devices{NAMESPACE})", "devices"),
                ("sum(memtail_worker_devices_busy{NAMESPACE})", "devices that train"),
                dashed="^devices$",
            ),
            course(
                "Pods in trouble",
                "Pods of workers that failed, were taken away, or do not start, by the reason that the cluster gives.",
                "short",
                (f"sum by (reason) {grown('memtail_fleet_pod_troubles_total{NAMESPACE}', '$__rate_interval')}", "{{reason}}"),
                stacked=True,
            ),
            course(
                "GPU utilization",
                "Share of the time in which a GPU computed. Low while it trains: shards too small, or images that do not come fast enough.",
                "percentunit",
                ("max by (instance, device) (memtail_device_utilization_ratio{NAMESPACE})", "{{instance}} {{device}}"),
                width=12,
                most=1,
            ),
            course(
                "GPU memory in use",
                "Of what a GPU has, whoever uses it.",
                "percentunit",
                (
                    "max by (instance, device) (memtail_device_memory_used_bytes{NAMESPACE} / memtail_device_memory_size_bytes{NAMESPACE})",
                    "{{instance}} {{device}}",
                ),
                width=12,
                most=1,
                limit=0.95,
            ),
        ],
        "Queue": [
            course(
                "Shards outstanding, and in the queue",
                "What is to be done, by experiment, and the messages that wait in the broker: a part of it, since the dispatcher sends no "
                "more than workers will soon take.",
                "short",
                ("max by (experiment) (memtail_shards_outstanding{EXPERIMENT})", "{{experiment}}"),
                ("max(memtail_broker_queued_messages{NAMESPACE})", "messages in the broker"),
                dashed="^messages",
            ),
            course(
                "Time in the queue",
                "Seconds from the dispatcher to a worker.",
                "s",
                (
                    "histogram_quantile(0.95, sum by (le) (rate(memtail_shard_queue_seconds_bucket{EXPERIMENT}[$__rate_interval])))",
                    "95% at most",
                ),
                ("histogram_quantile(0.5, sum by (le) (rate(memtail_shard_queue_seconds_bucket{EXPERIMENT}[$__rate_interval])))", "median"),
            ),
            course(
                "Sent, sent again, leases expired",
                "Shards put into the queue; those put there once more, since they failed or went astray; leases whose worker vanished.",
                "count:shards/s",
                ("sum(rate(memtail_shards_sent_total{EXPERIMENT}[$__rate_interval]))", "sent"),
                ("sum(rate(memtail_redeliveries_total{EXPERIMENT}[$__rate_interval]))", "sent again"),
                ("sum(rate(memtail_leases_expired_total{EXPERIMENT}[$__rate_interval]))", "leases expired"),
            ),
        ],
        "Training": [
            course(
                "Attempts by outcome",
                "What became of the assignments that workers took. A lost race is one that another had committed meanwhile: harmless, but "
                "work done twice.",
                "count:shards/s",
                ("sum by (outcome) (rate(memtail_shard_attempts_total{EXPERIMENT}[$__rate_interval]))", "{{outcome}}"),
                stacked=True,
                colors={"committed": GREEN, "failed": RED, "died": RED},
            ),
            course(
                "Phases of a trial",
                "Mean seconds of each phase since the workers started, of the shards in which they are measured. What is missing to the "
                "seconds of a trial goes into building networks and starting up.",
                "s",
                (f"{_BY_PHASE.format('sum')} / {_BY_PHASE.format('count')}", "{{phase}}"),
                stacked=True,
            ),
            course(
                "Examples per second",
                "Training examples that went through networks, by experiment.",
                "count:examples/s",
                ("sum by (experiment) (rate(memtail_examples_trained_total{EXPERIMENT}[$__rate_interval]))", "{{experiment}}"),
                stacked=True,
            ),
        ],
    }
    return page("Fleet", "What workers do: devices, queue, attempts, phases.", rows, experiments="many")
