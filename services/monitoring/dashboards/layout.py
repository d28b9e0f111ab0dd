"""Assembles dashboards from rows of panels; adds variables, annotations and links to the other dashboards."""

from itertools import count
from typing import Any

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import dashboard as models

from services.monitoring.dashboards.panels import BLUE, ORANGE, RED, SOURCE, Rows, expression, increase


def build_dashboard(title: str, description: str, rows: Rows, *, experiments: str) -> dashboard.Dashboard:
    """Build a dashboard.

    Args:
        title: title, which also determines the dashboard's address.
        description: description in the list of dashboards.
        rows: panels by heading.
        experiments: "one", "many" or "none" can be selected.
    """
    built = dashboard.Dashboard(f"memtail: {title}").uid(f"memtail-{title.lower()}").description(description).tags(["memtail"]).readonly()
    built.tooltip(models.DashboardCursorSync.CROSSHAIR).time("now-1h", "now").refresh("15s").timezone("browser")
    built.with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    built.with_variable(_variable("namespace", "Namespace", "label_values(memtail_build_info, namespace)", multiple=True))
    if experiments != "none":
        names = "label_values(memtail_trials{NAMESPACE}, experiment)"
        built.with_variable(_variable("experiment", "Experiment", names, multiple=experiments == "many"))
    ids = count(1)  # explicit, so that links to panels remain valid
    for heading, panels in rows.items():
        built.with_row(dashboard.Row(heading).id(next(ids)))
        for panel in panels:
            built.with_panel(panel.id(next(ids)))
    others = dashboard.DashboardLink("Dashboards").type(models.DashboardLinkType.DASHBOARDS).tags(["memtail"])
    annotations = _annotations("NAMESPACE" if experiments == "none" else "EXPERIMENT")
    return built.annotations(annotations).link(others.keep_time(True).include_vars(True))


def _variable(name: str, label: str, values: str, multiple: bool) -> dashboard.QueryVariable:
    variable = dashboard.QueryVariable(name).label(label).query(expression(values)).datasource(SOURCE)
    variable.refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(models.VariableSort.ALPHABETICAL_ASC)
    if multiple:
        everything = models.VariableOption(text="All", value="$__all", selected=True)
        variable.include_all(True).all_value(".*").multi(True).current(everything)
    return variable


def _annotations(selected: str) -> list[Builder[models.AnnotationQuery]]:
    """Annotate published scores, failed shards and problems of pods in all panels."""
    published = f"1000 * max by (experiment) (memtail_scores_published_timestamp_seconds{{{selected}}})"
    attempts = f"memtail_shard_attempts_total{{{selected}, outcome=~'failed|died'}}"
    failed = f"sum by (experiment, outcome) {increase(attempts, '$__rate_interval')} > 0"
    problems = f"sum by (reason) {increase('memtail_fleet_pod_troubles_total{NAMESPACE}', '$__rate_interval')} > 0"
    return [
        _annotation("Scores published", published, "{{experiment}}: scores published", "experiment", BLUE, value_is_time=True),
        _annotation("Shards failed", failed, "{{experiment}}: a shard {{outcome}}", "experiment,outcome", RED),
        _annotation("Pod problems", problems, "worker pod: {{reason}}", "reason", ORANGE),
    ]


def _annotation(name: str, expr: str, title: str, labels: str, color: str, value_is_time: bool = False) -> Builder[models.AnnotationQuery]:
    """Annotate the times at which an expression is above 0, or if `value_is_time` its values, which are times in milliseconds."""
    target = {"expr": expression(expr), "refId": "Anno", "range": True}
    fields = {"target": target, "titleFormat": title, "tagKeys": labels, "useValueForTime": value_is_time}
    return _Built(_PrometheusAnnotation(fields, name=name, icon_color=color))


class _PrometheusAnnotation(models.AnnotationQuery):
    """Annotation query with fields of the Prometheus data source, which the SDK's model lacks."""

    def __init__(self, fields: dict[str, object], **common: Any) -> None:
        super().__init__(datasource=SOURCE, **common)
        self._fields = fields

    def to_json(self) -> dict[str, object]:
        return super().to_json() | self._fields


class _Built(Builder[models.AnnotationQuery]):
    """Builder of a finished annotation, as `Dashboard.annotations` takes only builders."""

    def __init__(self, annotation: models.AnnotationQuery) -> None:
        self._annotation = annotation

    def build(self) -> models.AnnotationQuery:
        return self._annotation
