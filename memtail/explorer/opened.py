"""One experiment with one version of its scores in memory, as the pages need it."""

from dataclasses import dataclass
from functools import cached_property

from memtail.datasets import Dataset
from memtail.experiment_store import Record
from memtail.scores.reader import Column, Scores


@dataclass(frozen=True, eq=False)
class Opened:
    """An experiment, one version of its scores, and its images.

    Attributes:
        record: the experiment.
        scores: the version of the scores.
        dataset: the images and the names of classes and files; None if neither the cache nor the store has them.
        missing: the reason why `dataset` is None.
    """

    record: Record
    scores: Scores
    dataset: Dataset | None
    missing: str

    @property
    def name(self) -> str:
        """Name of the experiment."""
        return self.record.experiment.name

    @property
    def version(self) -> str:
        """Version of the scores."""
        return self.scores.folder.name

    @property
    def memorization(self) -> dict[str, Column]:
        """Columns of the published table."""
        return self.scores.memorization

    @cached_property
    def classes(self) -> list[str]:
        """Names of the classes; none if there are no labels."""
        if self.dataset is not None:
            return list(self.dataset.classes)
        if not self.scores.labelled:
            return []
        last = max(int(labels.max(initial=0)) for labels in (self.scores.train_labels, self.scores.test_labels))
        return [f"class {label}" for label in range(last + 1)]

    @property
    def size(self) -> int:
        """Bytes of the statistics, of memorization by epoch, and of the selected pairs."""
        packed = self.scores.statistics
        outcomes = (packed.test_correct, packed.test_score, packed.train_score)
        tables = (self.scores.snapshots or {}, self.scores.selected_pairs or {})
        of_tables = sum(column.nbytes for table in tables for column in table.values())
        return packed.membership.nbytes + sum(words.nbytes for words in outcomes if words is not None) + of_tables

    @cached_property
    def train_files(self) -> list[str] | None:
        """File names of the training images; None if the dataset has none."""
        return self.memorization["filename"].tolist() if "filename" in self.memorization else None

    @cached_property
    def test_files(self) -> list[str] | None:
        """File names of the test images; None if the dataset has none."""
        if self.dataset is None or self.dataset.test_files is None:
            return None
        return [name.decode(errors="replace") for name in self.dataset.test_files.tolist()]

    @cached_property
    def lower_files(self) -> list[str] | None:
        """`train_files` in lower case, for searches."""
        return None if self.train_files is None else [name.lower() for name in self.train_files]
