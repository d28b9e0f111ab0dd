"""What pages show, as plain values, and the same as CSV."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv

from memtail.estimators.binomial import standard_error
from memtail.explorer.library import Opened
from memtail.explorer.selection import BY_HELD_OUT, Selection, select
from memtail.scores.reader import Column

#: Examples on a page of the gallery.
PER_PAGE = 60
#: Examples helped most, hurt most, and influencers.
TOP = 12
# What spreadsheets take for the beginning of a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True)
class Tile:
    """An example in a grid: its image, one score, its class.

    Attributes:
        split: "train" or "test".
        value, error: the score and its standard error; NaN where there is no estimate.
    """

    split: str
    index: int
    label: str
    value: float
    error: float
    file: str | None


@dataclass(frozen=True)
class Gallery:
    """One page of a selection: `rows` are all chosen, of which `tiles` are on the page."""

    rows: npt.NDArray[np.int64]
    tiles: list[Tile]
    page: int
    pages: int


@dataclass(frozen=True)
class Rate:
    """How many of so many models were right, as a share with its standard error; NaN of none."""

    value: float
    error: float
    models: int

    @classmethod
    def of(cls, value: float, models: int) -> "Rate":
        """With its standard error."""
        return cls(value, float(standard_error(value, models)), models)


def gallery(opened: Opened, selection: Selection) -> Gallery:
    """The page of a selection; the last one if there are not so many. Where it is in order of held-out accuracy, that is shown."""
    rows = select(opened.memorization, opened.lower_files, selection)
    pages = max(1, -(-len(rows) // PER_PAGE))
    page = min(selection.page, pages)
    shown = rows[(page - 1) * PER_PAGE : page * PER_PAGE]
    value, error = (opened.memorization[name][shown] for name in ("mem", "mem_se"))
    if selection.sort in BY_HELD_OUT:
        value = opened.memorization["p_out"][shown]
        error = standard_error(value, opened.memorization["k_out"][shown])
    tiles = train_tiles(opened, shown, value, error)
    return Gallery(rows, tiles, page, pages)


def train_example(opened: Opened, index: int, selection: Selection) -> dict[str, Any]:
    """What the page of a training example shows; `before` and `after` are its neighbours in a selection."""
    row = {name: values[index].item() if hasattr(values[index], "item") else values[index] for name, values in opened.memorization.items()}
    rows = select(opened.memorization, opened.lower_files, selection)
    place = np.flatnonzero(rows == index)
    before = int(rows[place[0] - 1]) if len(place) and place[0] > 0 else None
    after = int(rows[place[0] + 1]) if len(place) and place[0] + 1 < len(rows) else None
    helped, hurt = influenced(opened, index)
    return {
        "tile": train_tiles(opened, np.array([index]), opened.memorization["mem"][[index]], opened.memorization["mem_se"][[index]])[0],
        "seen": Rate.of(row["p_in"], row["k_in"]),
        "unseen": Rate.of(row["p_out"], row["k_out"]),
        "before": before,
        "after": after,
        "place": int(place[0]) if len(place) else None,
        "of": len(rows),
        "page": 1 + int(place[0]) // PER_PAGE if len(place) else 1,
        "helped": influenced_tiles(opened, helped),
        "hurt": influenced_tiles(opened, hurt),
        "by_chance": by_chance(opened.scores.statistics.n_test),
    }


def test_example(opened: Opened, index: int) -> dict[str, Any]:
    """What the page of a test example shows."""
    helping, harmful = influencers(opened, index)
    right = right_share(opened, index)
    one, value, error = np.array([index]), np.array([right.value]), np.array([right.error])
    return {
        "tile": _tiles(opened, "test", one, opened.scores.test_labels, value, error, opened.test_files)[0],
        "right": right,
        "helping": influencer_tiles(opened, helping),
        "harmful": influencer_tiles(opened, harmful),
        "by_chance": by_chance(opened.scores.statistics.n_train),
    }


def right_share(opened: Opened, test: int) -> Rate:
    """How many of all models got a test example right."""
    statistics = opened.scores.statistics
    return Rate.of(float(statistics.correct_on_test[test] / statistics.trials), statistics.trials)


def train_tiles(opened: Opened, index: Column, value: Column, error: Column) -> list[Tile]:
    """Training examples with a score of each."""
    return _tiles(opened, "train", index, opened.memorization["label"], value, error, opened.train_files)


def influenced(opened: Opened, train: int) -> tuple[dict[str, Column], dict[str, Column]]:
    """The test examples that a training example helps most, and those that it hurts most, as `Scores.top_influenced` gives them."""
    helped, hurt = (opened.scores.top_influenced(train, TOP, harmed=harmed) for harmed in (False, True))
    return _where(helped, helped["infl"] > 0), _where(hurt, hurt["infl"] < 0)


def influencers(opened: Opened, test: int) -> tuple[dict[str, Column], dict[str, Column]]:
    """The training examples that help a test example most, and those that hurt it most, as `Scores.top_influencers` gives them."""
    helping, harmful = (opened.scores.top_influencers(test, TOP, harmful=harmful) for harmful in (False, True))
    return _where(helping, helping["infl"] > 0), _where(harmful, harmful["infl"] < 0)


def influenced_tiles(opened: Opened, table: dict[str, Column]) -> list[Tile]:
    """The rows of `influenced` as tiles."""
    return _tiles(opened, "test", table["tt_idx"], opened.scores.test_labels, table["infl"], table["infl_se"], opened.test_files)


def influencer_tiles(opened: Opened, table: dict[str, Column]) -> list[Tile]:
    """The rows of `influencers` as tiles."""
    return train_tiles(opened, table["tr_idx"], table["infl"], table["infl_se"])


def by_chance(count: int) -> float:
    """How many standard errors the greatest of `count` influences reaches if all are 0 in truth: the median of the greatest normal."""
    return NormalDist().inv_cdf(0.5 ** (1 / count))


def gallery_csv(opened: Opened, selection: Selection) -> bytes:
    """All examples of a selection, on whatever page, in its order: the columns of `memorization.parquet` and `class`."""
    rows = select(opened.memorization, opened.lower_files, selection)
    columns: dict[str, Any] = {name: values[rows] for name, values in opened.memorization.items()}
    columns["class"] = _names(opened, columns["label"])
    return csv(columns)


def influenced_csv(opened: Opened, train: int) -> bytes:
    """A training example's page: a row of its own, then the test examples with `tt_idx`, `class`, `infl`, `infl_se`.

    Its own row has `tr_idx`, `class`, the columns of `memorization.parquet` and the standard errors of `p_in` and `p_out`. All have a
    `filename` where there are any.
    """
    own: dict[str, Any] = {"tr_idx": [train], "class": _names(opened, opened.memorization["label"][[train]])}
    own |= {name: values[[train]] for name, values in opened.memorization.items() if name not in ("index", "label")}
    own |= {f"{p}_se": standard_error(own[p], own[k]) for p, k in (("p_in", "k_in"), ("p_out", "k_out"))}
    table = _joined(influenced(opened, train))
    columns = {"tt_idx": table["tt_idx"], "class": _names(opened, table["label"]), "infl": table["infl"], "infl_se": table["infl_se"]}
    if opened.test_files is not None:
        columns["filename"] = [opened.test_files[index] for index in table["tt_idx"]]
    return csv(own, columns)


def influencers_csv(opened: Opened, test: int) -> bytes:
    """A test example's page: a row of its own, then the training examples with `tr_idx`, `class`, `infl`, `infl_se`, `mem`, `mem_se`.

    Its own row has `tt_idx`, `class`, and the share `right` of so many `models`, with its standard error `right_se`. All have a `filename`
    where there are any.
    """
    right = right_share(opened, test)
    own: dict[str, Any] = {"tt_idx": [test], "class": _names(opened, opened.scores.test_labels[[test]])}
    own |= {"right": [right.value], "right_se": [right.error], "models": [right.models]}
    if opened.test_files is not None:
        own["filename"] = [opened.test_files[test]]
    table = _joined(influencers(opened, test))
    columns = {"tr_idx": table["tr_idx"], "class": _names(opened, table["label"]), "infl": table["infl"], "infl_se": table["infl_se"]}
    columns |= {"mem": table["mem"], "mem_se": opened.memorization["mem_se"][table["tr_idx"]]}
    if opened.train_files is not None:
        columns["filename"] = [opened.train_files[index] for index in table["tr_idx"]]
    return csv(own, columns)


def csv(*tables: dict[str, Any]) -> bytes:
    """Tables one below the other as CSV, each of columns of equal length; what one has no column for is empty.

    A text that a spreadsheet would take for a formula begins with an apostrophe.
    """
    safe = [pa.table({name: values if _is_numbers(values) else _inert(values) for name, values in table.items()}) for table in tables]
    buffer = io.BytesIO()
    pyarrow.csv.write_csv(pa.concat_tables(safe, promote_options="default"), buffer)
    return buffer.getvalue()


def _is_numbers(values: Any) -> bool:
    return isinstance(values, np.ndarray) and values.dtype != object


def _tiles(
    opened: Opened, split: str, index: Column, labels: Column, value: Column, error: Column, files: Sequence[str] | None
) -> list[Tile]:
    names = _names(opened, labels[index])
    rows = zip(index.tolist(), names, value.tolist(), error.tolist(), strict=True)
    return [Tile(split, place, name, infl, se, None if files is None else files[place]) for place, name, infl, se in rows]


def _names(opened: Opened, labels: Column) -> list[str]:
    return [opened.classes[label] for label in labels.tolist()]


def _where(table: dict[str, Column], chosen: Column) -> dict[str, Column]:
    return {name: values[chosen] for name, values in table.items()}


def _joined(tables: tuple[dict[str, Column], dict[str, Column]]) -> dict[str, Column]:
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


def _inert(values: Iterable[Any]) -> list[Any]:
    return [f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value for value in values]
