"""`python tools/metrics-page.py`: writes docs/metrics.md, the list of all metrics, from their declarations."""

import importlib
from pathlib import Path
from types import ModuleType

from prometheus_client.metrics import MetricWrapperBase

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
#: The modules that declare metrics, and whose they are.
MODULES = {
    "services.common.metrics": "Every service",
    "services.dispatcher.metrics": "Dispatcher",
    "services.worker.metrics": "Worker",
    "services.aggregator.metrics": "Aggregator",
}
_INTRODUCTION = """# Metrics

Every service answers `/metrics` on the port `MEMTAIL_PORT` (9100), in the format of Prometheus; `/healthz` and `/readyz` beside it.
`python tools/metrics-page.py` writes this page from the declarations.

The series of an experiment go away ten minutes (`MEMTAIL_LINGER_SECONDS`) after it has ended, or when it is removed from the bucket; at a
worker, as long after the worker last trained it. A dispatcher that waits to take over has none. Histograms have the series `_bucket`,
`_sum` and `_count`.
"""
# What the ends of names mean.
_UNITS = {"timestamp_seconds": "Unix time", "seconds": "seconds", "bytes": "bytes", "ratio": "0 to 1"}


def declared(module: ModuleType) -> list[MetricWrapperBase]:
    """The metrics of a module, in the order of their declarations."""
    return [value for value in vars(module).values() if isinstance(value, MetricWrapperBase)]


def row(metric: MetricWrapperBase) -> str:
    """A metric as a row of the table. Raises: ValueError: it has no help text."""
    family = next(iter(metric.describe()))
    if not family.documentation:
        raise ValueError(f"{family.name} has no help text: say what it means")
    name = family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
    unit = next((unit for end, unit in _UNITS.items() if family.name.endswith(end)), "")
    labels = ", ".join(f"`{label}`" for label in metric._labelnames)
    return f"| `{name}` | {family.type} | {labels} | {unit} | {family.documentation} |"


def page() -> str:
    """The page."""
    parts = [_INTRODUCTION]
    for name, title in MODULES.items():
        rows = [row(metric) for metric in declared(importlib.import_module(name))]
        parts.append("\n".join([f"## {title}", "", "| name | type | labels | unit | |", "|---|---|---|---|---|", *rows, ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
