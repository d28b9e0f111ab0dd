"""Builders of panels, each with a unit and a description.

In expressions `EXPERIMENT` and `NAMESPACE` are placeholders for the matchers of the selected variables. Only series of a cluster have a
namespace, so the value "All" of that variable also matches series without one.
"""

from typing import Any, TypeVar, cast

from grafana_foundation_sdk.builders import barchart, common, dashboard, gauge, heatmap, prometheus, stat, table, text, timeseries
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
#: Lower bound of a value, and its colour from there on; the first bound is None.
Threshold = tuple[float | None, str]
_Chart = TypeVar("_Chart", barchart.Panel, gauge.Panel, heatmap.Panel, stat.Panel, table.Panel, timeseries.Panel)
#: Panels by the heading of their row; each line of panels is 24 units wide.
Rows = dict[str, list[barchart.Panel | gauge.Panel | heatmap.Panel | stat.Panel | table.Panel | text.Panel | timeseries.Panel]]


def expression(text: str) -> str:
    """Replace the placeholders of an expression by matchers."""
    for placeholder, matchers in _MATCHERS.items():
        text = text.replace(placeholder, matchers)
    return text


def increase(counter: str, window: str) -> str:
    """Build the expression for a counter's increase, including its first value.

    PromQL's `increase` alone misses the count of a series before its first scrape, which is often the complete count.
    """
    return f"(({counter} unless {counter} offset {window}) or increase({counter}[{window}]))"


def _targets(queries: tuple[Query, ...], instant: bool = False, format_: PromQueryFormat = PromQueryFormat.TIME_SERIES) -> list[Any]:
    targets = []
    for ref_id, (expr, legend) in zip("ABCDEF", queries, strict=False):
        target = prometheus.Dataquery().ref_id(ref_id).expr(expression(expr)).legend_format(legend).format(format_)
        targets.append(target.instant() if instant else target.range())
    return targets


def _describe(panel: _Chart, title: str, description: str, unit: str, width: int, height: int) -> _Chart:
    return panel.title(title).description(description).unit(unit).span(width).height(height).datasource(SOURCE)


def _steps(thresholds: tuple[Threshold, ...]) -> dashboard.ThresholdsConfig:
    steps = [models.Threshold(value=value, color=color) for value, color in thresholds]
    return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)


def stat_panel(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    thresholds: tuple[Threshold, ...] = ((None, BLUE),),
    mappings: dict[str, tuple[str, str]] | None = None,
    decimals: int | None = None,
    no_value: str = "-",
    instant: bool = False,
    width: int = 4,
) -> stat.Panel:
    """Build a panel with the last value of each query over a sparkline.

    Args:
        title: title of the panel.
        description: meaning of the value.
        unit: Grafana's unit.
        queries: expressions with their legends.
        thresholds: colours by value.
        mappings: text and colour to show instead of certain values.
        decimals: number of decimals; chosen by Grafana if None.
        no_value: text if there is no value.
        instant: whether to show only the value at the end of the time range, for values that mislead when they are old. Without sparkline.
        width: of the 24 columns.
    """
    panel = _describe(stat.Panel(), title, description, unit, width, 4)
    panel.targets(_targets(queries, instant=instant)).thresholds(_steps(thresholds))
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"])).no_value(no_value).color_mode(options.BigValueColorMode.VALUE)
    panel.graph_mode(options.BigValueGraphMode.NONE if mappings or instant else options.BigValueGraphMode.AREA)
    if decimals is not None:
        panel.decimals(decimals)
    if mappings:
        results = {value: models.ValueMappingResult(text=text, color=color) for value, (text, color) in mappings.items()}
        panel.mappings([models.ValueMap(options=results)])
    return panel


def gauge_panel(title: str, description: str, query: Query, thresholds: tuple[Threshold, ...], width: int = 4) -> gauge.Panel:
    """Build a gauge for a value between 0 and 1."""
    panel = _describe(gauge.Panel(), title, description, "percentunit", width, 4).targets(_targets((query,)))
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"])).thresholds(_steps(thresholds)).no_value("-")
    return panel.min(0).max(1)


def time_series_panel(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    width: int = 8,
    stacked: bool = False,
    logarithmic: bool = False,
    limit: float | None = None,
    maximum: float | None = None,
    minimum: float | None = 0,
    dashed: str = "",
    colors: dict[str, str] | None = None,
) -> timeseries.Panel:
    """Build a chart of values over time.

    Args:
        title: title of the panel.
        description: meaning of the values.
        unit: Grafana's unit.
        queries: expressions with their legends.
        width: of the 24 columns.
        stacked: whether to stack the series.
        logarithmic: whether the axis is logarithmic; `minimum` then has no effect.
        limit: value that should not be exceeded, drawn as a dashed line.
        maximum: end of the axis; chosen by Grafana if None.
        minimum: start of the axis; chosen by Grafana if None.
        dashed: regular expression of the series to draw dashed: targets and predictions.
        colors: fixed colours of series, for names that imply good or bad.
    """
    panel = _describe(timeseries.Panel(), title, description, unit, width, 8).targets(_targets(queries)).span_nulls(False)
    panel.legend(common.VizLegendOptions().show_legend(True).placement(options.LegendPlacement.BOTTOM))
    panel.tooltip(common.VizTooltipOptions().mode(options.TooltipDisplayMode.MULTI).sort(options.SortOrder.DESCENDING))
    panel.show_points(options.VisibilityMode.NEVER).fill_opacity(60 if stacked else 5).line_width(1 if stacked else 2)
    if stacked:
        panel.stacking(common.StackingConfig().mode(options.StackingMode.NORMAL))
    if logarithmic:
        panel.scale_distribution(common.ScaleDistributionConfig().type(options.ScaleDistribution.LOG).log(10))
    elif minimum is not None:
        panel.min(minimum)
    if maximum is not None:
        panel.max(maximum)
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


def heatmap_panel(title: str, description: str, unit: str, query: Query, axis: str, width: int = 12) -> heatmap.Panel:
    """Build a heatmap of counts per bin over time, with one series per bin, whose legend is the bin's lower bound."""
    panel = _describe(_Heatmap(), title, description, unit, width, 9).targets(_targets((query,))).calculate(False)
    panel.color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Blues").steps(64).exponent(0.5).fill("blue"))
    panel.rows_frame(heatmap.RowsHeatmapOptions().layout(options.HeatmapCellLayout.GE).value(title))
    panel.y_axis(heatmap.YAxisConfig().axis_label(axis).unit("none")).cell_gap(0)
    return panel.thresholds(_steps(((None, GREEN),)))


class _Heatmap(heatmap.Panel):
    """Heatmap with a tooltip, for which the SDK's builder has no method."""

    def build(self) -> models.Panel:
        panel = super().build()
        cast(HeatmapOptions, panel.options).tooltip = HeatmapTooltip(show=True)
        return panel


def bar_chart_panel(title: str, description: str, unit: str, query: Query, label: str, width: int = 12) -> barchart.Panel:
    """Build a bar chart of the last value of each series, ordered by the number in a label."""
    panel = _describe(barchart.Panel(), title, description, unit, width, 9).x_field(label)
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


def table_panel(title: str, description: str, unit: str, query: Query, columns: dict[str, str]) -> table.Panel:
    """Build a table of the last value of each series and its labels; `columns` maps labels to headings, in order."""
    panel = _describe(table.Panel(), title, description, unit, 24, 4).thresholds(_steps(((None, BLUE),)))
    panel.targets(_targets((query,), instant=True, format_=PromQueryFormat.TABLE))
    order = {column: place for place, column in enumerate(columns)}
    organize = {"indexByName": order, "renameByName": columns, "excludeByName": {"Time": True}}
    return panel.with_transformation(models.DataTransformerConfig(id_val="organize", options=organize))


def text_panel(title: str, content: str, width: int = 24) -> text.Panel:
    """Build a panel with Markdown text."""
    return text.Panel().title(title).content(content).span(width).height(3)
