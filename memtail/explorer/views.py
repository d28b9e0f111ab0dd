"""Content of the pages as plain values, and as CSV."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from memtail.estimators.binomial import standard_error
from memtail.estimators.soft import mean_score, scores_on_test
from memtail.explorer.opened import Opened
from memtail.explorer.selection import BY_HELD_OUT, Selection, select
from memtail.scores.csv import write_csv
from memtail.scores.reader import Column

#: Examples on a page of the gallery.
PER_PAGE = 60
#: Examples in each list of influences.
TOP = 12


@dataclass(frozen=True)
class Tile:
    """An example in a grid.

    Attributes:
        split, index: "train" or "test", and the index in that split.
        label: name of the class; None if there are no labels.
        value, se: the score shown and its standard error; NaN where there is no estimate.
        file: file name; None if the dataset has none.
        interval: the ends of the 95% confidence interval of memorization; None for other scores.
        selected: whether the example is in a selected pair with the example of the page.
        chance: whether its influence is within that of chance.
    """

    split: str
    index: int
    label: str | None
    value: float
    se: float
    file: str | None
    interval: tuple[float, float] | None = None
    selected: bool = False
    chance: bool = False


@dataclass(frozen=True)
class Gallery:
    """One page of a selection: `rows` are all selected examples, `tiles` those on the page."""

    rows: npt.NDArray[np.int64]
    tiles: list[Tile]
    page: int
    pages: int


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of some models on one example, or their mean score, with its standard error; NaN where there is none."""

    value: float
    se: float
    models: int

    @classmethod
    def of(cls, value: float, models: int) -> "Accuracy":
        """Add the standard error."""
        return cls(value, float(standard_error(value, models)), models)


def gallery(opened: Opened, selection: Selection) -> Gallery:
    """Return the page of a selection, or its last page. Tiles show memorization, or held-out accuracy if it decides the order."""
    names = opened.scores.names
    rows = select(opened.memorization, names, opened.lower_files, selection)
    pages = max(1, -(-len(rows) // PER_PAGE))
    page = min(selection.page, pages)
    shown = rows[(page - 1) * PER_PAGE : page * PER_PAGE]
    if selection.sort in BY_HELD_OUT:
        value = opened.memorization[names.p_out][shown]
        se = np.full(len(shown), np.nan) if opened.scores.scores_only else standard_error(value, opened.memorization["k_out"][shown])
        tiles = train_tiles(opened, shown, value, se)
    else:
        tiles = memorization_tiles(opened, shown)
    return Gallery(rows, tiles, page, pages)


def train_example(opened: Opened, index: int, selection: Selection) -> dict[str, Any]:
    """Return the content of a training example's page; `previous` and `next` are its neighbours in the selection."""
    row = {name: values[index].item() if hasattr(values[index], "item") else values[index] for name, values in opened.memorization.items()}
    rows = select(opened.memorization, opened.scores.names, opened.lower_files, selection)
    place = np.flatnonzero(rows == index)
    previous_row = int(rows[place[0] - 1]) if len(place) and place[0] > 0 else None
    next_row = int(rows[place[0] + 1]) if len(place) and place[0] + 1 < len(rows) else None
    helped, hurt, names = *influenced(opened, index), opened.scores.names
    return {
        "tile": memorization_tiles(opened, np.array([index]))[0],
        "by_epoch": _by_epoch(opened, index),
        **{name: row.get(name) for name in ("mem_p", "mem_p_se", "score_in", "score_out")},
        "accuracy_in": _mean(opened, row[names.p_in], row["k_in"]),
        "accuracy_out": _mean(opened, row[names.p_out], row["k_out"]),
        "previous": previous_row,
        "next": next_row,
        "place": int(place[0]) if len(place) else None,
        "of": len(rows),
        "page": 1 + int(place[0]) // PER_PAGE if len(place) else 1,
        "helped": influenced_tiles(opened, helped),
        "hurt": influenced_tiles(opened, hurt),
        "pairs": _number_of_pairs(opened, "tr_idx", index),
        "by_chance": by_chance(opened.scores.statistics.n_test) if opened.scores.statistics.n_test else None,
    }


def _mean(opened: Opened, value: float, models: int) -> Accuracy:
    """Mean outcome of some models; standard errors of mean scores are not published."""
    return Accuracy(value, np.nan, models) if opened.scores.scores_only else Accuracy.of(value, models)


def _by_epoch(opened: Opened, train: int) -> list[tuple[int, float, float]]:
    """Epochs with memorization of an example after them, and its standard error."""
    table = opened.scores.snapshots
    if table is None:
        return []
    rows = slice(train, None, opened.scores.summary.n_train)  # the rows of an epoch are those of all examples, in order
    return list(zip(*(table[name][rows].tolist() for name in ("epoch", "mem", "mem_se")), strict=True))


def test_example(opened: Opened, index: int) -> dict[str, Any]:
    """Return the content of a test example's page."""
    helping, harmful = influencers(opened, index)
    accuracy = accuracy_on(opened, index)
    one, value, se = np.array([index]), np.array([accuracy.value]), np.array([accuracy.se])
    return {
        "tile": _tiles(opened, "test", one, opened.scores.test_labels, value, se, opened.test_files)[0],
        "accuracy": accuracy,
        "helping": influencer_tiles(opened, helping),
        "harmful": influencer_tiles(opened, harmful),
        "pairs": _number_of_pairs(opened, "tt_idx", index),
        "by_chance": by_chance(opened.scores.statistics.n_train),
    }


def accuracy_on(opened: Opened, test: int) -> Accuracy:
    """Return the accuracy of all models on a test example, or their mean score."""
    statistics = opened.scores.statistics
    if opened.scores.scores_only:
        scores = scores_on_test(statistics, test)
        return Accuracy(*mean_score(scores), len(scores))
    return Accuracy.of(float(statistics.correct_on_test[test] / statistics.trials), statistics.trials)


def train_tiles(opened: Opened, index: Column, value: Column, se: Column) -> list[Tile]:
    """Make tiles of training examples with a score."""
    return _tiles(opened, "train", index, opened.scores.train_labels, value, se, opened.train_files)


def memorization_tiles(opened: Opened, index: Column) -> list[Tile]:
    """Make tiles of training examples with their memorization."""
    value, se = (opened.memorization[name][index] for name in (opened.scores.names.mem, opened.scores.names.mem_se))
    tiles = train_tiles(opened, index, value, se)
    ends = zip(opened.scores.mem_lo[index].tolist(), opened.scores.mem_hi[index].tolist(), strict=True)
    return [replace(tile, interval=interval) for tile, interval in zip(tiles, ends, strict=True)]


def influenced(opened: Opened, train: int) -> tuple[dict[str, Column], dict[str, Column]]:
    """Return the test examples with the highest and the lowest influence of a training example (see `Scores.top_influenced`).

    Of the highest, selected pairs come first, then examples of the class, then others. The column `selected` says whether the pair is
    selected, and `chance` whether its influence is within that of chance.
    """
    helped, hurt = (opened.scores.top_influenced(train, TOP, harmed=harmed) for harmed in (False, True))
    infl, level = opened.scores.names.infl, by_chance(max(1, opened.scores.summary.n_test))
    same = opened.scores.test_labels == opened.scores.train_labels[train]
    helped = _selected_first(opened, _where(helped, helped[infl] > 0), "tr_idx", train, same)
    return _with_chance(opened, helped, level), _with_chance(opened, _where(hurt, hurt[infl] < 0), level)


def influencers(opened: Opened, test: int) -> tuple[dict[str, Column], dict[str, Column]]:
    """Return the training examples with the highest and the lowest influence on a test example (see `Scores.top_influencers`).

    Order and further columns are those of `influenced`.
    """
    helping, harmful = (opened.scores.top_influencers(test, TOP, harmful=harmful) for harmful in (False, True))
    infl, level = opened.scores.names.infl, by_chance(opened.scores.summary.n_train)
    same = opened.scores.train_labels == opened.scores.test_labels[test]
    helping = _selected_first(opened, _where(helping, helping[infl] > 0), "tt_idx", test, same)
    return _with_chance(opened, helping, level), _with_chance(opened, _where(harmful, harmful[infl] < 0), level)


def _selected_first(opened: Opened, table: dict[str, Column], own: str, index: int, same: Column) -> dict[str, Column]:
    """Add the selected pairs of an example to the highest influences, and put them first, then those of its class; `TOP` of all.

    Args:
        opened: the experiment.
        table: the highest influences, falling.
        own: column of the pairs that holds the example.
        index: of the example.
        same: bool, by index of the other example, whether it is of the class.
    """
    other = "tt_idx" if own == "tr_idx" else "tr_idx"
    table = {name: values for name, values in table.items() if name != "label"}
    selected = np.zeros(len(table[other]), np.bool_)
    if (pairs := opened.scores.selected_pairs) is not None:
        of_example = _where(pairs, pairs[own] == index)
        further = _where(table, ~np.isin(table[other], of_example[other]))
        table = {name: np.concatenate([of_example[name], further[name]]) for name in table}
        selected = np.arange(len(table[other])) < len(of_example[other])
    order = np.lexsort((-table[opened.scores.names.infl], ~same[table[other]], ~selected))
    return _where(table | {"selected": selected}, order[:TOP])


def _with_chance(opened: Opened, table: dict[str, Column], level: float) -> dict[str, Column]:
    """Add `chance`: whether the pair is not selected, and its influence has at most `level` standard errors."""
    names = opened.scores.names
    selected = table.get("selected", np.zeros(len(table[names.infl]), np.bool_))
    beyond = np.abs(table[names.infl]) > level * table[names.infl_se]
    return table | {"selected": selected, "chance": ~(selected | beyond)}


def _number_of_pairs(opened: Opened, own: str, index: int) -> int | None:
    """Number of selected pairs of an example; None if no pairs were selected."""
    pairs = opened.scores.selected_pairs
    return None if pairs is None else int((pairs[own] == index).sum())


def influenced_tiles(opened: Opened, table: dict[str, Column]) -> list[Tile]:
    """Make tiles of the rows of `influenced`."""
    value, se = (table[name] for name in (opened.scores.names.infl, opened.scores.names.infl_se))
    return _marked(_tiles(opened, "test", table["tt_idx"], opened.scores.test_labels, value, se, opened.test_files), table)


def influencer_tiles(opened: Opened, table: dict[str, Column]) -> list[Tile]:
    """Make tiles of the rows of `influencers`."""
    tiles = train_tiles(opened, table["tr_idx"], table[opened.scores.names.infl], table[opened.scores.names.infl_se])
    return _marked(tiles, table)


def _marked(tiles: list[Tile], table: dict[str, Column]) -> list[Tile]:
    marks = zip(tiles, table["selected"].tolist(), table["chance"].tolist(), strict=True)
    return [replace(tile, selected=selected, chance=chance) for tile, selected, chance in marks]


def by_chance(count: int) -> float:
    """Return the 95% quantile of the maximum of `count` standard normals: influences above it, in standard errors, are more than chance."""
    return NormalDist().inv_cdf(0.95 ** (1 / count))


def gallery_csv(opened: Opened, selection: Selection) -> bytes:
    """Table of all examples of a selection, in its order: the columns of `memorization.parquet`, and `class` if there are labels."""
    rows = select(opened.memorization, opened.scores.names, opened.lower_files, selection)
    columns: dict[str, Any] = {name: values[rows] for name, values in opened.memorization.items()}
    return csv(columns | _classes(opened, opened.scores.train_labels[rows]))


def influenced_csv(opened: Opened, train: int) -> bytes:
    """Table of a training example's page.

    The first row is the training example: `tr_idx`, `class`, the columns of `memorization.parquet`, `p_in_se` and `p_out_se`. The others
    are test examples: `tt_idx`, `class`, `infl`, `infl_se`, and `selected`, whether they are in a selected pair with it. All have a
    `filename` if the dataset has file names. Where only scores are recorded, columns are named as in the published files.
    """
    own: dict[str, Any] = {"tr_idx": [train]} | _classes(opened, opened.scores.train_labels[[train]])
    own |= {name: values[[train]] for name, values in opened.memorization.items() if name not in ("index", "label")}
    if not opened.scores.scores_only:
        own |= {f"{p}_se": standard_error(own[p], own[k]) for p, k in (("p_in", "k_in"), ("p_out", "k_out"))}
    table = _joined(influenced(opened, train))
    columns: dict[str, Any] = {"tt_idx": table["tt_idx"]} | _classes(opened, opened.scores.test_labels[table["tt_idx"]])
    columns |= {name: table[name] for name in (opened.scores.names.infl, opened.scores.names.infl_se, "selected")}
    if opened.test_files is not None:
        columns["filename"] = [opened.test_files[index] for index in table["tt_idx"]]
    return csv(own, columns)


def influencers_csv(opened: Opened, test: int) -> bytes:
    """Table of a test example's page.

    The first row is the test example: `tt_idx`, `class`, its accuracy `right` with standard error `right_se`, and the number of `models`.
    The others are training examples: `tr_idx`, `class`, `infl`, `infl_se`, `selected` as in `influenced_csv`, `mem`, `mem_se`. All have a
    `filename` if the dataset has file names. Where only scores are recorded, columns are named as in the published files, and `score` and
    `score_se` are in the place of `right` and `right_se`.
    """
    names, right = opened.scores.names, "score" if opened.scores.scores_only else "right"
    accuracy = accuracy_on(opened, test)
    own: dict[str, Any] = {"tt_idx": [test]} | _classes(opened, opened.scores.test_labels[[test]])
    own |= {right: [accuracy.value], f"{right}_se": [accuracy.se], "models": [accuracy.models]}
    if opened.test_files is not None:
        own["filename"] = [opened.test_files[test]]
    table = _joined(influencers(opened, test))
    columns: dict[str, Any] = {"tr_idx": table["tr_idx"]} | _classes(opened, opened.scores.train_labels[table["tr_idx"]])
    columns |= {name: table[name] for name in (names.infl, names.infl_se, "selected", names.mem)}
    columns[names.mem_se] = opened.memorization[names.mem_se][table["tr_idx"]]
    if opened.train_files is not None:
        columns["filename"] = [opened.train_files[index] for index in table["tr_idx"]]
    return csv(own, columns)


def csv(*tables: dict[str, Any]) -> bytes:
    """Encode tables below each other as CSV; cells of missing columns are empty."""
    buffer = io.BytesIO()
    write_csv(pa.concat_tables([pa.table(table) for table in tables], promote_options="default"), buffer)
    return buffer.getvalue()


def _tiles(opened: Opened, split: str, index: Column, labels: Column, value: Column, se: Column, files: Sequence[str] | None) -> list[Tile]:
    names = _names(opened, labels[index])
    rows = zip(index.tolist(), names, value.tolist(), se.tolist(), strict=True)
    return [Tile(split, i, name, score, score_se, None if files is None else files[i]) for i, name, score, score_se in rows]


def _names(opened: Opened, labels: Column) -> list[str | None]:
    return [opened.classes[label] if opened.scores.labelled else None for label in labels.tolist()]


def _classes(opened: Opened, labels: Column) -> dict[str, Any]:
    """The column `class` of a table, if there are labels."""
    return {"class": _names(opened, labels)} if opened.scores.labelled else {}


def _where(table: dict[str, Column], chosen: Column) -> dict[str, Column]:
    return {name: values[chosen] for name, values in table.items()}


def _joined(tables: tuple[dict[str, Column], dict[str, Column]]) -> dict[str, Column]:
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
