"""Evaluates every query of Grafana's dashboards, and every rule, on a real Prometheus that scraped a real experiment.

With DASHBOARD_PICTURES=FOLDER in the environment, the dashboards of that run are rendered into the folder, together with the results of all
queries and the metrics of each service as text.
"""

import json
import math
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import urllib3
import yaml

from memtail.spec import Experiment
from services.common.metrics import MEMORY_LIMIT
from services.monitoring.dashboards import FOLDER
from tests.support import dashboard_pictures as pictures
from tests.support.cluster import PROJECT, Cluster, Service
from tests.support.prometheus import PrometheusServer

pytestmark = pytest.mark.timeout(600)

TRIALS, PER_SHARD = 96, 4
DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.iterdir())}
RULES = yaml.safe_load((FOLDER.parent / "rules.yaml").read_text())
# Queries without data on a machine without GPU and Kubernetes cluster.
EMPTY = {
    "memtail_device_": "no GPU",
    **({} if math.isfinite(MEMORY_LIMIT._value.get()) else {"memtail_memory_limit_bytes": "no limit outside a container"}),
    "memtail_fleet_pod": "no cluster",
    "memtail_fleet_watch": "no cluster",
    "memtail_fleet_workers": "no cluster",
    "kubelet_": "no cluster",
    "label_values(memtail_build_info, namespace)": "namespaces exist only in a cluster",
}
SELECTED = {"$namespace": ".*", "${namespace}": ".*", "$experiment": "digits", "$__rate_interval": "10s"}


@dataclass(frozen=True)
class Run:
    """A Prometheus that scraped an experiment, and the period of the experiment."""

    prometheus: PrometheusServer
    services: list[Service]
    times: tuple[float, float]

    def series(self, query: str, instant: bool = False) -> list[dict[str, Any]]:
        """Evaluate a query after substituting its variables; returns the series with finite values."""
        for name, value in SELECTED.items():
            query = query.replace(name, value)
        if names := re.fullmatch(r"label_values\((.+), (\w+)\)", query):
            values = self.prometheus.label_values(self.times, names[1], names[2])
            return [{"metric": {names[2]: value}, "values": [[self.times[1], "1"]]} for value in values]
        result = self.prometheus.at(self.times[1], query) if instant else self.prometheus.during(self.times, query)
        return [series for series in result if any(math.isfinite(float(value)) for _, value in series["values"])]


def holds_lease_when_frozen(worker: Service, cluster: Cluster) -> bool:
    """Stop a worker's processes, and return whether one holds a lease; otherwise they continue."""
    os.killpg(worker.process.pid, signal.SIGSTOP)
    processes = {holder.split("/")[2] for holder in cluster.broker().leased().values()}  # HOST/WORKER/PROCESS/ID
    if processes & {str(process) for process in worker.children()}:
        return True
    os.killpg(worker.process.pid, signal.SIGCONT)
    return False


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, minio: Any, digits: Any) -> Iterator[Run]:
    """An experiment in which a shard fails once and a worker is killed."""
    folder, faults = tmp_path_factory.mktemp("cluster"), tmp_path_factory.mktemp("faults")
    spec = {
        "name": "digits",
        "dataset": {"name": "digits"},
        "model": {"name": "tests.support.faulty_models:faulty", "options": {"how": "raise"}},
        "training": {"epochs": 500},
        "subsets": {"trials": TRIALS},
        "execution": {"trials_per_shard": PER_SHARD, "device": "cpu"},
    }
    with Cluster(folder, minio, FAULT_FOLDER=str(faults)) as cluster:
        services = [cluster.start(name) for name in ("dispatcher", "aggregator", "worker", "worker")]
        with PrometheusServer(folder, services, minio) as prometheus:
            began = time.time()
            experiment_store = cluster.submit(Experiment.parse(spec), digits)
            # Prometheus must scrape the failure before its worker may be killed
            cluster.until(lambda: prometheus.at(time.time(), "memtail_shard_attempts_total{outcome='failed'} > 0"), 300)
            # its first shard may be in the queue twice, because the process took long to start; then it is not sent again
            cluster.until(lambda: any(cluster.events(services[-1], "shard ended")) and holds_lease_when_frozen(services[-1], cluster), 300)
            services[-1].kill()
            cluster.until_published(experiment_store, TRIALS, 300)
            counted = f"memtail_scores_published_trials == {TRIALS} and on() sum(memtail_trials{{state='committed'}}) == {TRIALS}"
            # shares of the shards sent have values only after Prometheus has scraped the redelivery of the killed worker's shard
            shares = ("redeliveries_per_shards_sent:ratio_rate10m", "leases_expired_per_shards_sent:ratio_rate1h")
            recorded = "and on() experiment:memtail_standard_error_per_bound:ratio"
            recorded += "".join(f" and on() (experiment:memtail_{share} >= 0)" for share in shares)
            ended = began

            def recorded_all() -> bool:
                nonlocal ended
                ended = time.time()
                return bool(prometheus.at(ended, f"{counted} {recorded}"))

            cluster.until(recorded_all, 300)
            yield Run(prometheus, services[:-1], (ended - math.ceil(ended - began), ended))


def queries(dashboard: dict[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """Iterate over the queries of a dashboard as (origin, query, whether it is instant)."""
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield f"{panel['id']} {panel['title']} {target['refId']}", target["expr"], target["instant"]
    for annotation in dashboard["annotations"]["list"]:
        yield f"annotation: {annotation['name']}", annotation["target"]["expr"], False
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield f"variable: {variable['name']}", variable["query"], False


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_query_of_a_dashboard_has_data_unless_exempted(run: Run, name: str) -> None:
    with_data = {origin: bool(run.series(query)) for origin, query, _ in queries(DASHBOARDS[name])}
    expected = {origin: not any(part in query for part in EMPTY) for origin, query, _ in queries(DASHBOARDS[name])}
    assert with_data == expected


def test_every_series_that_a_rule_reads_or_records_exists_unless_exempted(run: Run) -> None:
    rules = [rule for group in RULES["groups"] for rule in group["rules"]]
    selected = {selector for rule in rules for selector in selectors(run.prometheus.get("parse_query", query=rule["expr"]))}
    selected |= {rule["record"] for rule in rules if "record" in rule}
    with_data = {selector: bool(run.series(selector)) for selector in selected}
    assert with_data == {selector: not any(part in selector for part in EMPTY) for selector in selected}


def selectors(node: Any) -> Iterator[str]:
    """Iterate over the selectors in an expression that Prometheus has parsed."""
    if isinstance(node, list):
        for part in node:
            yield from selectors(part)
    elif isinstance(node, dict):
        if node.get("type") in ("vectorSelector", "matrixSelector"):
            yield "{" + ", ".join(f"{each['name']}{each['type']}{json.dumps(each['value'])}" for each in node["matchers"]) + "}"
        for part in node.values():
            yield from selectors(part)


if "DASHBOARD_PICTURES" in os.environ:  # as `make dashboards` sets it

    @pytest.mark.parametrize("name", DASHBOARDS)
    def test_render_the_dashboards(run: Run, name: str) -> None:
        folder = PROJECT / os.environ["DASHBOARD_PICTURES"]
        folder.mkdir(parents=True, exist_ok=True)
        dashboard = DASHBOARDS[name]
        results = {
            (panel["id"], target["refId"]): run.series(target["expr"], target["instant"])
            for panel in dashboard["panels"]
            for target in panel.get("targets", [])
        }
        pictures.draw(dashboard, results, run.times, folder / f"{name}.png")
        with (folder / f"{name}.txt").open("w") as file:
            for origin, query, instant in queries(dashboard):
                print(f"\n{origin}\n  {query}", file=file)
                for series in run.series(query, instant):
                    print(f"    {series['metric']} {len(series['values'])} values, the last {series['values'][-1][1]}", file=file)

    def test_write_the_metrics_of_each_service(run: Run) -> None:
        for service in run.services:
            page = urllib3.request("GET", f"http://127.0.0.1:{service.port}/metrics").data
            (PROJECT / os.environ["DASHBOARD_PICTURES"] / f"{service.name}.metrics").write_bytes(page)
