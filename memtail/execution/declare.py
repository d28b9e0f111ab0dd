"""`declare`: an experiment and its dataset -> the record under which a store holds it. Imports no torch."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import structlog

from memtail.datasets import Dataset, open_dataset
from memtail.errors import SpecError
from memtail.experiment_store import Record
from memtail.settings import Settings
from memtail.spec import Experiment, ImagesTrainer
from memtail.subsets import check_trials
from memtail.trainers.inputs import trainable
from memtail.trainers.process import TrainerProcess

log = structlog.get_logger()

# Trials in a shard of a function or a command.
_USER_SHARD = 16


def declare(experiment: Experiment, dataset: Dataset, trials_per_shard: int) -> Record:
    """Make the record of an experiment, after checking that its subset design fits the dataset and that it is not too large.

    Args:
        experiment: the declaration.
        dataset: its dataset.
        trials_per_shard: number of trials in a shard.

    Raises:
        DatasetError: the built-in trainer takes no such examples.
        SpecError: the subset design, or the recipe of the built-in trainer, does not fit the dataset.
        UnsupportedError: the experiment has more trials or shards than `memtail.settings.Limits` allow.
    """
    if isinstance(experiment.trainer, ImagesTrainer):
        trainable(experiment, dataset)
    record = Record(
        experiment=experiment,
        fingerprint=experiment.fingerprint(dataset.fingerprint),
        canonical=experiment.canonical(dataset.fingerprint),
        n_train=dataset.n_train,
        n_test=dataset.n_test,
        trials_per_shard=trials_per_shard,
    )
    record.check_limits()
    check_trials(experiment.subsets, dataset.train_labels)
    check_pairs(experiment, dataset.n_test)
    return record


def check_pairs(experiment: Experiment, n_test: int) -> None:
    """Refuse a bound on pairs without test examples.

    Args:
        experiment: the declaration.
        n_test: number of test examples of its dataset.

    Raises:
        SpecError: `subsets.until.pairs` is declared, and there is no test set.
    """
    until = experiment.subsets.until
    if until is not None and until.pairs is not None and not n_test:
        raise SpecError(
            f"subsets.until.pairs: the dataset of experiment '{experiment.name}' has no test set, so there are no pairs: "
            "use standard_error, interval_width or ranking"
        )


def user_shard_size(experiment: Experiment, devices: int = 1) -> int | None:
    """Return the number of trials in a shard of a function or a command, None for the built-in trainer.

    The cost of a trial is unknown. Finished trials of an interrupted shard are kept, so that a large shard loses little.

    Args:
        experiment: the declaration.
        devices: number of devices, none of which is to be idle.
    """
    if isinstance(experiment.trainer, ImagesTrainer):
        return None
    declared = experiment.execution.trials_per_shard
    return min(_USER_SHARD, -(-experiment.subsets.trials // devices)) if declared == "auto" else declared


def network_shard_size(experiment: Experiment, dataset: Dataset, store: str, devices: list[str] | None) -> int | None:
    """Check a network of the user's own and return the number of trials in a shard, in a trainer process; None for those of memtail.

    Args:
        experiment: the declaration.
        dataset: its dataset.
        store: address of the store; if it is a folder, user code has no access to it.
        devices: devices to train on; those of this machine by default.

    Raises:
        SpecError: the network cannot be built for the dataset.
    """
    return _check_network(experiment, dataset, store, devices, count=False)[0] if experiment.runs_user_code else None


def network_operations(experiment: Experiment, dataset: Dataset, store: str) -> float | None:
    """Return the operations of a trial, as `operations_per_trial` does, of a network of the user's own; as `network_shard_size`."""
    return _check_network(experiment, dataset, store, None, count=True)[1] if experiment.runs_user_code else None


def _check_network(experiment: Experiment, dataset: Dataset, store: str, devices: list[str] | None, count: bool) -> tuple[int, float]:
    return TrainerProcess("cpu").check(experiment, dataset, Settings().code or Path.cwd(), store, devices, count)


def shard_size_in_child(experiment: Experiment, dataset: Dataset, store: str) -> int:
    """Check the model and return the number of trials in a shard, in a child process that imports torch and the user's model.

    Without torch the model is not checked, and the number must be declared.

    Args:
        experiment: the declaration.
        dataset: its dataset.
        store: address of the store.

    Raises:
        SpecError: the model cannot be built for the dataset; or the number is `auto`, and torch is not installed.
    """
    if size := user_shard_size(experiment):
        return size
    if find_spec("torch") is not None:
        device = experiment.execution.device
        # a named device belongs to the workers and may be missing here
        devices = None if device == "auto" else [device]
        if size := network_shard_size(experiment, dataset, store, devices):
            return size
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as child:
            return child.submit(_check, experiment, dataset.folder, devices).result()
    declared = experiment.execution.trials_per_shard
    if declared == "auto":
        raise SpecError(
            f"execution.trials_per_shard of experiment '{experiment.name}' is auto, and torch is not installed here to choose it: "
            f"set it to a number, or pip install 'memtail[train]'"
        )
    log.warning("model not checked: torch is not installed here", model=experiment.model.name)
    return declared


def _check(experiment: Experiment, folder: Path, devices: list[str] | None) -> int:
    import torch

    from memtail.trainers.images.shard_size import checked_shard_size

    return checked_shard_size(experiment, open_dataset(folder), None if devices is None else [torch.device(device) for device in devices])
