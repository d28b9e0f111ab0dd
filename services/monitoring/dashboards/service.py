"""Dashboard of the services: their health, and that of the store and the broker."""

from grafana_foundation_sdk.builders import dashboard

from services.monitoring.dashboards.layout import build_dashboard
from services.monitoring.dashboards.panels import GREEN, RED, Query, Rows, stat_panel, table_panel, time_series_panel

_SERVICES = '{NAMESPACE, service=~"dispatcher|aggregator|explorer|worker"}'
_LEGEND = "{{service}} {{instance}}"
_LEADERS = "sum(memtail_dispatcher_leader{NAMESPACE})"


def _quantile(quantile: float, metric: str, by: str = "") -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({quantile}, sum by ({labels}) (rate({metric}_bucket{{NAMESPACE}}[$__rate_interval])))"


def _quantiles(metric: str, by: str = "") -> tuple[Query, Query]:
    prefix = f"{{{{{by}}}}} " if by else ""
    return (_quantile(0.95, metric, by), f"{prefix}95% quantile"), (_quantile(0.5, metric, by), f"{prefix}median")


def service() -> dashboard.Dashboard:
    """Build the dashboard."""
    rows: Rows = {
        "Status": [
            stat_panel(
                "Services down",
                "Dispatchers, aggregators, explorers and workers that do not respond to Prometheus.",
                "none",
                (f"sum(1 - up{_SERVICES})", ""),
                instant=True,
                thresholds=((None, GREEN), (1, RED)),
            ),
            stat_panel(
                "Leading dispatcher",
                "One dispatcher leads; others stand by.",
                "none",
                (_LEADERS, ""),
                instant=True,
                mappings={"0": ("none", RED), "1": ("one", GREEN)},
                no_value="none",
            ),
            stat_panel(
                "Passes given up",
                "Passes that the dispatcher and the aggregator gave up in the last hour because of an outage. The next pass catches up.",
                "short",
                ('sum(increase(memtail_passes_total{NAMESPACE, outcome="given up"}[1h]))', ""),
                decimals=0,
                thresholds=((None, GREEN), (1, RED)),
            ),
            stat_panel(
                "Failed store requests",
                "Share of requests that failed or were refused, including retries, over five minutes.",
                "percentunit",
                (
                    '(sum(rate(memtail_store_requests_total{NAMESPACE, outcome=~"refused|failed"}[5m])) or vector(0)) '
                    "/ sum(rate(memtail_store_requests_total{NAMESPACE}[5m]))",
                    "",
                ),
                thresholds=((None, GREEN), (0.01, RED)),
            ),
            stat_panel(
                "Store request duration",
                "95% quantile over five minutes.",
                "s",
                ("histogram_quantile(0.95, sum by (le) (rate(memtail_store_request_seconds_bucket{NAMESPACE}[5m])))", ""),
                thresholds=((None, GREEN), (5, RED)),
            ),
            stat_panel(
                "Broker memory",
                "Memory in use by Redis. It holds only queues and leases, so it stays small.",
                "bytes",
                ("max(memtail_broker_memory_bytes{NAMESPACE})", ""),
                thresholds=((None, GREEN), (268435456, RED)),
            ),
        ],
        "Experiments, dispatcher and aggregator": [
            time_series_panel(
                "Experiments by state",
                "All experiments in the bucket. The dispatcher skips unreadable experiments; its log has the reason.",
                "short",
                ("max by (state) (memtail_experiments{NAMESPACE})", "{{state}}"),
                stacked=True,
            ),
            time_series_panel(
                "Passes",
                "Passes of the main loops: the dispatcher sends missing shards, the aggregator accumulates committed batches.",
                "count:passes/s",
                ("sum by (service, outcome) (rate(memtail_passes_total{NAMESPACE}[$__rate_interval]))", "{{service}} {{outcome}}"),
            ),
            time_series_panel(
                "Pass duration",
                "95% quantile and median. The dispatcher should complete a pass every few seconds.",
                "s",
                *_quantiles("memtail_pass_seconds", "service"),
                logarithmic=True,
                limit=30,
            ),
            time_series_panel(
                "Accumulation of a trial batch",
                "Duration of reading a batch from the store and accumulating it.",
                "s",
                *_quantiles("memtail_fold_seconds"),
                width=12,
            ),
            time_series_panel(
                "Publication of scores",
                "Duration of writing and publishing all files of a version of the scores.",
                "s",
                *_quantiles("memtail_publish_seconds"),
                width=12,
            ),
        ],
        "Object store and broker": [
            time_series_panel(
                "Requests",
                "Requests of all services and workers, by operation.",
                "reqps",
                ("sum by (operation) (rate(memtail_store_requests_total{NAMESPACE}[$__rate_interval]))", "{{operation}}"),
                stacked=True,
            ),
            time_series_panel(
                "Requests by outcome",
                "Absent and exists are regular responses; refused and failed are errors.",
                "reqps",
                ("sum by (outcome) (rate(memtail_store_requests_total{NAMESPACE}[$__rate_interval]))", "{{outcome}}"),
                stacked=True,
            ),
            time_series_panel(
                "Request duration",
                "95% quantile, by operation.",
                "s",
                (_quantile(0.95, "memtail_store_request_seconds", "operation"), "{{operation}}"),
                logarithmic=True,
                limit=5,
            ),
            time_series_panel(
                "Bytes",
                "Bytes of objects read and written.",
                "Bps",
                ("sum by (direction) (rate(memtail_store_bytes_total{NAMESPACE}[$__rate_interval]))", "{{direction}}"),
            ),
            time_series_panel(
                "Free disk of the S3 server",
                "Free share of the disk. On a full disk no trial can be committed. Empty unless the server exports MinIO's metrics.",
                "percentunit",
                (
                    "min(minio_cluster_capacity_usable_free_bytes{NAMESPACE} / minio_cluster_capacity_usable_total_bytes{NAMESPACE})",
                    "free",
                ),
                maximum=1,
                limit=0.1,
            ),
            time_series_panel(
                "Broker",
                "Connections to Redis, and messages in its queues.",
                "short",
                ("max(memtail_broker_clients{NAMESPACE})", "connections"),
                ("max(memtail_broker_queued_messages{NAMESPACE})", "messages"),
            ),
        ],
        "Processes": [
            time_series_panel(
                "Up",
                "1 while a service responds to Prometheus, else 0.",
                "none",
                (f"up{_SERVICES}", _LEGEND),
                maximum=1,
            ),
            time_series_panel(
                "Memory",
                "Resident memory of each scraped process, without the training processes of workers.",
                "bytes",
                (f"process_resident_memory_bytes{_SERVICES}", _LEGEND),
            ),
            time_series_panel(
                "CPU",
                "Busy cores of each scraped process, without the training processes of workers.",
                "none",
                (f"rate(process_cpu_seconds_total{_SERVICES}[$__rate_interval])", _LEGEND),
            ),
            table_panel(
                "Builds",
                "Running versions. Mixed versions are supported only during an upgrade.",
                "none",
                ("count by (version, python) (memtail_build_info{NAMESPACE})", ""),
                {"version": "memtail", "python": "Python", "Value": "processes"},
            ),
        ],
    }
    return build_dashboard("Service", "Health of the services, the store and the broker.", rows, experiments="none")
