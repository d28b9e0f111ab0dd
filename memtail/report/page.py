"""Rendering of the report page: one HTML file without scripts that loads nothing else."""

import base64
import math
from dataclasses import fields
from functools import partial
from importlib.metadata import version
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from memtail.datasets import Dataset
from memtail.estimators.convergence import HALVES
from memtail.estimators.false_discovery import LARGEST_RATE
from memtail.estimators.pairs import INFL_THRESHOLD, MEM_THRESHOLD
from memtail.figures.numbers import fixed, general, percent
from memtail.figures.thumbnails import thumbnail
from memtail.report.content import DISCOVERY_RATE, EDGES, GALLERY_STEPS, LABEL_MEM
from memtail.report.figures import convergence_figure, epochs_figure, memorization_figure, scores_figure
from memtail.report.items import Content, Number
from memtail.scores.summary import MEM_STEPS

_ACCURACIES = (("in_subset_accuracy", "in-subset"), ("held_out_accuracy", "held-out"), ("test_accuracy", "test"))
# Images of at most this many pixels a side are scaled up without smoothing.
_SMALL = 64
_MISSING = "–"


def draw(content: Content) -> dict[str, dict[str, bytes]]:
    """Draw the figures; returns the files of `memtail.figures.style.encoded` by figure."""
    figures = {
        "memorization": memorization_figure(content.stages[-1], EDGES, content.summary.names),
        "convergence": convergence_figure(content.stages, content.fraction, content.summary.names),
    }
    if content.soft is not None:
        figures["scores"] = scores_figure(content.soft.mem, content.soft.mem_p)
    if content.epochs:
        figures["epochs"] = epochs_figure(content.epochs)
    return figures


def render(content: Content, figures: dict[str, dict[str, bytes]], dataset: Dataset, scores: str) -> str:
    """Render the page as HTML; equal content gives equal text.

    Args:
        content: content of the page.
        figures: result of `draw`.
        dataset: images of the experiment.
        scores: version of the scores.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        {
            "general": general,
            "fixed": partial(fixed, missing=_MISSING),
            "percent": partial(percent, missing=_MISSING),
            "thousands": lambda value: f"{value:,}",
            "count_of": lambda share, count: _MISSING if math.isnan(share) else f"{round(share * count):,}",
            "rate": _rate,
            "svg_uri": lambda svg: _data_uri("image/svg+xml", svg),
            "preview": lambda example: example.preview(dataset),
            "data_uri": lambda image: _data_uri(*thumbnail(image)),
        }
    )
    environment.tests.update(
        {
            "undefined_number": math.isnan,
            "small": lambda image: max(image.shape[:2]) <= _SMALL,
            "row": lambda preview: isinstance(preview, tuple),
        }
    )
    source = files("memtail.report")
    last = content.stages[-1]
    shares = {step: Number(float(share), float(se)) for step, share, se in zip(MEM_STEPS, last.shares, last.shares_se, strict=True)}
    return environment.from_string(source.joinpath("report.html.j2").read_text()).render(
        {field.name: getattr(content, field.name) for field in fields(content)},
        css=files("memtail.figures").joinpath("base.css").read_text() + source.joinpath("report.css").read_text(),
        figures={name: drawn["svg"] for name, drawn in figures.items()},
        name=content.record.experiment.name,
        spec=content.record.experiment.to_yaml().strip(),
        version=version("memtail"),
        scores=scores,
        last=last,
        memorized=shares[MEM_THRESHOLD],
        thresholds=shares.items(),
        mean=Number(last.mean, last.mean_se),
        mem_threshold=MEM_THRESHOLD,
        infl_threshold=INFL_THRESHOLD,
        label_mem=LABEL_MEM,
        gallery_steps=[f"{step:g}" for step in GALLERY_STEPS],
        discovery_rate=DISCOVERY_RATE,
        selected=content.summary.selected_pairs if content.summary.n_test else None,
        names=content.summary.names,
        scores_only=content.summary.outcome == "score",
        accuracy_titles=_ACCURACIES,
        halves=HALVES,
    )


def _rate(rate: float) -> str:
    if rate > LARGEST_RATE:
        return f"above {LARGEST_RATE:.0%}"
    return f"{rate:.1%}" if rate >= 0.001 else "below 0.1%"


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
