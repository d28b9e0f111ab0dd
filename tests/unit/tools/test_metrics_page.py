"""The list of metrics in docs/metrics.md."""

import runpy
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

PROJECT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tool():
    return runpy.run_path(str(PROJECT / "tools" / "metrics-page.py"))


def test_the_page_has_the_metrics_that_are_declared(tool):
    assert (PROJECT / "docs" / "metrics.md").read_text() == tool["page"](), "run python tools/metrics-page.py"


def test_each_service_that_declares_metrics_is_on_the_page(tool):
    modules = {".".join(path.relative_to(PROJECT).with_suffix("").parts) for path in PROJECT.glob("services/**/metrics.py")}
    assert set(tool["MODULES"]) == modules


def test_a_metric_is_named_as_prometheus_sees_it(tool):
    registry = CollectorRegistry()
    attempts = Counter("attempts_total", "How many", ["experiment"], registry=registry)
    assert tool["row"](attempts) == "| `attempts_total` | counter | `experiment` | How many |"
    size = Gauge("size_bytes", "How large", registry=registry)
    assert tool["row"](size) == "| `size_bytes` | gauge, bytes |  | How large |"
    spent = Histogram("spent_seconds", "How long", ["a", "b"], registry=registry)
    assert tool["row"](spent) == "| `spent_seconds` | histogram, seconds | `a`, `b` | How long |"


def test_a_metric_without_a_meaning_is_refused(tool):
    with pytest.raises(ValueError, match="has no help text"):
        tool["row"](Gauge("a", "", registry=CollectorRegistry()))
