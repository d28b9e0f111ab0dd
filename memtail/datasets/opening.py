"""`open_dataset`: a prepared folder -> the dataset of its kind."""

import json
from pathlib import Path

from memtail.datasets.dataset import Dataset, checked
from memtail.datasets.feature_dataset import FeatureDataset
from memtail.datasets.image_dataset import ImageDataset
from memtail.datasets.opaque_dataset import OpaqueDataset
from memtail.datasets.text_dataset import TextDataset
from memtail.errors import DatasetError

_KINDS: dict[str, type[Dataset]] = {kind.kind: kind for kind in (ImageDataset, TextDataset, FeatureDataset, OpaqueDataset)}


def open_dataset(folder: Path) -> Dataset:
    """Open a prepared dataset.

    Args:
        folder: its folder.

    Raises:
        DatasetError: a file is missing or corrupt; or the examples are of a kind that a later version of memtail knows.
    """
    name = json.loads(checked(folder / "meta.json", Path.read_text)).get("kind", ImageDataset.kind)
    if name not in _KINDS:
        raise DatasetError(f"{folder}: holds {name}, which this version of memtail does not know: use the version that prepared it")
    return _KINDS[name].open(folder)
