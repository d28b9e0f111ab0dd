"""Grafana's dashboards, as far as they can be judged without data."""

import json
import re

import pytest
from prometheus_client import REGISTRY

import services.aggregator.metrics
import services.common.metrics
import services.dispatcher.metrics
import services.worker.metrics  # noqa: F401 - all are declared by being imported
from services.monitoring.dashboards import FOLDER, rendered

SUFFIXES = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_count", "_sum"], "info": ["_info"]}
DASHBOARDS = {path.stem: json.loads(text) for path, text in rendered().items()}


def panels(dashboard):
    return [panel for panel in dashboard["panels"] if panel["type"] not in ("row", "text")]


def expressions(dashboard):
    yield from (target["expr"] for panel in panels(dashboard) for target in panel["targets"])
    yield from (annotation["target"]["expr"] for annotation in dashboard["annotations"]["list"])
    yield from (variable["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query")


def test_the_files_are_those_that_the_code_makes():
    found = {path: path.read_text() for path in FOLDER.iterdir()}
    assert found == rendered(), "run python -m services.monitoring.dashboards"


@pytest.mark.parametrize("name", DASHBOARDS)
def test_queries_name_declared_metrics_only(name):
    declared = {family.name + suffix for family in REGISTRY.collect() for suffix in SUFFIXES.get(family.type, [])}
    named = {found for text in expressions(DASHBOARDS[name]) for found in re.findall(r"\b(?:memtail|process)_\w+", text)}
    assert named
    assert named <= declared


@pytest.mark.parametrize("name", DASHBOARDS)
def test_each_panel_says_what_it_shows_and_in_which_unit(name):
    for panel in panels(DASHBOARDS[name]):
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}", panel["title"]


def test_rates_say_of_what():
    counted = {panel["title"]: panel["fieldConfig"]["defaults"]["unit"] for each in DASHBOARDS.values() for panel in panels(each)}
    rates = {"Trials per second": "trials/s", "Examples per second": "examples/s", "Attempts by outcome": "shards/s", "Passes": "passes/s"}
    assert {title: counted[title] for title in rates} == {title: f"count:{unit}" for title, unit in rates.items()}
    assert "cps" not in counted.values()


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_fill_the_grid_without_a_gap_or_an_overlap(name):
    cells = [
        (x, y)
        for panel in DASHBOARDS[name]["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    height = 1 + max(y for _, y in cells)
    assert sorted(cells) == [(x, y) for x in range(24) for y in range(height)]


def test_dashboards_and_panels_keep_their_addresses():
    assert {name: dashboard["uid"] for name, dashboard in DASHBOARDS.items()} == {name: f"memtail-{name}" for name in DASHBOARDS}
    for dashboard in DASHBOARDS.values():
        assert [panel["id"] for panel in dashboard["panels"]] == list(range(1, len(dashboard["panels"]) + 1))
