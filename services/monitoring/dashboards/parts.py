"""What the dashboards are put together from: queries, panels with a unit and a description each, variables, annotations, links.

In expressions `EXPERIMENT` and `NAMESPACE` stand for the matchers of what is selected above the panels. A namespace is a label that only a
cluster gives, so that its value "All" also matches series without it.
"""

from itertools import count
from typing import Any, TypeVar

from grafana_foundation_sdk.builders import barchart, common, dashboard, gauge, heatmap, prometheus, stat, table, text, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode, HeatmapTooltip
from grafana_foundation_sdk.models.heatmap import Options as HeatmapOptions
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
_MATCHERS = {"EXPERIMENT": 'namespace=~"$namespace", experiment=~"$experiment"', "NAMESPACE": 'namespace=~"$namespace"'}
GREEN, ORANGE, RED, BLUE, GRAY = "green", "orange", "red", "blue", "#6e7078"

#: An expression and the legend of its series.
Query = tuple[str, str]
#: A value from which on a colour holds; the first is None, for all below the second.
Threshold = tuple[float | None, str]
_Chart = TypeVar("_Chart", barchart.Panel, gauge.Panel, heatmap.Panel, stat.Panel, table.Panel, timeseries.Panel)
#: Headings, and the panels below them: each row of panels is 24 wide.
Rows = dict[str, list[barchart.Panel | gauge.Panel | heatmap.Panel | stat.Panel | table.Panel | text.Panel | timeseries.Panel]]


def expression(text: str) -> str:
    """An expression with what is selected in it."""
    for word, matchers in _MATCHERS.items():
        text = text.replace(word, matchers)
    return text


def grown(counter: str, window: str) -> str:
    """By how much a counter has grown. `increase` alone misses what one had counted before it was first looked at, often all there is."""
    return f"(({counter} unless {counter} offset {window}) or increase({counter}[{window}]))"


def _targets(queries: tuple[Query, ...], instant: bool = False, format_: PromQueryFormat = PromQueryFormat.TIME_SERIES) -> list[Any]:
    targets = []
    for ref_id, (expr, legend) in zip("ABCDEF", queries, strict=False):
        target = prometheus.Dataquery().ref_id(ref_id).expr(expression(expr)).legend_format(legend).format(format_)
        targets.append(target.instant() if instant else target.range())
    return targets


def _about(panel: _Chart, title: str, description: str, unit: str, width: int, height: int) -> _Chart:
    return panel.title(title).description(description).unit(unit).span(width).height(height).datasource(SOURCE)


def _steps(thresholds: tuple[Threshold, ...]) -> dashboard.ThresholdsConfig:
    steps = [models.Threshold(value=value, color=color) for value, color in thresholds]
    return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)


def number(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    thresholds: tuple[Threshold, ...] = ((None, BLUE),),
    names: dict[str, tuple[str, str]] | None = None,
    decimals: int | None = None,
    none: str = "-",
    now: bool = False,
    width: int = 4,
) -> stat.Panel:
    """The last value of each query, large and in the colour of its threshold, over its course.

    Args:
        names: texts and their colours to show instead of values.
        none: what to show where there is no value.
        now: show the value at the end of the time shown or none, without its course, since an older one would mislead.
    """
    panel = _about(stat.Panel(), title, description, unit, width, 4).targets(_targets(queries, instant=now)).thresholds(_steps(thresholds))
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"])).no_value(none).color_mode(options.BigValueColorMode.VALUE)
    panel.graph_mode(options.BigValueGraphMode.NONE if names or now else options.BigValueGraphMode.AREA)
    if decimals is not None:
        panel.decimals(decimals)
    if names:
        results = {value: models.ValueMappingResult(text=text, color=color) for value, (text, color) in names.items()}
        panel.mappings([models.ValueMap(options=results)])
    return panel


def share(title: str, description: str, query: Query, thresholds: tuple[Threshold, ...], width: int = 4) -> gauge.Panel:
    """A value between 0 and 1 on a dial."""
    panel = _about(gauge.Panel(), title, description, "percentunit", width, 4).targets(_targets((query,)))
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"])).thresholds(_steps(thresholds)).no_value("-")
    return panel.min(0).max(1)


def course(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    width: int = 8,
    stacked: bool = False,
    logarithmic: bool = False,
    limit: float | None = None,
    most: float | None = None,
    least: float | None = 0,
    dashed: str = "",
    colors: dict[str, str] | None = None,
) -> timeseries.Panel:
    """Values over time.

    Args:
        limit: beyond it something deserves a look; a dashed line.
        dashed: a regular expression of the series to draw with dashes: what is predicted or wanted.
        colors: of series whose names say whether they are good or bad.
    """
    panel = _about(timeseries.Panel(), title, description, unit, width, 8).targets(_targets(queries)).span_nulls(False)
    panel.legend(common.VizLegendOptions().show_legend(True).placement(options.LegendPlacement.BOTTOM))
    panel.tooltip(common.VizTooltipOptions().mode(options.TooltipDisplayMode.MULTI).sort(options.SortOrder.DESCENDING))
    panel.show_points(options.VisibilityMode.NEVER).fill_opacity(60 if stacked else 5).line_width(1 if stacked else 2)
    if stacked:
        panel.stacking(common.StackingConfig().mode(options.StackingMode.NORMAL))
    if logarithmic:
        panel.scale_distribution(common.ScaleDistributionConfig().type(options.ScaleDistribution.LOG).log(10))
    elif least is not None:
        panel.min(least)
    if most is not None:
        panel.max(most)
    steps: tuple[Threshold, ...] = ((None, GREEN),)
    if limit is not None:
        steps = ((None, GREEN), (limit, RED))
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(options.GraphTresholdsStyleMode.DASHED))
    panel.thresholds(_steps(steps))
    if dashed:
        style = {"fill": "dash", "dash": [8, 6]}
        panel.override_by_regexp(dashed, [models.DynamicConfigValue(id_val="custom.lineStyle", value=style)])
    for name, color in (colors or {}).items():
        fixed = {"mode": "fixed", "fixedColor": color}
        panel.override_by_name(name, [models.DynamicConfigValue(id_val="color", value=fixed)])
    return panel


def density(title: str, description: str, unit: str, query: Query, axis: str, width: int = 12) -> heatmap.Panel:
    """Counts by bin over time: one series per bin, whose legend is where the bin begins."""
    panel = _about(_Heatmap(), title, description, unit, width, 9).targets(_targets((query,))).calculate(False)
    panel.color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Blues").steps(64).exponent(0.5).fill("blue"))
    panel.rows_frame(heatmap.RowsHeatmapOptions().layout(options.HeatmapCellLayout.GE).value(title))
    panel.y_axis(heatmap.YAxisConfig().axis_label(axis).unit("none")).cell_gap(0)
    return panel.thresholds(_steps(((None, GREEN),)))


class _Heatmap(heatmap.Panel):
    """The SDK's leaves out the switch for what is shown beside the pointer."""

    def build(self) -> models.Panel:
        panel = super().build()
        assert isinstance(panel.options, HeatmapOptions)
        panel.options.tooltip = HeatmapTooltip(show=True)
        return panel


def bars(title: str, description: str, unit: str, query: Query, label: str, width: int = 12) -> barchart.Panel:
    """The last value of each series, as bars in the order of the number in a label."""
    panel = _about(barchart.Panel(), title, description, unit, width, 9).x_field(label)
    panel.targets(_targets((query,), instant=True, format_=PromQueryFormat.TABLE)).thresholds(_steps(((None, BLUE),)))
    for kind in ("number", "string"):
        convert = {"conversions": [{"targetField": label, "destinationType": kind}], "fields": {}}
        panel.with_transformation(models.DataTransformerConfig(id_val="convertFieldType", options=convert))
        if kind == "number":
            panel.with_transformation(models.DataTransformerConfig(id_val="sortBy", options={"fields": {}, "sort": [{"field": label}]}))
    panel.with_transformation(models.DataTransformerConfig(id_val="organize", options={"excludeByName": {"Time": True}}))
    panel.legend(common.VizLegendOptions().show_legend(False)).show_value(options.VisibilityMode.NEVER).fill_opacity(80)
    panel.scale_distribution(common.ScaleDistributionConfig().type(options.ScaleDistribution.SYMLOG).log(10).linear_threshold(1))
    return panel.bar_width(0.9).group_width(0.9)


def listing(title: str, description: str, unit: str, query: Query, columns: dict[str, str]) -> table.Panel:
    """The last value of each series with its labels; `columns` are their names and the headings to show instead, in order."""
    panel = _about(table.Panel(), title, description, unit, 24, 4).thresholds(_steps(((None, BLUE),)))
    panel.targets(_targets((query,), instant=True, format_=PromQueryFormat.TABLE))
    order = {column: place for place, column in enumerate(columns)}
    organize = {"indexByName": order, "renameByName": columns, "excludeByName": {"Time": True}}
    return panel.with_transformation(models.DataTransformerConfig(id_val="organize", options=organize))


def words(title: str, content: str, width: int = 24) -> text.Panel:
    """Text in Markdown."""
    return text.Panel().title(title).content(content).span(width).height(3)


class _Events(Builder[models.AnnotationQuery]):
    """The SDK knows the annotations of old: without the query's parts that Prometheus's data source reads."""

    def __init__(self, annotation: models.AnnotationQuery) -> None:
        self._annotation = annotation

    def build(self) -> models.AnnotationQuery:
        return self._annotation


class _PrometheusAnnotation(models.AnnotationQuery):
    def __init__(self, parts: dict[str, object], **common: Any) -> None:
        super().__init__(datasource=SOURCE, **common)
        self._parts = parts

    def to_json(self) -> dict[str, object]:
        return super().to_json() | self._parts


def _marks(selected: str) -> list[Builder[models.AnnotationQuery]]:
    """What is marked in all panels: when scores were published, and what failed."""
    published = f"1000 * max by (experiment) (memtail_scores_published_timestamp_seconds{{{selected}}})"
    attempts = f"memtail_shard_attempts_total{{{selected}, outcome=~'failed|died'}}"
    failed = f"sum by (experiment, outcome) {grown(attempts, '$__rate_interval')} > 0"
    troubles = f"sum by (reason) {grown('memtail_fleet_pod_troubles_total{NAMESPACE}', '$__rate_interval')} > 0"
    return [
        _events("Scores published", published, "{{experiment}}: scores published", "experiment", BLUE, value_is_time=True),
        _events("Shards failed", failed, "{{experiment}}: a shard {{outcome}}", "experiment,outcome", RED),
        _events("Pods in trouble", troubles, "a worker's pod: {{reason}}", "reason", ORANGE),
    ]


def _events(name: str, expr: str, title: str, labels: str, color: str, value_is_time: bool = False) -> Builder[models.AnnotationQuery]:
    """Marks where an expression has a value above 0, or at the times that its values are, in milliseconds."""
    target = {"expr": expression(expr), "refId": "Anno", "range": True}
    parts = {"target": target, "titleFormat": title, "tagKeys": labels, "useValueForTime": value_is_time}
    return _Events(_PrometheusAnnotation(parts, name=name, icon_color=color))


def page(title: str, description: str, rows: Rows, *, experiments: str) -> dashboard.Dashboard:
    """A dashboard with links to the others.

    Args:
        experiments: "one", "many" or "none" can be selected.
    """
    made = dashboard.Dashboard(f"memtail: {title}").uid(f"memtail-{title.lower()}").description(description).tags(["memtail"]).readonly()
    made.tooltip(models.DashboardCursorSync.CROSSHAIR).time("now-1h", "now").refresh("15s").timezone("browser")
    made.with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    made.with_variable(_choice("namespace", "Namespace", "label_values(memtail_build_info, namespace)", every=True))
    if experiments != "none":
        names = "label_values(memtail_trials{NAMESPACE}, experiment)"
        made.with_variable(_choice("experiment", "Experiment", names, every=experiments == "many"))
    ids = count(1)  # what Grafana would give them, so that a link to a panel stays
    for heading, panels in rows.items():
        made.with_row(dashboard.Row(heading).id(next(ids)))
        for panel in panels:
            made.with_panel(panel.id(next(ids)))
    others = dashboard.DashboardLink("Dashboards").type(models.DashboardLinkType.DASHBOARDS).tags(["memtail"])
    return made.annotations(_marks("NAMESPACE" if experiments == "none" else "EXPERIMENT")).link(others.keep_time(True).include_vars(True))


def _choice(name: str, label: str, values: str, every: bool) -> dashboard.QueryVariable:
    variable = dashboard.QueryVariable(name).label(label).query(expression(values)).datasource(SOURCE)
    variable.refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(models.VariableSort.ALPHABETICAL_ASC)
    if every:
        everything = models.VariableOption(text="All", value="$__all", selected=True)
        variable.include_all(True).all_value(".*").multi(True).current(everything)
    return variable
