"""Grafana's dashboards as code. `python -m services.monitoring.dashboards` writes them as JSON to where compose and the chart take them.

Each answers its questions from the top down: "Experiment" whether it goes on, when it is done and whether its scores can be trusted yet;
"Fleet" what workers do; "Service" how the services, the store and the broker are.
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
    """The text of each dashboard's file."""
    return {FOLDER / f"{name}.json": _text(builder()) for name, builder in _BUILDERS.items()}


def _text(builder: dashboard.Dashboard) -> str:
    return json.dumps(builder.build(), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"
