"""Grafana's dashboards, checked without data."""

import json
import re

import pytest
from prometheus_client import REGISTRY

import services.aggregator.metrics
import services.common.metrics
import services.dispatcher.metrics
import services.worker.metrics  # noqa: F401 - the import declares them
from memtail.scores.summary import FEW_TRIALS
from services.monitoring.dashboards import FOLDER, rendered

SUFFIXES = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_count", "_sum"], "info": ["_info"]}
DASHBOARDS = {path.stem: json.loads(text) for path, text in rendered().items()}


def panels(dashboard):
    return [panel for panel in dashboard["panels"] if panel["type"] not in ("row", "text")]


def expressions(dashboard):
    yield from (target["expr"] for panel in panels(dashboard) for target in panel["targets"])
    yield from (annotation["target"]["expr"] for annotation in dashboard["annotations"]["list"])
    yield from (variable["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query")


def test_the_files_are_up_to_date():
    files = {path: path.read_text() for path in FOLDER.iterdir()}
    assert files == rendered(), "run python -m services.monitoring.dashboards"


@pytest.mark.parametrize("name", DASHBOARDS)
def test_queries_name_declared_metrics_only(name):
    declared = {family.name + suffix for family in REGISTRY.collect() for suffix in SUFFIXES.get(family.type, [])}
    named = {metric for text in expressions(DASHBOARDS[name]) for metric in re.findall(r"\b(?:memtail|process)_\w+", text)}
    assert named
    assert named <= declared


@pytest.mark.parametrize("name", DASHBOARDS)
def test_each_panel_has_a_description_a_unit_thresholds_and_a_data_source(name):
    for panel in panels(DASHBOARDS[name]):
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}", panel["title"]


def test_rates_have_a_unit_that_names_the_counted_thing():
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


def test_the_dashboard_of_an_experiment_warns_of_few_trials():
    (text,) = (panel["options"]["content"] for panel in DASHBOARDS["experiment"]["panels"] if panel["type"] == "text")
    assert f"Below {FEW_TRIALS} trials in the scores, the 95% interval" in text
