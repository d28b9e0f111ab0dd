"""Reads published scores: the tables, and any influence, computed from the packed statistics on demand."""

import json
import operator
import textwrap
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from memtail.errors import ScoresError
from memtail.scores.names import (
    INDEX,
    INFLUENCE_MATRIX,
    MEMORIZATION,
    OUTCOMES,
    PAIRS_TABLE,
    SELECTED_PAIRS,
    SNAPSHOTS,
    STATISTICS,
    SUMMARY,
)
from memtail.scores.summary import ScoreSummary

if TYPE_CHECKING:
    import pandas as pd

    from memtail.estimators import Influence
    from memtail.estimators.soft import SoftInfluence
    from memtail.statistics.accumulator import PackedTrials

Column = npt.NDArray[Any]
_TABLES = ("memorization", "pairs", "selected_pairs", "snapshots")
Choice = int | slice | list[int] | npt.NDArray[np.integer | np.bool_] | None


class Scores:
    """One version of the scores; each file is read when it is first needed.

    Args:
        folder: with the version's files.

    Attributes:
        folder: with the version's files.
        summary: the content of `summary.json`; `summary.few_trials` warns of few trials, and is None if there are enough.
        names: names of the columns of estimates: of correctness, or of scores where only those are recorded.

    Raises:
        ScoresError: a file is missing or damaged; from the constructor, and from every other member.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with self._reading(SUMMARY):
            self.summary = ScoreSummary.from_dict(json.loads((folder / SUMMARY).read_text()))
        self.names = self.summary.names

    def __repr__(self) -> str:
        few = f", {self.summary.few_trials_mark}" if self.summary.few_trials else ""
        return f"<Scores of '{self.summary.experiment}': {self.summary.trials} trials{few}>"

    @cached_property
    def memorization(self) -> dict[str, Column]:
        """The columns of `memorization.parquet`, each [n] in original order."""
        return self._table(MEMORIZATION)

    @property
    def mem_lo(self) -> npt.NDArray[np.float64]:
        """float64 [n], the lower end of the 95% confidence interval of memorization; NaN where there is no estimate."""
        return self._interval[0]

    @property
    def mem_hi(self) -> npt.NDArray[np.float64]:
        """float64 [n], its upper end."""
        return self._interval[1]

    @cached_property
    def _interval(self) -> tuple[Column, Column]:
        table = self.memorization
        if "mem_lo" in table:
            return table["mem_lo"], table["mem_hi"]
        from memtail.estimators.binomial import difference_interval, normal_interval

        if self.scores_only:
            return normal_interval(table["mem_p"], table["mem_p_se"])
        return difference_interval(table["p_in"], table["k_in"], table["p_out"], table["k_out"])  # of score schema 1

    @cached_property
    def pairs(self) -> dict[str, Column]:
        """The columns of the table of high-influence pairs, with standard errors, by falling influence."""
        return self._table(PAIRS_TABLE)

    @cached_property
    def selected_pairs(self) -> dict[str, Column] | None:
        """The columns of `pairs.parquet`, pairs by falling adjusted influence; None in scores of a memtail that did not write it."""
        return self._table(SELECTED_PAIRS) if (self.folder / SELECTED_PAIRS).exists() else None

    @cached_property
    def snapshots(self) -> dict[str, Column] | None:
        """The columns of `snapshots.parquet`, memorization by epoch, ascending; None if no outcomes by epoch are published."""
        return self._table(SNAPSHOTS) if (self.folder / SNAPSHOTS).exists() else None

    def to_pandas(self, table: Literal["memorization", "pairs", "selected_pairs", "snapshots"]) -> "pd.DataFrame":
        """Return a table as a pandas frame; an empty one if it is not published. Raises: ScoresError: there is no such table."""
        _check("table", table, _TABLES)
        import pandas as pd

        return pd.DataFrame(getattr(self, table))

    @cached_property
    def statistics(self) -> "PackedTrials":
        """The packed statistics of the trials that count."""
        from memtail.statistics.accumulator import PackedTrials

        with self._reading_archive(STATISTICS) as archive:
            return PackedTrials(**{"train_correct": None, "test_correct": None, **archive})

    @property
    def scores_only(self) -> bool:
        """Whether only scores are recorded, so that all estimates are of scores: `mem_p` and `infl_p`."""
        return self.summary.outcome == "score"

    @property
    def labelled(self) -> bool:
        """Whether the examples have labels."""
        return "label" in self.memorization

    @property
    def train_labels(self) -> npt.NDArray[np.int64]:
        """int64 [n], the labels of the training examples; all 0 if they have none."""
        return self.memorization["label"] if self.labelled else np.zeros(self.summary.n_train, np.int64)

    @cached_property
    def test_labels(self) -> npt.NDArray[np.int64]:
        """int64 [q], the labels of the test examples; all 0 if they have none."""
        if not self.labelled:
            return np.zeros(self.summary.n_test, np.int64)
        with self._reading_archive(INDEX if self.scores_only else INFLUENCE_MATRIX) as archive:
            labels: npt.NDArray[np.int64] = archive["tt_labels"]
            return labels

    def influence(self, train: Choice = None, test: Choice = None, *, on: Literal["test", "train"] = "test") -> "Influence":
        """Estimate influences of training examples (rows) on test examples (columns), with standard errors.

        Args:
            train: index, indices or mask of training examples; None for all.
            test: those of test examples, or of training examples with `on="train"`; None for all. The whole matrix takes 16 n q bytes, so
                compute it in blocks.
            on: "train" for the influence of training examples on training examples.

        Returns:
            `value` and `standard_error`, float64 [a, b].

        Raises:
            ScoresError: an index is no index or out of range, or only scores are recorded.
        """
        from memtail.estimators import influence

        _check("on", on, ("test", "train"))

        if self.scores_only:
            raise ScoresError(f"{self.folder}: only scores are recorded, and no correctness: use soft_influence")
        columns = self.statistics.n_test if on == "test" else self.statistics.n_train
        return influence(self.statistics, _indices(train, self.statistics.n_train, "train"), _indices(test, columns, on), on)

    def soft_influence(self, train: Choice = None, test: Choice = None) -> "SoftInfluence":
        """Estimate influences of training examples (rows) on the scores of test examples (columns), with standard errors.

        Args:
            train: index, indices or mask of training examples; None for all.
            test: those of test examples; None for all.

        Returns:
            `value` and `standard_error`, float64 [a, b].

        Raises:
            ScoresError: an index is no index or out of range, or not all trials have recorded scores.
        """
        from memtail.estimators.soft import soft_influence

        packed = self.statistics
        block = soft_influence(packed, _indices(train, packed.n_train, "train"), _indices(test, packed.n_test, "test"))
        if block is None:
            raise ScoresError(
                f"{self.folder}: not all trials have recorded scores: declare record: {{scores: true}} from the first trial on"
            )
        return block

    def most_memorized(self, k: int = 10) -> dict[str, Column]:
        """Return the rows of the k most memorized training examples, falling; by `mem_p` where only scores are recorded.

        Raises:
            ScoresError: k is no number of rows.
        """
        rows = largest(self.memorization[self.names.mem], _count(k))
        return {name: values[rows] for name, values in self.memorization.items()}

    def strongest_pairs(self, k: int = 10) -> dict[str, Column]:
        """Return the rows of k selected pairs: confirmed pairs first, then the others, both by falling influence.

        Of scores of a memtail that did not select pairs, the k pairs of highest influence by the thresholds of the paper.

        Returns:
            Columns `tr_idx`, `tt_idx`, `label` if there are labels, the others of the table but `z`, and `tr_filename` and `tt_filename` if
            the dataset has file names.

        Raises:
            ScoresError: k is no number of rows.
        """
        k = _count(k)
        if self.selected_pairs is None:
            pairs = {name: values[:k] for name, values in self.pairs.items()}
        else:
            rows = np.lexsort((-self.selected_pairs[self.names.infl], ~self.selected_pairs["confirmed"]))[:k]
            pairs = {name: values[rows] for name, values in self.selected_pairs.items() if name != "z"}
        train, test = pairs.pop("tr_idx"), pairs.pop("tt_idx")
        files = {f"{split}_filename": names[rows] for (split, names), rows in zip(self._files.items(), (train, test), strict=False)}
        return {"tr_idx": train, "tt_idx": test, **self._labels(self.train_labels, train), **pairs, **files}

    def top_influencers(self, test: int, k: int = 10, *, harmful: bool = False) -> dict[str, Column]:
        """Find the k training examples with the largest influence on one test example.

        Args:
            test: index of the test example.
            k: at most this many.
            harmful: find those with the smallest influence instead, ascending.

        Returns:
            Columns `tr_idx`, `label` if there are labels, `infl`, `infl_se` and `mem`; `infl_p`, `infl_p_se` and `mem_p` where only scores
            are recorded.

        Raises:
            ScoresError: the index is no index or out of range, or k is no number of rows.
        """
        block = self.estimated(test=_one(test, "test"))
        top = largest(-block.value[:, 0] if harmful else block.value[:, 0], _count(k))
        return {
            "tr_idx": top,
            **self._labels(self.train_labels, top),
            self.names.infl: block.value[top, 0],
            self.names.infl_se: block.standard_error_at(top, np.zeros_like(top)),
            self.names.mem: self.memorization[self.names.mem][top],
        }

    def top_influenced(self, train: int, k: int = 10, *, harmed: bool = False) -> dict[str, Column]:
        """Find the k test examples on which one training example has the largest influence.

        Args:
            train: index of the training example.
            k: at most this many.
            harmed: find those with the smallest influence instead, ascending.

        Returns:
            Columns `tt_idx`, `label` if there are labels, `infl` and `infl_se`; `infl_p` and `infl_p_se` where only scores are recorded.

        Raises:
            ScoresError: the index is no index or out of range, or k is no number of rows.
        """
        block = self.estimated(train=_one(train, "train"))
        top = largest(-block.value[0] if harmed else block.value[0], _count(k))
        return {
            "tt_idx": top,
            **self._labels(self.test_labels, top),
            self.names.infl: block.value[0, top],
            self.names.infl_se: block.standard_error_at(np.zeros_like(top), top),
        }

    def estimated(self, train: Choice = None, test: Choice = None) -> "Influence | SoftInfluence":
        """Estimate influences of training examples (rows) on test examples (columns): `soft_influence` where only scores are recorded.

        Raises:
            ScoresError: an index is no index or out of range.
        """
        return self.soft_influence(train, test) if self.scores_only else self.influence(train, test)

    @cached_property
    def _files(self) -> dict[str, Column]:
        """File names of the training examples, "tr", and of the test examples, "tt", objects [n] and [q]; empty if the dataset has none."""
        if not (self.folder / INDEX).exists():
            return {}
        with self._reading_archive(INDEX) as archive:
            names = {split: archive[f"{split}_filenames"].tolist() for split in ("tr", "tt") if f"{split}_filenames" in archive}
        return {split: np.array([name.decode(errors="replace") for name in each], dtype=object) for split, each in names.items()}

    def _labels(self, labels: npt.NDArray[np.int64], index: npt.NDArray[np.int64]) -> dict[str, Column]:
        return {"label": labels[index]} if self.labelled else {}

    def _table(self, file: str) -> dict[str, Column]:
        import pyarrow.parquet

        with self._reading(file):
            table = pyarrow.parquet.ParquetFile(self.folder / file).read()
        columns = {name: _as_numpy(table[name].combine_chunks()) for name in table.column_names}
        return _SoftColumns(columns) if self.scores_only else columns

    @contextmanager
    def _reading(self, file: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise ScoresError(f"{self.folder / file}: is missing or damaged ({error}): run the experiment again") from None

    @contextmanager
    def _reading_archive(self, file: str) -> Iterator[Any]:
        # opened here, since numpy does not close a file that is not an archive
        with self._reading(file), (self.folder / file).open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
            yield archive


class _SoftColumns(dict[str, Column]):
    """Columns of estimates of scores, which say so when one of correctness is asked for."""

    def __missing__(self, name: str) -> Column:
        names = dict(zip(astuple(OUTCOMES["correct"]), astuple(OUTCOMES["score"]), strict=True))
        if name in names:
            raise ScoresError(f"there is no {name}: only scores are recorded, read {names[name]}")
        raise KeyError(name)


def _as_numpy(array: Any) -> Column:
    """Convert a column without pyarrow's `to_numpy`, which imports pandas: that takes longer than the rest of `memtail top`."""
    import pyarrow as pa

    if pa.types.is_primitive(array.type) and not pa.types.is_boolean(array.type):
        return np.array(np.from_dlpack(array))
    return np.array(array.to_pylist(), dtype=bool if pa.types.is_boolean(array.type) else object)


def largest(values: npt.NDArray[np.float64], k: int) -> npt.NDArray[np.int64]:
    """Return int64 [<= k], the indices of the k largest values, falling, ties by index, without NaN."""
    undefined = int(np.isnan(values).sum())
    k = min(k, len(values) - undefined)
    if k <= 0:
        return np.empty(0, np.int64)
    place = len(values) - undefined - k  # sorting puts NaN last
    candidates = np.flatnonzero(values >= np.partition(values, place)[place])
    return candidates[np.argsort(-values[candidates], kind="stable")][:k]


def _indices(choice: Choice, count: int, what: str) -> npt.NDArray[np.integer] | slice:
    if choice is None:
        return slice(None)
    if isinstance(choice, slice):
        return choice
    index = np.atleast_1d(np.asarray(choice))
    if index.dtype == np.bool_ and index.shape == (count,):
        return np.flatnonzero(index)
    if index.ndim > 1 or (index.size and not np.issubdtype(index.dtype, np.integer)):
        raise ScoresError(f"{what}: {_shown(choice)} is no index of {what} examples: give whole numbers, a slice or a mask of all {count}")
    outside = index[(index < -count) | (index >= count)]
    if len(outside):
        raise ScoresError(f"{what} index {int(outside[0])} is out of range: there are {count} {what} examples")
    return index.astype(np.int64) if not index.size else index


def _one(index: int, what: str) -> int:
    try:
        return operator.index(index)
    except TypeError:
        raise ScoresError(f"{what}: {_shown(index)} is no index of one {what} example: give a whole number") from None


def _count(k: int) -> int:
    try:
        count = operator.index(k)
    except TypeError:
        count = -1
    if count < 0:
        raise ScoresError(f"k: {_shown(k)} is no number of rows: give a whole number from 0 on")
    return count


def _check(what: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ScoresError(f"{what}: {_shown(value)} is none of {', '.join(known)}")


def _shown(value: object) -> str:
    """A value as Python writes it, on one line that is not long."""
    return textwrap.shorten(repr(value), 80, placeholder=" ...")
