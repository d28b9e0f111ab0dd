"""`PYTHONPATH=. python tools/metrics-page.py`: writes docs/metrics.md, the list of all metrics, from their declarations."""

import importlib
from pathlib import Path
from types import ModuleType

from prometheus_client.metrics import MetricWrapperBase

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
#: Modules that declare metrics, and their headings.
MODULES = {
    "services.common.metrics": "Every service",
    "services.dispatcher.metrics": "Dispatcher",
    "services.worker.metrics": "Worker",
    "services.aggregator.metrics": "Aggregator",
}
_INTRODUCTION = """# Metrics

Every service serves Prometheus metrics at `/metrics` on the port `MEMTAIL_PORT` (9100), and health checks at `/healthz` and `/readyz`.

The series of an experiment are removed ten minutes (`MEMTAIL_LINGER_SECONDS`) after it has ended, when it is deleted from the bucket, or,
at a worker, ten minutes after its last shard. A standby dispatcher has none. Histograms have the series `_bucket`, `_sum` and `_count`.

`PYTHONPATH=. python tools/metrics-page.py` writes this page from the declarations.
"""
# Units by suffix of the name.
_UNITS = {"timestamp_seconds": "Unix time", "seconds": "seconds", "bytes": "bytes", "ratio": "0 to 1"}


def declared(module: ModuleType) -> list[MetricWrapperBase]:
    """List the metrics of a module, in the order of their declarations."""
    return [value for value in vars(module).values() if isinstance(value, MetricWrapperBase)]


def row(metric: MetricWrapperBase) -> str:
    """Format a metric as a row of the table. Raises: ValueError: it has no help text."""
    family = next(iter(metric.describe()))
    if not family.documentation:
        raise ValueError(f"{family.name} has no help text: describe its meaning")
    name = family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
    unit = next((unit for end, unit in _UNITS.items() if family.name.endswith(end)), "")
    labels = ", ".join(f"`{label}`" for label in metric._labelnames)
    kind = ", ".join(filter(None, [family.type, unit]))
    return f"| `{name}` | {kind} | {labels} | {family.documentation} |"


def page() -> str:
    """Return the text of the page."""
    parts = [_INTRODUCTION]
    for name, title in MODULES.items():
        rows = [row(metric) for metric in declared(importlib.import_module(name))]
        parts.append("\n".join([f"## {title}", "", "| name | type, unit | labels | meaning |", "|---|---|---|---|", *rows, ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
