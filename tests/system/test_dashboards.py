"""Every query of Grafana's dashboards, and every rule, asked of a real Prometheus that watched a real experiment.

With DASHBOARD_PICTURES=FOLDER in the environment the dashboards of that run are drawn into a folder; the results of all queries are
beside them as text, and what each service answers to Prometheus.
"""

import json
import math
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import urllib3
import yaml

from memtail.spec import Experiment
from services.common.broker import Broker
from services.common.settings import ServiceSettings
from services.monitoring.dashboards import FOLDER
from tests.support import dashboard_pictures as pictures
from tests.support.cluster import PROJECT, Cluster, Service
from tests.support.prometheus import PrometheusServer

TRIALS, PER_SHARD = 96, 4
DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.iterdir())}
RULES = yaml.safe_load((FOLDER.parent / "rules.yaml").read_text())
# What a machine without a GPU and without a Kubernetes cluster has no values of.
EMPTY = {
    "memtail_device_": "there is no GPU",
    "memtail_fleet_": "there is no cluster",
    "kubelet_": "there is no cluster",
    "label_values(memtail_build_info, namespace)": "only a cluster has namespaces",
}
SELECTED = {"$namespace": ".*", "${namespace}": ".*", "$experiment": "digits", "$__rate_interval": "10s"}


@dataclass(frozen=True)
class Run:
    """What Prometheus has seen of an experiment, and from when to when it went."""

    prometheus: PrometheusServer
    services: list[Service]
    times: tuple[float, float]

    def series(self, query: str, instant: bool = False) -> list[dict[str, Any]]:
        """The series of a query, with its variables filled in, that have a value at all."""
        for name, value in SELECTED.items():
            query = query.replace(name, value)
        if names := re.fullmatch(r"label_values\((.+), (\w+)\)", query):
            values = self.prometheus.label_values(self.times, names[1], names[2])
            return [{"metric": {names[2]: value}, "values": [[self.times[1], "1"]]} for value in values]
        found = self.prometheus.at(self.times[1], query) if instant else self.prometheus.during(self.times, query)
        return [series for series in found if any(math.isfinite(float(value)) for _, value in series["values"])]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, minio: Any, digits: Any) -> Iterator[Run]:
    """An experiment of which a shard fails once and a worker vanishes."""
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
            broker = Broker(ServiceSettings(store="-", broker=cluster.redis.url))
            # whichever worker had the failure, Prometheus is to have seen it before one is killed
            cluster.until(lambda: prometheus.at(time.time(), "memtail_shard_attempts_total{outcome='failed'} > 0"), 300)
            cluster.until(lambda: len(experiment_store.committed()) > 2 and len(broker.leased()) == 2, 300)
            services[-1].kill()
            cluster.until_published(experiment_store, TRIALS, 300)
            counted = f"memtail_scores_published_trials == {TRIALS} and on() sum(memtail_trials{{state='committed'}}) == {TRIALS}"
            recorded = "and on() experiment:memtail_standard_error_per_bound:ratio"
            ended = began

            def seen() -> bool:
                nonlocal ended
                ended = time.time()
                return bool(prometheus.at(ended, f"{counted} {recorded}"))

            cluster.until(seen, 300)
            yield Run(prometheus, services[:-1], (ended - math.ceil(ended - began), ended))


def queries(dashboard: dict[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """(what it is of, the query, whether it asks for one moment) of each query of a dashboard."""
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield f"{panel['id']} {panel['title']} {target['refId']}", target["expr"], target["instant"]
    for annotation in dashboard["annotations"]["list"]:
        yield f"annotation: {annotation['name']}", annotation["target"]["expr"], False
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield f"variable: {variable['name']}", variable["query"], False


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_query_of_a_dashboard_has_data_or_a_reason_to_have_none(run: Run, name: str) -> None:
    with_data = {what: bool(run.series(query)) for what, query, _ in queries(DASHBOARDS[name])}
    expected = {what: not any(part in query for part in EMPTY) for what, query, _ in queries(DASHBOARDS[name])}
    assert with_data == expected


def test_every_series_that_a_rule_looks_at_or_records_is_there_or_has_a_reason_not_to_be(run: Run) -> None:
    rules = [rule for group in RULES["groups"] for rule in group["rules"]]
    looked_at = {selector for rule in rules for selector in selectors(run.prometheus.ask("parse_query", query=rule["expr"]))}
    looked_at |= {rule["record"] for rule in rules if "record" in rule}
    with_data = {selector: bool(run.series(selector)) for selector in looked_at}
    assert with_data == {selector: not any(part in selector for part in EMPTY) for selector in looked_at}


def selectors(node: Any) -> Iterator[str]:
    """The selectors in an expression as Prometheus has parsed it."""
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
    def test_draw(run: Run, name: str) -> None:
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
            for what, query, instant in queries(dashboard):
                print(f"\n{what}\n  {query}", file=file)
                for series in run.series(query, instant):
                    print(f"    {series['metric']} {len(series['values'])} values, the last {series['values'][-1][1]}", file=file)

    def test_what_services_answer(run: Run) -> None:
        for service in run.services:
            page = urllib3.request("GET", f"http://127.0.0.1:{service.port}/metrics").data
            (PROJECT / os.environ["DASHBOARD_PICTURES"] / f"{service.name}.metrics").write_bytes(page)
