"""The dashboard of the services: do they run, and is what they lean on well?"""

from grafana_foundation_sdk.builders import dashboard

from services.monitoring.dashboards.parts import GREEN, RED, Rows, course, listing, number, page

_OURS = '{NAMESPACE, service=~"dispatcher|aggregator|worker"}'
_NAME = "{{service}} {{instance}}"
_LEADERS = "sum(memtail_dispatcher_leader{NAMESPACE})"


def _quantile(share: float, metric: str, by: str = "") -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, sum by ({labels}) (rate({metric}_bucket{{NAMESPACE}}[$__rate_interval])))"


def service() -> dashboard.Dashboard:
    """Builds it."""
    rows: Rows = {
        "Does all run?": [
            number(
                "Services down",
                "Dispatchers, aggregators and workers that Prometheus looks for, and that do not answer.",
                "none",
                (f"sum(1 - up{_OURS})", ""),
                now=True,
                thresholds=((None, GREEN), (1, RED)),
            ),
            number(
                "Dispatcher that leads",
                "One acts; others wait to take over.",
                "none",
                (_LEADERS, ""),
                now=True,
                names={"0": ("none", RED), "1": ("one", GREEN)},
                none="none",
            ),
            number(
                "Passes given up",
                "In the last hour, by the dispatcher and the aggregator; the next pass makes up for it.",
                "short",
                ('sum(increase(memtail_passes_total{NAMESPACE, outcome="given up"}[1h]))', ""),
                decimals=0,
                thresholds=((None, GREEN), (1, RED)),
            ),
            number(
                "Store requests that fail",
                "Share of the requests of the last five minutes that did not do what was asked, retries included.",
                "percentunit",
                (
                    '(sum(rate(memtail_store_requests_total{NAMESPACE, outcome=~"refused|failed"}[5m])) or vector(0)) '
                    "/ sum(rate(memtail_store_requests_total{NAMESPACE}[5m]))",
                    "",
                ),
                thresholds=((None, GREEN), (0.01, RED)),
            ),
            number(
                "Slowest store requests",
                "95% of the requests of the last five minutes took at most so long.",
                "s",
                ("histogram_quantile(0.95, sum by (le) (rate(memtail_store_request_seconds_bucket{NAMESPACE}[5m])))", ""),
                thresholds=((None, GREEN), (5, RED)),
            ),
            number(
                "Memory of the broker",
                "What Redis uses. It holds the queue and leases only, so it stays small.",
                "bytes",
                ("max(memtail_broker_memory_bytes{NAMESPACE})", ""),
                thresholds=((None, GREEN), (268435456, RED)),
            ),
        ],
        "Experiments, dispatcher and aggregator": [
            course(
                "Experiments by state",
                "All experiments in the bucket. One that is unreadable is passed over: see the dispatcher's log.",
                "short",
                ("max by (state) (memtail_experiments{NAMESPACE})", "{{state}}"),
                stacked=True,
            ),
            course(
                "Passes",
                "Rounds of the services' loops: what is missing is looked for and sent, what has arrived is counted.",
                "count:passes/s",
                ("sum by (service, outcome) (rate(memtail_passes_total{NAMESPACE}[$__rate_interval]))", "{{service}} {{outcome}}"),
            ),
            course(
                "Seconds of a pass",
                "Of 95%, and of half of the passes. The dispatcher is to look every few seconds.",
                "s",
                (_quantile(0.95, "memtail_pass_seconds", "service"), "{{service}} 95% at most"),
                (_quantile(0.5, "memtail_pass_seconds", "service"), "{{service}} median"),
                logarithmic=True,
                limit=30,
            ),
            course(
                "Seconds to fold a trial batch",
                "To read it from the store and count it.",
                "s",
                (_quantile(0.95, "memtail_fold_seconds"), "95% at most"),
                (_quantile(0.5, "memtail_fold_seconds"), "median"),
                width=12,
            ),
            course(
                "Seconds to publish scores",
                "To write and publish a version of the scores, all files of it.",
                "s",
                (_quantile(0.95, "memtail_publish_seconds"), "95% at most"),
                (_quantile(0.5, "memtail_publish_seconds"), "median"),
                width=12,
            ),
        ],
        "Object store and broker": [
            course(
                "Requests",
                "By operation, of all services and workers.",
                "reqps",
                ("sum by (operation) (rate(memtail_store_requests_total{NAMESPACE}[$__rate_interval]))", "{{operation}}"),
                stacked=True,
            ),
            course(
                "Requests by outcome",
                "That an object is there already (exists), or is not there (absent), is an answer; what was refused or failed is a fault.",
                "reqps",
                ("sum by (outcome) (rate(memtail_store_requests_total{NAMESPACE}[$__rate_interval]))", "{{outcome}}"),
                stacked=True,
            ),
            course(
                "Seconds of a request",
                "95% of the requests took at most so long, by operation.",
                "s",
                (_quantile(0.95, "memtail_store_request_seconds", "operation"), "{{operation}}"),
                logarithmic=True,
                limit=5,
            ),
            course(
                "Bytes",
                "Objects read and written.",
                "Bps",
                ("sum by (direction) (rate(memtail_store_bytes_total{NAMESPACE}[$__rate_interval]))", "{{direction}}"),
            ),
            course(
                "Free disk of the S3 server",
                "When none is left no trial can be committed. Only of a server that says so in MinIO's way.",
                "percentunit",
                (
                    "min(minio_cluster_capacity_usable_free_bytes{NAMESPACE} / minio_cluster_capacity_usable_total_bytes{NAMESPACE})",
                    "free",
                ),
                most=1,
                limit=0.1,
            ),
            course(
                "Broker",
                "Connections to Redis, and messages that wait there.",
                "short",
                ("max(memtail_broker_clients{NAMESPACE})", "connections"),
                ("max(memtail_broker_queued_messages{NAMESPACE})", "messages"),
            ),
        ],
        "Processes": [
            course(
                "Up",
                "1 while a service answers Prometheus, 0 while it does not.",
                "none",
                (f"up{_OURS}", _NAME),
                most=1,
            ),
            course(
                "Memory",
                "Of each process that Prometheus asks; a worker's training processes are not in it.",
                "bytes",
                (f"process_resident_memory_bytes{_OURS}", _NAME),
            ),
            course(
                "CPU",
                "Cores that each process keeps busy; a worker's training processes are not in it.",
                "none",
                (f"rate(process_cpu_seconds_total{_OURS}[$__rate_interval])", _NAME),
            ),
            listing(
                "Builds",
                "What runs. Services of several versions work together only while an upgrade lasts.",
                "none",
                ("count by (version, python) (memtail_build_info{NAMESPACE})", ""),
                {"version": "memtail", "python": "Python", "Value": "processes"},
            ),
        ],
    }
    return page("Service", "How the services are, and what they lean on: store and broker.", rows, experiments="none")
