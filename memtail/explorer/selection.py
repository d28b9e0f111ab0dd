"""Which training examples a page shows, and in which order: all of it in the query of its address."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlencode

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from memtail.errors import MemtailError
from memtail.scores.reader import Column

#: The orders there are, as people call them. Where an order leaves examples equal, the more memorized comes first.
ORDERS = {
    "memorized": "most memorized",
    "least": "least memorized",
    "hardest": "lowest held-out accuracy",
    "easiest": "highest held-out accuracy",
    "class": "class",
    "index": "index",
}
#: Those of them that go by held-out accuracy.
BY_HELD_OUT = ("hardest", "easiest")
#: The width of the histogram's bars.
STEP = 0.05


class QueryError(MemtailError):
    """The query of an address asks for what there is not."""


class Selection(BaseModel):
    """The query of an address.

    Attributes:
        label: `class`, the index of the only class wanted.
        low, high: `from` and `to`; low <= mem < high.
        least_right, most_right: `right-from` and `right-to`; least_right <= p_out < most_right.
        text: `q`, an index, or a part of a file name in either case.
        sort: one of `ORDERS`.
        page: of the gallery, from 1.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    label: int | None = Field(default=None, alias="class", ge=0)
    low: float | None = Field(default=None, alias="from", ge=-1, le=1, allow_inf_nan=False)
    high: float | None = Field(default=None, alias="to", ge=-1, le=1, allow_inf_nan=False)
    least_right: float | None = Field(default=None, alias="right-from", ge=0, le=1, allow_inf_nan=False)
    most_right: float | None = Field(default=None, alias="right-to", ge=0, le=1, allow_inf_nan=False)
    text: str = Field(default="", alias="q", max_length=200)
    sort: Literal["memorized", "least", "hardest", "easiest", "class", "index"] = "memorized"
    page: int = Field(default=1, ge=1, le=10**9)

    @classmethod
    def of(cls, query: Mapping[str, str]) -> "Selection":
        """Read a query; what is empty in it is not set. Raises: QueryError."""
        try:
            return cls.model_validate({name: value.strip() for name, value in query.items() if value.strip()})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            shown = str(first["input"])[:40]
            raise QueryError(f"{first['loc'][0]} is '{shown}': {first['msg'][:1].lower()}{first['msg'][1:]}") from None

    def query(self, **changes: Any) -> str:
        """The query of this selection with some fields, by their names in it, set to others; with its `?`, and empty where all is as usual.

        Another selection or order begins at its first page.
        """
        fields = self.model_dump(by_alias=True, exclude={"page"}) | {"page": 1} | changes
        usual = Selection().model_dump(by_alias=True)
        given = {name: value for name, value in fields.items() if value != usual[name]}
        return f"?{urlencode(given)}" if given else ""


def select(memorization: Mapping[str, Column], filenames: Sequence[str] | None, selection: Selection) -> npt.NDArray[np.int64]:
    """The chosen training examples in order, int64 indices; those without an estimate come last.

    Args:
        memorization: the columns of the published table.
        filenames: in lower case; None where the dataset has none.
        selection: what is chosen.
    """
    mem = memorization["mem"]
    chosen = _matching(memorization, filenames, selection)
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
    key = {"class": memorization["label"], "hardest": memorization["p_out"], "easiest": -memorization["p_out"]}[selection.sort]
    return rows[np.argsort(key[rows], kind="stable")]


@dataclass(frozen=True)
class Bar:
    """A bar of the histogram: `count` examples with low <= mem < high; the outer bars have no bound outwards."""

    low: float | None
    high: float | None
    count: int
    share: float
    chosen: bool

    @property
    def words(self) -> str:
        """What it stands for."""
        span = " to ".join(f"{bound:g}" for bound in (self.low, self.high) if bound is not None)
        side = "below " if self.low is None else "from " if self.high is None else ""
        return f"{self.count:,} {'example' if self.count == 1 else 'examples'} with memorization {side}{span}"


def histogram(memorization: Mapping[str, Column], filenames: Sequence[str] | None, selection: Selection) -> list[Bar]:
    """How memorization is distributed over the examples of the selection, whatever memorization it asks for.

    Each bar's `share` is its height on a logarithmic scale, 0 to 1: most examples are memorized by none, and the few are looked for.
    """
    mem = memorization["mem"][_matching(memorization, filenames, selection)]
    mem = mem[~np.isnan(mem)]
    first = int(np.floor(min(mem.min(initial=0.0), -2 * STEP) / STEP + 1e-9))
    last = round(1 / STEP)
    edges = np.round(np.arange(first, last + 1) * STEP, 2)
    # a half-open interval counts its lower bound, as numpy's do; what is 1, or by rounding below the first edge, is in the outer bars
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


def _matching(memorization: Mapping[str, Column], filenames: Sequence[str] | None, selection: Selection) -> npt.NDArray[np.bool_]:
    """Whether each example has the class, the held-out accuracy and the text asked for."""
    count = len(memorization["mem"])
    chosen = np.ones(count, np.bool_)
    if selection.label is not None:
        chosen &= memorization["label"] == selection.label
    if selection.least_right is not None:
        chosen &= memorization["p_out"] >= selection.least_right
    if selection.most_right is not None:
        chosen &= memorization["p_out"] < selection.most_right
    if selection.text:
        text = selection.text.lower()
        found = np.zeros(count, np.bool_)
        if filenames is not None:
            found |= np.fromiter((text in name for name in filenames), np.bool_, count)
        if text.isascii() and text.isdigit() and len(text) < 19 and int(text) < count:
            found[int(text)] = True
        chosen &= found
    return chosen
