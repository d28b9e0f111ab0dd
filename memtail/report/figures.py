"""Figures of the report, as SVG and PNG; equal data give equal bytes."""

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from memtail.estimators import Stage, expected_standard_error
from memtail.estimators.pairs import MEM_THRESHOLD
from memtail.figures.style import colour, drawing, encoded
from memtail.report.items import EpochStage
from memtail.scores.names import OutcomeNames
from memtail.scores.summary import MEM_STEPS, SE_QUANTILES


def memorization_figure(stage: Stage, edges: np.ndarray, names: OutcomeNames) -> dict[str, bytes]:
    """Draw the histogram of memorization, from the lowest value to 1, with the standard error of each bar.

    Args:
        stage: the counts and their standard errors.
        edges: float [bins + 1], the edges of the bins.
        names: of what is estimated.
    """
    with drawing(6.4, 3.3) as figure:
        axes = figure.subplots()
        first = min(int(np.flatnonzero(stage.counts)[0]) if stage.counts.any() else len(edges), int(np.searchsorted(edges, -0.1)))
        left, counts, errors = edges[:-1][first:], stage.counts[first:], stage.counts_se[first:]
        width = edges[1] - edges[0]
        memorized = left > MEM_THRESHOLD - width / 2
        axes.bar(left, counts, width, align="edge", color=np.where(memorized, colour("accent"), colour("accent-soft")), edgecolor="white")
        lower = np.minimum(errors, np.maximum(counts - 0.5, 0))
        some = counts > 0
        axes.errorbar((left + width / 2)[some], counts[some], [lower[some], errors[some]], fmt="none", ecolor=colour("ink"), elinewidth=0.8)
        axes.axvline(MEM_THRESHOLD, color=colour("warm"), linewidth=1)
        axes.annotate(
            f"memorized ≥ {MEM_THRESHOLD}",
            xy=(MEM_THRESHOLD, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -2),
            textcoords="offset points",
            color=colour("warm"),
            va="top",
        )
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.5)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else ""))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(names.memorization)
        axes.set_ylabel("training examples")
        return encoded(figure)


def scores_figure(mem: np.ndarray, mem_p: np.ndarray) -> dict[str, bytes]:
    """Draw memorization of scores against memorization: the number of training examples in each cell of the plane.

    Args:
        mem: float64 [m].
        mem_p: float64 [m].
    """
    with drawing(6.4, 3.6) as figure:
        axes = figure.subplots()
        low = min(0.0, float(mem.min()), float(mem_p.min()))
        palette = LinearSegmentedColormap.from_list("counts", [colour("accent-soft"), colour("accent"), colour("ink")])
        cells = axes.hexbin(mem, mem_p, gridsize=(36, 20), extent=(low, 1, low, 1), bins="log", mincnt=1, cmap=palette, linewidths=0.2)
        axes.plot([low, 1], [low, 1], color=colour("warm"), linewidth=1, linestyle="--")
        axes.set_xlabel("memorization, mem")
        axes.set_ylabel("memorization of scores, mem_p")
        bar = figure.colorbar(cells, label="training examples")
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
        return encoded(figure)


def epochs_figure(stages: Sequence[EpochStage]) -> dict[str, bytes]:
    """Draw memorization over training: shares of the examples by threshold, and quartiles of the examples that are memorized in the end.

    Args:
        stages: by epoch, ascending.
    """
    with drawing(9.6, 3.3) as figure:
        shares, quartiles = figure.subplots(1, 2)
        epochs = [stage.epoch for stage in stages]
        shown = [place for place, step in enumerate(MEM_STEPS) if step in (0.25, 0.5, 0.75)]
        for place, shade in zip(shown, (colour("accent-soft"), colour("accent"), colour("ink")), strict=True):
            values = [stage.shares[place] for stage in stages]
            shares.plot(epochs, values, marker="o", markersize=3.5, color=shade, label=f"mem ≥ {MEM_STEPS[place]:g}")
        shares.set_ylim(bottom=0)
        shares.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        shares.set_ylabel("training examples")
        shares.legend()
        lower, median, upper = (np.array([stage.quartiles[place] for stage in stages]) for place in range(3))
        quartiles.fill_between(epochs, lower, upper, color=colour("accent-soft"), alpha=0.6, linewidth=0, label="middle half")
        quartiles.plot(epochs, median, marker="o", markersize=3.5, color=colour("accent"), label="median")
        quartiles.set_ylim(min(0.0, float(np.nanmin(lower, initial=0.0))), 1.02)
        quartiles.set_ylabel("mem of those memorized in the end")
        quartiles.legend()
        for axes in (shares, quartiles):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlabel("epochs")
        return encoded(figure)


def convergence_figure(stages: list[Stage], fraction: float, names: OutcomeNames) -> dict[str, bytes]:
    """Draw quantiles of the standard error, the largest expected one, and the share of memorized examples, by number of trials.

    Args:
        stages: memorization by number of trials.
        fraction: share of the training set that a trial saw.
        names: of what is estimated.
    """
    with drawing(9.6, 3.3) as figure:
        errors, shares = figure.subplots(1, 2)
        trials = np.array([stage.trials for stage in stages])
        expected = [expected_standard_error(number, fraction) for number in trials]
        errors.plot(trials, expected, color=colour("warm"), linestyle="--", linewidth=1.2, label="largest expected")
        labels = {0.5: "half of the examples", 0.95: "95% of the examples", 1.0: "all examples"}
        shades = (colour("accent-soft"), colour("accent"), colour("ink"))
        for place, (quantile, shade) in reversed(list(enumerate(zip(SE_QUANTILES, shades, strict=True)))):
            values = np.array([stage.standard_errors[place] for stage in stages])
            if not (values > 0).any():  # half of the examples often have equal scores of all models
                continue
            errors.plot(trials, np.where(values > 0, values, np.nan), marker="o", markersize=3.5, color=shade, label=labels[quantile])
        errors.set_xscale("log")
        errors.set_yscale("log")
        errors.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        errors.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        errors.yaxis.set_minor_formatter(NullFormatter())
        errors.set_ylabel(f"standard error of {names.mem} at most")
        errors.legend()
        step = MEM_STEPS.index(MEM_THRESHOLD)
        shares.errorbar(
            trials, [stage.shares[step] for stage in stages], [stage.shares_se[step] for stage in stages],
            color=colour("accent"), marker="o", markersize=3.5, capsize=2, elinewidth=0.9,
        )  # fmt: skip
        shares.set_xscale("log")
        shares.set_ylim(bottom=0)
        shares.yaxis.set_major_formatter(PercentFormatter(1))
        shares.set_ylabel(f"examples with {names.mem} ≥ {MEM_THRESHOLD}")
        for axes in (errors, shares):
            axes.set_xticks(trials, [f"{number:,}" for number in trials])
            axes.minorticks_off()
            axes.set_xlabel("trials")
        return encoded(figure)
