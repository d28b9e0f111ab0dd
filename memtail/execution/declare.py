"""`declare`: an experiment and its dataset -> the record under which a store holds it. Imports no torch."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import structlog

from memtail.datasets import ImageDataset
from memtail.errors import SpecError
from memtail.experiment_store import Record
from memtail.spec import Experiment
from memtail.subsets import check_trials

log = structlog.get_logger()


def declare(experiment: Experiment, dataset: ImageDataset, trials_per_shard: int | None = None) -> Record:
    """Make the record of an experiment, after checking that its subset design fits the dataset.

    Args:
        experiment: the declaration.
        dataset: its dataset.
        trials_per_shard: number of trials in a shard; by default the declared one.

    Raises:
        SpecError: the subset design does not fit the dataset, or no number of trials is given and the declared one is `auto`.
    """
    check_trials(experiment.subsets, dataset.train_labels)
    size = trials_per_shard or experiment.execution.trials_per_shard
    if size == "auto":
        raise SpecError(
            f"execution.trials_per_shard of experiment '{experiment.name}' is auto, and torch is not installed here to choose it: "
            f"set it to a number, or pip install 'memtail[train]'"
        )
    return Record(
        experiment=experiment,
        fingerprint=experiment.fingerprint(dataset.fingerprint),
        canonical=experiment.canonical(dataset.fingerprint),
        n_train=dataset.n_train,
        n_test=dataset.n_test,
        trials_per_shard=size,
    )


def check_in_child(experiment: Experiment, dataset: ImageDataset) -> int | None:
    """Check the model and choose the number of trials in a shard, in a child process that imports torch and the user's model.

    Returns:
        The number of trials in a shard for the declared device; None, and a warning, without torch.

    Raises:
        SpecError: the model cannot be built for the dataset.
    """
    if find_spec("torch") is None:
        log.warning("model not checked: torch is not installed here", model=getattr(experiment.model, "name", None))
        return None
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as child:
        return child.submit(_check, experiment, dataset.folder).result()


def _check(experiment: Experiment, folder: Path) -> int:
    import torch

    from memtail.trainers.images.shard_size import checked_shard_size

    device = experiment.execution.device
    # a named device is the workers' and need not be here
    return checked_shard_size(experiment, ImageDataset.open(folder), None if device == "auto" else [torch.device(device)])
