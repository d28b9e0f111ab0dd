"""Generated list of metrics, docs/metrics.md."""

import runpy
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

PROJECT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tool():
    return runpy.run_path(str(PROJECT / "tools" / "metrics-page.py"))


def test_the_page_is_up_to_date(tool):
    assert (PROJECT / "docs" / "metrics.md").read_text() == tool["page"](), "run python tools/metrics-page.py"


def test_the_page_has_all_modules_that_declare_metrics(tool):
    modules = {".".join(path.relative_to(PROJECT).with_suffix("").parts) for path in PROJECT.glob("services/**/metrics.py")}
    assert set(tool["MODULES"]) == modules


def test_a_metric_has_the_name_that_prometheus_stores(tool):
    registry = CollectorRegistry()
    attempts = Counter("attempts_total", "Attempts", ["experiment"], registry=registry)
    assert tool["row"](attempts) == "| `attempts_total` | counter | `experiment` | Attempts |"
    size = Gauge("size_bytes", "Size", registry=registry)
    assert tool["row"](size) == "| `size_bytes` | gauge, bytes |  | Size |"
    spent = Histogram("spent_seconds", "Duration", ["a", "b"], registry=registry)
    assert tool["row"](spent) == "| `spent_seconds` | histogram, seconds | `a`, `b` | Duration |"


def test_a_metric_without_a_help_text_is_refused(tool):
    with pytest.raises(ValueError, match="has no help text"):
        tool["row"](Gauge("a", "", registry=CollectorRegistry()))
