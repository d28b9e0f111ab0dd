"""Grafana dashboards as code. `python -m services.monitoring.dashboards` writes them as JSON into the chart, from where compose reads them.

"Experiment" shows the progress of an experiment, its estimated completion and the precision of its scores; "Fleet" the workers, their
devices and the queue; "Service" the health of the services, the store and the broker.
"""

import json
from collections.abc import Callable
from pathlib import Path

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from services.monitoring.dashboards.experiment import experiment
from services.monitoring.dashboards.fleet import fleet
from services.monitoring.dashboards.service import service

FOLDER = Path(__file__).parents[3] / "helm" / "memtail" / "files" / "dashboards"
_BUILDERS: dict[str, Callable[[], dashboard.Dashboard]] = {"experiment": experiment, "fleet": fleet, "service": service}


def rendered() -> dict[Path, str]:
    """Render the JSON of each dashboard, by file."""
    return {FOLDER / f"{name}.json": _text(builder()) for name, builder in _BUILDERS.items()}


def _text(builder: dashboard.Dashboard) -> str:
    return json.dumps(builder.build(), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"
