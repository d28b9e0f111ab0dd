"""Datasets that the built-in trainer takes: images and features."""

from memtail.datasets.dataset import Dataset
from memtail.datasets.feature_dataset import FeatureDataset
from memtail.datasets.image_dataset import ImageDataset
from memtail.errors import DatasetError

Trainable = ImageDataset | FeatureDataset


def as_trainable(dataset: Dataset) -> Trainable:
    """Return a dataset that the built-in trainer is to train.

    Raises:
        DatasetError: its examples are of another kind, or have no labels.
    """
    if isinstance(dataset, Trainable):
        if not dataset.labelled:
            raise DatasetError(
                "the built-in trainer needs labels, and the dataset has none: train it with a function or a command (key trainer)"
            )
        return dataset
    raise DatasetError(
        f"the built-in trainer takes images and features, and the dataset holds {dataset.kind}: train it with a function or a command "
        "(key trainer)"
    )
