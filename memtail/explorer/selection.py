"""Selection and order of the training examples on a page, as query parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlencode

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from memtail.errors import MemtailError
from memtail.scores.names import OutcomeNames
from memtail.scores.reader import Column

#: Orders by held-out accuracy, or held-out score.
BY_HELD_OUT = ("hardest", "easiest")
#: Width of a bar of the histogram.
STEP = 0.05


def orders(names: OutcomeNames) -> dict[str, str]:
    """Return the orders and their labels. Ties are broken by memorization, highest first."""
    return {
        "memorized": "most memorized",
        "least": "least memorized",
        "hardest": f"lowest held-out {names.mean}",
        "easiest": f"highest held-out {names.mean}",
        "class": "class",
        "index": "index",
    }


class QueryError(MemtailError):
    """Invalid query parameter."""


class Selection(BaseModel):
    """Query parameters of a gallery.

    Attributes:
        label: `class`, index of a class.
        low, high: `from` and `to`, bounds of memorization; low <= mem < high.
        p_out_low, p_out_high: `right-from` and `right-to`, bounds of held-out accuracy or score; p_out_low <= p_out < p_out_high.
        text: `q`, an index or a part of a file name, in any case.
        sort: key of `orders`.
        page: page of the gallery, from 1.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    label: int | None = Field(default=None, alias="class", ge=0)
    low: float | None = Field(default=None, alias="from", ge=-1, le=1, allow_inf_nan=False)
    high: float | None = Field(default=None, alias="to", ge=-1, le=1, allow_inf_nan=False)
    p_out_low: float | None = Field(default=None, alias="right-from", ge=0, le=1, allow_inf_nan=False)
    p_out_high: float | None = Field(default=None, alias="right-to", ge=0, le=1, allow_inf_nan=False)
    text: str = Field(default="", alias="q", max_length=200)
    sort: Literal["memorized", "least", "hardest", "easiest", "class", "index"] = "memorized"
    page: int = Field(default=1, ge=1, le=10**9)

    @classmethod
    def of(cls, query: Mapping[str, str]) -> "Selection":
        """Parse query parameters; empty ones count as unset. Raises: QueryError."""
        try:
            return cls.model_validate({name: value.strip() for name, value in query.items() if value.strip()})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            value = str(first["input"])[:40]
            raise QueryError(f"{first['loc'][0]} is '{value}': {first['msg'][:1].lower()}{first['msg'][1:]}") from None

    def query(self, **changes: Any) -> str:
        """Format as a query string with its `?`, empty if all parameters have their defaults.

        Args:
            changes: other values of some parameters, by their names in the query. The page is 1 unless it is among them.
        """
        fields = self.model_dump(by_alias=True, exclude={"page"}) | {"page": 1} | changes
        defaults = Selection().model_dump(by_alias=True)
        changed = {name: value for name, value in fields.items() if value != defaults[name]}
        return f"?{urlencode(changed)}" if changed else ""


def select(
    memorization: Mapping[str, Column], names: OutcomeNames, filenames: Sequence[str] | None, selection: Selection
) -> npt.NDArray[np.int64]:
    """Select training examples.

    Args:
        memorization: columns of the published table.
        names: names of the columns of estimates.
        filenames: file names in lower case; None if the dataset has none.
        selection: the query parameters.

    Returns:
        int64, indices in the selection's order; examples without an estimate come last.
    """
    mem = memorization[names.mem]
    chosen = _matching(memorization, names, filenames, selection)
    if selection.low is not None:
        chosen &= mem >= selection.low
    if selection.high is not None:
        chosen &= mem < selection.high
    rows = np.flatnonzero(chosen)
    if selection.sort == "index":
        return rows
    if selection.sort == "least":
        return rows[np.argsort(mem[rows], kind="stable")]
    rows = rows[np.argsort(-mem[rows], kind="stable")]
    if selection.sort == "memorized":
        return rows
    if selection.sort == "class" and "label" not in memorization:
        return rows
    key = memorization["label"] if selection.sort == "class" else memorization[names.p_out] * (1 if selection.sort == "hardest" else -1)
    return rows[np.argsort(key[rows], kind="stable")]


@dataclass(frozen=True)
class Bar:
    """A bar of the histogram: `count` examples with low <= mem < high; the outer bars have no outer bound."""

    low: float | None
    high: float | None
    count: int
    share: float
    chosen: bool

    @property
    def description(self) -> str:
        """Text for people and screen readers."""
        span = " to ".join(f"{bound:g}" for bound in (self.low, self.high) if bound is not None)
        side = "below " if self.low is None else "from " if self.high is None else ""
        return f"{self.count:,} {'example' if self.count == 1 else 'examples'} with memorization {side}{span}"


def histogram(memorization: Mapping[str, Column], names: OutcomeNames, filenames: Sequence[str] | None, selection: Selection) -> list[Bar]:
    """Histogram of memorization over a selection, ignoring its bounds of memorization.

    Each bar's `share` is its height on a logarithmic scale, 0 to 1, since few examples are memorized and those matter.

    Args:
        memorization: columns of the published table.
        names: names of the columns of estimates.
        filenames: file names in lower case; None if the dataset has none.
        selection: the query parameters.
    """
    mem = memorization[names.mem][_matching(memorization, names, filenames, selection)]
    mem = mem[~np.isnan(mem)]
    first = int(np.floor(min(mem.min(initial=0.0), -2 * STEP) / STEP + 1e-9))
    last = round(1 / STEP)
    edges = np.round(np.arange(first, last + 1) * STEP, 2)
    # intervals are half-open, as in numpy; a value of 1, or below the first edge by rounding, counts in the outer bars
    counts = np.bincount(np.clip(np.searchsorted(edges, mem, side="right") - 1, 0, len(edges) - 2), minlength=len(edges) - 1)
    most = np.log1p(counts.max(initial=1))
    low = -np.inf if selection.low is None else selection.low
    high = np.inf if selection.high is None else selection.high
    bars = []
    for place, count in enumerate(counts.tolist()):
        begin, end = float(edges[place]), float(edges[place + 1])
        bars.append(
            Bar(
                low=begin if place else None,
                high=end if place < len(counts) - 1 else None,
                count=count,
                share=float(np.log1p(count) / most),
                chosen=low <= begin + STEP / 2 < high,
            )
        )
    return bars


def _matching(
    memorization: Mapping[str, Column], names: OutcomeNames, filenames: Sequence[str] | None, selection: Selection
) -> npt.NDArray[np.bool_]:
    """Check the class, the held-out accuracy or score, and the text of each example, bool [n]."""
    count = len(memorization["index"])
    chosen = np.ones(count, np.bool_)
    if selection.label is not None and "label" in memorization:
        chosen &= memorization["label"] == selection.label
    if selection.p_out_low is not None:
        chosen &= memorization[names.p_out] >= selection.p_out_low
    if selection.p_out_high is not None:
        chosen &= memorization[names.p_out] < selection.p_out_high
    if selection.text:
        text = selection.text.lower()
        matches = np.zeros(count, np.bool_)
        if filenames is not None:
            matches |= np.fromiter((text in name for name in filenames), np.bool_, count)
        if text.isascii() and text.isdigit() and len(text) < 19 and int(text) < count:
            matches[int(text)] = True
        chosen &= matches
    return chosen
