"""Renders a dashboard with the results of its queries as a picture, with Grafana's layout and colours."""

import re
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import dates
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

PAGE, PANEL, TEXT, MUTED = "#111217", "#181b1f", "#ccccdc", "#7b8087"
COLORS = {"green": "#73bf69", "orange": "#ff9830", "red": "#f2495c", "blue": "#5794f2", "yellow": "#fade2a"}
PALETTE = ["#73bf69", "#fade2a", "#5794f2", "#ff9830", "#b877d9", "#8ab8ff", "#5ad3d1", "#37872d", "#e0b400", "#a352cc"]
UNIT = 0.78  # width of a column in inches; the height of a row is 0.45

Series = dict[str, Any]
#: Series of each query, by the panel's id and the query's letter.
Results = dict[tuple[int, str], list[Series]]


def draw(dashboard: dict[str, Any], results: Results, times: tuple[float, float], path: Path) -> None:
    """Render a dashboard for a period, as a PNG file."""
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
    figure = Figure(figsize=(24 * UNIT, rows * 0.45 + 0.6), facecolor=PAGE)
    figure.text(0.01, 1 - 0.25 / figure.get_figheight(), dashboard["title"], color=TEXT, fontsize=16, va="center")
    renderers: dict[str, Callable[[Axes, dict[str, Any], list[tuple[str, Series]]], None]] = {
        "stat": _draw_stat,
        "gauge": _draw_gauge,
        "timeseries": _draw_time_series,
        "heatmap": _draw_heatmap,
        "barchart": _draw_bar_chart,
        "table": _draw_table,
    }
    with mpl.rc_context({"text.color": TEXT, "axes.edgecolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED, "font.size": 9}):
        for panel in dashboard["panels"]:
            axes = _add_panel(figure, panel)
            if axes is not None and panel["type"] == "text":
                axes.text(0, 0.5, panel["options"]["content"].replace("$", r"\$"), va="center", fontsize=9, transform=axes.transAxes)
            elif axes is not None:
                series_list = [
                    (_legend(target["legendFormat"], series["metric"]), series)
                    for target in panel["targets"]
                    for series in results[panel["id"], target["refId"]]
                ]
                if series_list:
                    renderers[panel["type"]](axes, panel, series_list)
                    if panel["type"] in ("timeseries", "heatmap"):
                        _format_times(axes, times)
                else:
                    empty = panel["fieldConfig"]["defaults"].get("noValue", "No data")
                    axes.text(0.5, 0.5, empty, ha="center", va="center", color=MUTED, fontsize=14, transform=axes.transAxes)
                    axes.set_axis_off()
        figure.savefig(path, dpi=70, facecolor=PAGE)


def _add_panel(figure: Figure, panel: dict[str, Any]) -> Axes | None:
    """Draw the frame and the title of a panel, and return its axes; None for the heading of a row."""
    width, height = figure.get_size_inches()
    grid = panel["gridPos"]
    left, top = grid["x"] * UNIT / width, 1 - (0.5 + grid["y"] * 0.45) / height
    if panel["type"] == "row":
        figure.text(left + 0.01, top - 0.22 / height, f"⌄ {panel['title']}", fontsize=12, va="center", color=TEXT)
        return None
    wide, high = grid["w"] * UNIT / width, grid["h"] * 0.45 / height
    gap = 0.04
    corner = (left + gap / width, top - high + gap / height)
    figure.add_artist(Rectangle(corner, wide - 2 * gap / width, high - 2 * gap / height, facecolor=PANEL, edgecolor="#2c3235", zorder=-1))
    figure.text(left + 0.12 / width, top - 0.2 / height, panel["title"], fontsize=9.5, weight="bold", color=TEXT, va="center")
    borderless = panel["type"] in ("stat", "gauge", "table", "text")
    long = panel["type"] == "timeseries" and panel["fieldConfig"]["defaults"]["unit"].startswith("count:")
    sides, below = (0.15, 0.12) if borderless else (1.4 if long else 0.85, 0.72)
    axes = figure.add_axes(
        (left + sides / width, top - high + below / height, wide - (sides + 0.15) / width, high - (below + 0.45) / height),
        facecolor=PANEL,
    )
    axes.spines[["top", "right"]].set_visible(False)
    if borderless:
        axes.set_axis_off()
    return axes


def _draw_stat(axes: Axes, panel: dict[str, Any], series_list: list[tuple[str, Series]]) -> None:
    for index, (name, series) in enumerate(series_list):
        value, middle = _last(series), (index + 0.5) / len(series_list)
        mapped = [mapping["options"].get(f"{value:g}") for mapping in panel["fieldConfig"]["defaults"].get("mappings", [])]
        text, color = _format_value(panel, value), _color(panel, value)
        if mapped and mapped[0]:
            text, color = mapped[0]["text"], COLORS[mapped[0]["color"]]
        if panel["options"]["graphMode"] == "area":
            times, values = _points(series)
            low, high = np.nanmin(values), np.nanmax(values)
            share = (values - low) / (high - low or 1) * 0.35
            across = index / len(series_list) + (times - times[0]) / (times[-1] - times[0] or 1) / len(series_list)
            axes.fill_between(across, share, color=color, alpha=0.25, linewidth=0)
        axes.text(middle, 0.62, text, ha="center", va="center", fontsize=min(22, 240 / max(1, len(text)) / len(series_list)), color=color)
        axes.text(middle, 0.95, name, ha="center", va="center", fontsize=8.5, color=TEXT)
    axes.set(xlim=(0, 1), ylim=(0, 1))


def _draw_gauge(axes: Axes, panel: dict[str, Any], series_list: list[tuple[str, Series]]) -> None:
    value = _last(series_list[0][1])
    angles = np.linspace(np.pi, 0, 100)
    for share, color in ((1.0, "#2c3235"), (value, _color(panel, value))):
        arc = angles[: max(2, round(100 * share))]
        axes.plot(np.cos(arc), np.sin(arc), color=color, linewidth=9, solid_capstyle="butt")
    axes.text(0, 0.25, _format_value(panel, value), ha="center", va="center", fontsize=18, color=_color(panel, value))
    axes.set(xlim=(-2.4, 2.4), ylim=(-0.1, 1.2))


def _draw_time_series(axes: Axes, panel: dict[str, Any], series_list: list[tuple[str, Series]]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    custom = defaults["custom"]
    dashed, colors = _overrides(panel)
    below: dict[float, float] = {}
    for (name, series), default_color in zip(series_list, cycle(PALETTE), strict=False):
        color = colors.get(name, default_color)
        times, values = _points(series)
        moments = [datetime.fromtimestamp(moment, UTC) for moment in times]
        if custom.get("stacking", {}).get("mode") == "normal":
            base = np.array([below.get(moment, 0.0) for moment in times])
            axes.fill_between(moments, base, base + values, color=color, alpha=0.6, label=name, linewidth=0.5)
            below |= dict(zip(times, base + np.nan_to_num(values), strict=True))
        else:
            dashes = "--" if any(re.search(pattern, name) for pattern in dashed) else "-"
            axes.plot(moments, values, dashes, color=color, label=name, linewidth=1.6, marker="." if len(times) == 1 else "")
    if custom.get("scaleDistribution", {}).get("type") == "log":
        axes.set_yscale("log")
    else:
        axes.set_ylim(defaults.get("min"), defaults.get("max"))
    if custom.get("thresholdsStyle", {}).get("mode") == "dashed":
        for step in defaults["thresholds"]["steps"][1:]:
            axes.axhline(step["value"], color=COLORS[step["color"]], linestyle=":", linewidth=1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _format_value(panel, value)))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    axes.grid(color="#2c3235", linewidth=0.6)
    if len(series_list) > 1 or series_list[0][0]:
        style = {"fontsize": 7.5, "labelspacing": 0.2, "frameon": False, "handlelength": 1}
        columns = max(1, int(panel["gridPos"]["w"] * 10 / (6 + max(len(name) for name, _ in series_list))))
        axes.legend(loc="upper left", bbox_to_anchor=(-0.1, -0.12), ncols=columns, **style)


def _overrides(panel: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
    """Return regular expressions of the dashed series, and colours by name."""
    dashed, colors = [], {}
    for override in panel["fieldConfig"]["overrides"]:
        for each in override["properties"]:
            if each["id"] == "color":
                colors[override["matcher"]["options"]] = COLORS.get(each["value"]["fixedColor"], each["value"]["fixedColor"])
            else:
                dashed.append(override["matcher"]["options"])
    return dashed, colors


def _draw_heatmap(axes: Axes, panel: dict[str, Any], series_list: list[tuple[str, Series]]) -> None:
    ordered = sorted(series_list, key=lambda each: float(each[0]))
    times = sorted({moment for _, series in ordered for moment, _ in series["values"]})
    cells = np.full((len(ordered), len(times)), np.nan)
    for row, (_, series) in enumerate(ordered):
        for moment, value in series["values"]:
            cells[row, times.index(moment)] = float(value) or np.nan
    moments = [datetime.fromtimestamp(float(moment), UTC) for moment in times]
    edges = np.arange(len(ordered))
    axes.pcolormesh(moments, edges, np.sqrt(cells), cmap="Blues_r", shading="nearest")
    axes.set_yticks(edges[::2], [name for name, _ in ordered][::2])


def _draw_bar_chart(axes: Axes, panel: dict[str, Any], series_list: list[tuple[str, Series]]) -> None:
    ordered = sorted(series_list, key=lambda each: float(each[0]))
    names = [name for name, _ in ordered]
    axes.bar(names, [_last(series) for _, series in ordered], color=COLORS["green"], alpha=0.8, width=0.9)
    axes.set_yscale("symlog", linthresh=1)
    axes.tick_params(axis="x", rotation=90)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _format_value(panel, value)))


def _draw_table(axes: Axes, panel: dict[str, Any], series_list: list[tuple[str, Series]]) -> None:
    options = panel["transformations"][0]["options"]
    order = sorted(options["indexByName"], key=options["indexByName"].get)
    cells = [[series["metric"].get(column, f"{_last(series):g}") for column in order] for _, series in series_list]
    drawn_table = axes.table(
        cells, colLabels=[options["renameByName"][column] for column in order], loc="upper left", cellLoc="left", edges="horizontal"
    )
    for cell in drawn_table.get_celld().values():
        cell.set_edgecolor("#2c3235")


def _format_times(axes: Axes, times: tuple[float, float]) -> None:
    axes.set_xlim(*(datetime.fromtimestamp(moment, UTC) for moment in times))
    axes.xaxis.set_major_formatter(dates.DateFormatter("%H:%M:%S"))
    axes.xaxis.set_major_locator(dates.AutoDateLocator(maxticks=6))


def _points(series: Series) -> tuple[np.ndarray, np.ndarray]:
    points = np.array([(float(moment), float(value)) for moment, value in series["values"]])
    return points[:, 0], points[:, 1]


def _last(series: Series) -> float:
    numbers = [float(value) for _, value in series["values"] if value != "NaN"]
    return numbers[-1] if numbers else float("nan")


def _legend(pattern: str, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), pattern)


def _color(panel: dict[str, Any], value: float) -> str:
    reached = [
        step["color"] for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"] if step["value"] is None or value >= step["value"]
    ]
    return COLORS[reached[-1]]


def _format_value(panel: dict[str, Any], value: float) -> str:
    """Format a value in the unit of its panel, like Grafana."""
    unit, decimals = panel["fieldConfig"]["defaults"]["unit"], panel["fieldConfig"]["defaults"].get("decimals")
    if unit.startswith("dateTime"):
        return datetime.fromtimestamp(value / 1000, UTC).strftime("%H:%M:%S")
    if unit == "percentunit":
        return f"{100 * value:.3g}%" if decimals is None else f"{100 * value:.{decimals}f}%"
    if unit == "s":
        scale, name = next(
            (pair for pair in ((86400, " d"), (3600, " h"), (60, " min"), (1, " s")) if abs(value) >= pair[0]), (0.001, " ms")
        )
        return f"{value / scale:.3g}{name}" if value else "0 s"
    if decimals is not None:
        return f"{value:.{decimals}f}"
    base, suffix = 1000, " req/s" if unit == "reqps" else ""
    if unit.startswith("count:"):
        suffix = f" {unit.removeprefix('count:')}"
    elif unit in ("bytes", "Bps"):
        base, suffix = 1024, {"bytes": "iB", "Bps": "B/s"}[unit]
    for prefix in ("", "K", "M", "G", "T"):
        if abs(value) < base or prefix == "T":
            break
        value /= base
    return f"{value:.3g} {prefix}{suffix}" if base == 1024 else f"{value:.4g}{prefix}{suffix}"
