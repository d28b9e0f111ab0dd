"""Prometheus's rules, checked without Prometheus: metric names, labels and annotations, sections of the runbook, test cases."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import REGISTRY

import services.aggregator.metrics
import services.common.metrics
import services.dispatcher.metrics
import services.worker.metrics  # noqa: F401 - the import declares them

PROJECT = Path(__file__).parents[4]
RULES = [rule for group in yaml.safe_load((PROJECT / "helm/memtail/files/rules.yaml").read_text())["groups"] for rule in group["rules"]]
ALERTS = [rule for rule in RULES if "alert" in rule]
SUFFIXES = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_count", "_sum"], "info": ["_info"]}
FOREIGN = {
    "minio_cluster_capacity_usable_free_bytes": "by the S3 server",
    "minio_cluster_capacity_usable_total_bytes": "by the S3 server",
    "kubelet_volume_stats_available_bytes": "by the kubelet",
    "kubelet_volume_stats_capacity_bytes": "by the kubelet",
}


def names(expr: str) -> set[str]:
    """Find the series in an expression: words with an underscore, except labels, functions and keywords."""
    bare = re.sub(r'"[^"]*"|\b(by|on|ignoring) \([^)]*\)', "", expr)
    return set(re.findall(r"\b[a-z][\w:]*_[\w:]*\b(?! *\()", bare)) - {"group_left", "group_right"}


def test_rules_use_only_declared_recorded_and_known_foreign_series():
    declared = {family.name + suffix for family in REGISTRY.collect() for suffix in SUFFIXES.get(family.type, [])}
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    used = set().union(*(names(rule["expr"]) for rule in RULES))
    assert used - declared - recorded == FOREIGN.keys()
    assert len([name for name in used if name.startswith("memtail_")]) > 20


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_has_a_severity_a_summary_a_description_and_a_runbook_section(rule: dict[str, Any]):
    assert rule["labels"].keys() == {"severity"}
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{rule['alert'].lower()}"
    assert rule["annotations"]["description"].endswith(".")


def test_the_runbook_has_a_section_on_each_alert_and_no_other():
    sections = re.split(r"^### ", (PROJECT / "docs/runbook.md").read_text(), flags=re.MULTILINE)[1:]
    assert [section.partition("\n")[0] for section in sections] == [rule["alert"] for rule in ALERTS]
    for section in sections:
        title, _, text = section.partition("\n")
        assert len(text.split()) > 30, title


def test_each_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not():
    tried: dict[str, set[bool]] = {rule["alert"]: set() for rule in ALERTS}
    for case in yaml.safe_load((PROJECT / "tests/support/alerts.yaml").read_text())["tests"]:
        for asked in case.get("alert_rule_test", []):
            tried[asked["alertname"]].add(bool(asked["exp_alerts"]))
    assert tried == {name: {True, False} for name in tried}
