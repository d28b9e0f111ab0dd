"""Checks that the built-in trainer can train an experiment on its dataset. Imports no torch."""

from memtail.datasets import Dataset, FeatureDataset, Trainable, as_trainable
from memtail.errors import SpecError
from memtail.spec import Experiment, Mlp


def trainable(experiment: Experiment, dataset: Dataset) -> Trainable:
    """Return the dataset of an experiment of the built-in trainer.

    Args:
        experiment: the declaration.
        dataset: its dataset.

    Raises:
        DatasetError: the built-in trainer takes no such examples.
        SpecError: the dataset holds features, and model or augmentation are for images.
    """
    checked = as_trainable(dataset)
    if isinstance(checked, FeatureDataset):
        augmentation, model = experiment.training.augmentation, experiment.model
        if augmentation:
            steps = ", ".join(step.name for step in augmentation)
            raise SpecError(f"training.augmentation: '{steps}' is for images, and the dataset holds features: set it to none")
        if not isinstance(model, Mlp) and ":" not in model.name:
            raise SpecError(
                f"model.name: '{model.name}' takes images, and the dataset holds features: use mlp, or a network of your own "
                f"(package.module:function), which gets float32 [B, {checked.input_shape[0]}]"
            )
    return checked
