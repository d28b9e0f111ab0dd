"""Tables of texts, features or paths of images: CSV, JSON lines or Parquet files -> a prepared dataset."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import compute, csv, parquet
from pyarrow import json as json_lines

from memtail.datasets.dataset import Labels
from memtail.datasets.image_tree import ImageFiles, ImageTree
from memtail.datasets.prepared import OnProgress, check_labels, write_arrays
from memtail.datasets.sources import shortened
from memtail.datasets.text_dataset import encoded
from memtail.errors import DatasetError
from memtail.spec import TableColumns

_READERS = {
    ".csv": csv.read_csv,
    ".tsv": lambda path: csv.read_csv(path, parse_options=csv.ParseOptions(delimiter="\t")),
    ".jsonl": json_lines.read_json,
    ".json": json_lines.read_json,
    ".parquet": parquet.read_table,
}


@dataclass(frozen=True)
class Table:
    """A table as it is declared.

    Attributes:
        root: file of the training examples, or of both splits.
        test: file of the test examples, unless a column names the split or there are none.
        columns: the columns.
        max_train, max_test: use at most this many examples, evenly spaced.
    """

    root: Path
    test: Path | None
    columns: TableColumns
    max_train: int | None
    max_test: int | None

    def identity(self) -> list[Any]:
        """Return JSON values that change with the files and the options. Raises: DatasetError: a file is missing."""
        files = [_existing(path) for path in (self.root, self.test) if path is not None]
        stamps = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
        return [stamps, self.columns.model_dump(), [self.max_train, self.max_test]]


@dataclass(frozen=True)
class _Split:
    """One split: texts, paths or features [N, D], labels as they are in the table, and names, each if there are any."""

    examples: list[str] | npt.NDArray[np.float32]
    labels: list[Any] | None
    ids: list[str] | None


def prepare_table(table: Table, target: Path, unusable: Path, on_progress: OnProgress | None = None) -> Path:
    """Read a table and write the prepared dataset.

    Args:
        table: the declaration.
        target: the folder of all prepared datasets.
        unusable: is not written: every row must be usable.
        on_progress: is not called, since a table is read as a whole.

    Returns:
        The dataset's folder below `target`.

    Raises:
        DatasetError: a file cannot be read, a column is missing, or a value is missing or of another type.
    """
    del unusable, on_progress
    names, train, test = _read(table)
    classes, train_labels, test_labels = _labels(table, train, test)
    check_labels(train_labels, test_labels, len(classes))
    meta: dict[str, Any] = {"schema": 1, "kind": "text" if names is None else "features", "classes": classes}
    meta |= {"has_files": train.ids is not None} | ({} if names is None else {"features": names})
    splits = (("train", train, train_labels), ("test", test, test_labels))
    arrays = {f"{split}_{name}": array for split, content, labels in splits for name, array in _arrays(content, labels)}
    return write_arrays(meta, arrays, target)


def table_images(table: Table) -> ImageTree:
    """List the images of a table, whose paths are relative to its folder.

    Args:
        table: the declaration, with a column of paths.

    Raises:
        DatasetError: as of `prepare_table`; or images are missing.
    """
    _, train, test = _read(table)
    classes, *labels = _labels(table, train, test)
    splits, missing = [], []
    for split, numbers, path in zip((train, test), labels, (table.root, table.test or table.root), strict=True):
        files = list(split.examples)
        missing += [file for file in files if not (path.parent / file).is_file()]
        splits.append(ImageFiles(path.parent, files, numbers, split.ids))
    if missing:
        raise DatasetError(
            f"{table.root}: {len(missing)} files of column '{table.columns.image}' are missing: {shortened(missing)}: paths must be "
            f"relative to {table.root.parent}"
        )
    return ImageTree(table.root, classes, splits[0], splits[1])


def _arrays(split: _Split, labels: Labels) -> list[tuple[str, npt.NDArray[Any]]]:
    arrays: list[tuple[str, npt.NDArray[Any]]] = [("labels", labels)]
    if split.ids is not None:
        arrays.append(("files", np.array([name.encode() for name in split.ids], dtype=np.bytes_)))
    if isinstance(split.examples, np.ndarray):
        return [*arrays, ("features", split.examples)]
    return [*arrays, *encoded(split.examples).items()]


def _limited(rows: pa.Table, limit: int | None) -> pa.Table:
    count = len(rows)
    return rows if limit is None or limit >= count else rows.take(np.arange(limit) * count // limit)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DatasetError(f"dataset 'table': there is no file {path}: give dataset.root and dataset.test the paths of files")
    return path


def _read(table: Table) -> tuple[list[str] | None, _Split, _Split]:
    """Read both splits; also the names of the features, None for texts."""
    columns, train = table.columns, _table(table.root)
    if table.test is not None:
        test = _table(table.test)
    elif columns.split is None:
        test = train.slice(0, 0)
    else:
        split = _column(train, columns.split, table.root).cast(pa.string())
        known = [compute.equal(split, name) for name in ("train", "test")]
        other = sorted(set(split.unique().to_pylist()) - {"train", "test"}, key=str)
        if other:
            raise DatasetError(f"{table.root}: column {columns.split} holds {other[0]!r}: its values must be 'train' and 'test'")
        train, test = train.filter(known[0]), train.filter(known[1])
    if not len(test) and (table.test or columns.split):
        raise DatasetError(f"{table.test or table.root}: has no test example: leave out dataset.test and columns.split if there are none")
    names = _features(columns, train)
    limits = (table.max_train, table.max_test)
    paths = (table.root, table.test or table.root)
    splits = [_split(_limited(rows, limit), columns, names, path) for rows, limit, path in zip((train, test), limits, paths, strict=True)]
    return names, splits[0], splits[1]


def _table(path: Path) -> pa.Table:
    reader = _READERS.get(_existing(path).suffix.lower())
    if reader is None:
        raise DatasetError(f"{path}: is no table that memtail reads: give a file whose name ends in {', '.join(_READERS)}")
    try:
        return reader(path)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read as {path.suffix[1:]} ({' '.join(str(error).split())[:200]}): fix the file") from None


def _column(table: pa.Table, name: str, path: Path) -> pa.ChunkedArray:
    if name not in table.column_names:
        raise DatasetError(f"{path}: has no column '{name}', there are {', '.join(table.column_names)}: fix dataset.columns")
    column = table.column(name)
    if pa.types.is_binary(column.type):  # pyarrow's type of texts that it cannot decode
        raise DatasetError(f"{path}: column '{name}' is not UTF-8: convert the file, as by iconv -f latin1 -t utf-8")
    missing = compute.is_null(column)
    if pa.types.is_string(column.type) and path.suffix.lower() in (".csv", ".tsv"):
        missing = compute.or_kleene(missing, compute.equal(column, ""))
    if count := compute.sum(missing).as_py():
        row = compute.index(missing, True).as_py()
        raise DatasetError(f"{path}: column '{name}' has no value in {count} rows, first in row {row}: fill or drop them")
    return column


def _features(columns: TableColumns, table: pa.Table) -> list[str] | None:
    if columns.features is None:
        return None
    if columns.features == "all":
        return [name for name in table.column_names if name not in (columns.label, columns.id, columns.split)]
    return columns.features


def _split(table: pa.Table, columns: TableColumns, names: list[str] | None, path: Path) -> _Split:
    labels = None if columns.label is None else _column(table, columns.label, path).to_pylist()
    ids = None if columns.id is None else [str(value) for value in _column(table, columns.id, path).to_pylist()]
    if names is None:
        name, what = (columns.text, "texts") if columns.text is not None else (columns.image or "", "paths of images")
        column = _column(table, name, path)
        if not pa.types.is_string(column.type) and not pa.types.is_large_string(column.type):
            raise DatasetError(f"{path}: column '{name}' is {column.type}, not text: name the column of the {what}")
        return _Split(column.to_pylist(), labels, ids)
    vectors = []
    for name in names:
        column = _column(table, name, path)
        try:
            vectors.append(column.cast(pa.float32()).to_numpy())
        except pa.ArrowException:
            raise DatasetError(
                f"{path}: column '{name}' is {column.type}, and features are numbers: leave it out of "
                "dataset.columns.features, or encode it"
            ) from None
    features = np.stack(vectors, axis=1) if vectors else np.empty((len(table), 0), np.float32)
    if not np.isfinite(features).all():
        row, place = (int(part) for part in np.argwhere(~np.isfinite(features))[0])
        raise DatasetError(f"{path}: column '{names[place]}' is {features[row, place]} in row {row}: features must be finite")
    return _Split(features, labels, ids)


def _labels(table: Table, train_split: _Split, test_split: _Split) -> tuple[list[str], Labels, Labels]:
    """Number the classes in the sorted order of the training labels; without labels there are no classes, and all labels are 0."""
    if train_split.labels is None or test_split.labels is None:
        return [], np.zeros(len(train_split.examples), np.int64), np.zeros(len(test_split.examples), np.int64)
    train, test = train_split.labels, test_split.labels
    for path, labels in ((table.root, train), (table.test or table.root, test)):
        for label in labels:
            if not isinstance(label, str | int) and not (isinstance(label, float) and label.is_integer()):
                raise DatasetError(f"{path}: column '{table.columns.label}' holds {label!r}: labels are texts or whole numbers")
    train, test = ([int(label) if isinstance(label, float) else label for label in labels] for labels in (train, test))
    classes = sorted(set(train), key=lambda label: (isinstance(label, str), label))
    places = {label: place for place, label in enumerate(classes)}
    if unknown := [label for label in test if label not in places]:
        raise DatasetError(f"{table.test or table.root}: label {unknown[0]!r} of a test example is that of no training example")
    numbers = [np.array([places[label] for label in labels], dtype=np.int64) for labels in (train, test)]
    return [str(label) for label in classes], numbers[0], numbers[1]
