"""Datasets in the formats of Hugging Face's package `datasets`: a folder on this machine, or a dataset of the hub.

The package runs no code of a dataset. Rows are read in order, a thousand at a time, so that memory is bounded.
"""

import hashlib
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from memtail.datasets.decoding import decode_bytes
from memtail.datasets.items import ItemError, ItemSplit, write_items
from memtail.datasets.prepared import OnProgress, Prepare
from memtail.errors import DatasetError
from memtail.spec import HuggingFaceDataset

# Rows that are read at once.
_ROWS = 1000


def huggingface_source(spec: HuggingFaceDataset) -> tuple[list[Any], Prepare]:
    """Find a dataset.

    Args:
        spec: the declaration.

    Returns:
        JSON values that change with the files and the options; and a function that writes the prepared dataset below a folder, and returns
        the dataset's folder.

    Raises:
        DatasetError: the package is not installed, or there is no such dataset.
        OSError: a folder cannot be read.
    """
    try:
        import datasets
    except ImportError:
        raise DatasetError(
            f"dataset '{spec.name}' is read by the package datasets, which is not installed: pip install 'memtail[hf]'"
        ) from None
    folder = Path(spec.huggingface)
    if folder.is_dir():
        digest = hashlib.sha256()
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                status = file.stat()
                digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
        version = digest.hexdigest()
    elif folder.is_absolute():
        raise DatasetError(f"dataset '{spec.name}': there is no folder {folder}: give the path of one, or the name of a dataset on the hub")
    else:
        version = _loaded(spec, lambda: datasets.load_dataset_builder(spec.huggingface, spec.config).hash)
    return ["huggingface", version, spec.model_dump(mode="json")], partial(_prepare, spec)


def _loaded(spec: HuggingFaceDataset, load: Callable[[], Any]) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        return load()
    except Exception as error:  # of networks, parsers and declarations
        text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        raise DatasetError(f"dataset '{spec.name}' cannot be loaded ({text}): fix the key that it names, or the dataset") from None


def _split(spec: HuggingFaceDataset, name: str) -> Any:
    """Return a split of the dataset."""
    import datasets

    folder = Path(spec.huggingface)
    if not any((folder / file).is_file() for file in ("dataset_dict.json", "state.json")):  # of save_to_disk
        return _loaded(spec, lambda: datasets.load_dataset(spec.huggingface, spec.config, split=name))
    held = _loaded(spec, lambda: datasets.load_from_disk(spec.huggingface))
    if not isinstance(held, datasets.DatasetDict):
        raise DatasetError(f"dataset '{spec.name}' holds one split without a name: save a DatasetDict with the splits train and test")
    if name not in held:
        raise DatasetError(f"dataset '{spec.name}' has no split '{name}', there are {', '.join(held)}: fix dataset.splits")
    return held[name]


def _prepare(spec: HuggingFaceDataset, target: Path, unusable: Path, on_progress: OnProgress | None) -> Path:
    """Write the prepared dataset; `unusable` is not written, since every row must be usable."""
    del unusable
    columns, splits, classes, features = spec.columns, {}, None, None
    for split, name, most in (("train", spec.splits.train, spec.max_train), ("test", spec.splits.test, spec.max_test)):
        if name is None:
            continue
        rows = _split(spec, name)
        if most is not None and most < len(rows):
            rows = rows.select(np.arange(most) * len(rows) // most)
        examples = _examples(spec, name, rows)
        names = () if columns.label is None else getattr(rows.features[columns.label], "names", None)
        if split == "test" and names != classes:
            raise DatasetError(
                f"dataset '{spec.name}': the splits have different classes in column '{columns.label}': cast both to one ClassLabel"
            )
        classes = names
        if split == "train" and columns.features is not None and len(rows):
            features = _feature_names(examples, rows[0])
        ids = None if columns.id is None else [str(value) for value in rows[columns.id]]
        splits[split] = ItemSplit(_Rows(rows, spec, examples), ids=ids)
    try:
        return write_items(
            spec.name,
            splits,
            target,
            labelled=columns.label is not None,
            classes=None if classes is None else tuple(classes),
            features=features,
            resolution=spec.resolution,
            on_progress=on_progress,
        )
    except ItemError as error:
        text = " ".join(f"{type(error.__cause__).__name__}: {error.__cause__}".split())
        raise DatasetError(f"dataset '{spec.name}': {error} cannot be read ({text}): fix it") from None


def _examples(spec: HuggingFaceDataset, split: str, rows: Any) -> list[str]:
    """Return the columns of the examples, after checking that there are all that are declared."""
    columns = spec.columns
    if columns.features == "all":
        examples = [name for name in rows.column_names if name not in (columns.label, columns.id)]
    else:
        examples = columns.features or [columns.text or columns.image or ""]
    for column in filter(None, (*examples, columns.label, columns.id)):
        if column not in rows.column_names:
            raise DatasetError(
                f"dataset '{spec.name}': split '{split}' has no column '{column}', there are {', '.join(rows.column_names)}: fix "
                f"dataset.columns"
            )
    if columns.image is not None and type(rows.features[columns.image]).__name__ != "Image":
        raise DatasetError(
            f"dataset '{spec.name}': column '{columns.image}' holds {rows.features[columns.image]}: name the column of the images, or cast "
            f"it to datasets.Image()"
        )
    return examples


def _feature_names(columns: list[str], row: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of the features: of a column, or of each place of a column of lists."""
    each = ([f"{name}[{place}]" for place in range(len(row[name]))] if isinstance(row[name], list) else [name] for name in columns)
    return tuple(chain.from_iterable(each))


class _Rows:
    """Pairs of an example and its label, or examples where there are no labels."""

    def __init__(self, rows: Any, spec: HuggingFaceDataset, examples: list[str]) -> None:
        import datasets

        if spec.columns.image is not None:
            rows = rows.cast_column(spec.columns.image, datasets.Image(decode=False))
        self._spec, self._examples = spec, examples
        self._columns = [*examples, *filter(None, [spec.columns.label])]
        self._rows = rows.select_columns(self._columns)
        self._start, self._held = 0, self._rows[:0]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        if not self._start <= index < self._start + len(self._held[self._examples[0]]):
            self._start, self._held = index, self._rows[index : index + _ROWS]
        values = [self._held[column][index - self._start] for column in self._columns]
        for column, value in zip(self._columns, values, strict=True):
            if value is None:
                raise ValueError(f"column '{column}' has no value")
        count = len(self._examples)
        example = self._example(values[:count])
        return example if self._spec.columns.label is None else (example, values[count])

    def _example(self, values: list[Any]) -> Any:
        if self._spec.columns.image is not None:
            data = values[0]["bytes"] if values[0]["bytes"] is not None else Path(values[0]["path"]).read_bytes()
            # as the package itself decodes images: turned as their EXIF orientation says
            return decode_bytes(data, self._spec.resolution, upright=True, keep_grey=True)
        if self._spec.columns.text is not None:
            return values[0]
        for column, value in zip(self._examples, values, strict=True):
            if np.asarray(value).dtype.kind not in "iufb":
                raise ValueError(f"column '{column}' holds {value!r}, and features are numbers")
        return np.concatenate([np.atleast_1d(value) for value in values])
