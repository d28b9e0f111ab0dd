"""Chooses the trials per shard: enough to outweigh its start-up, few enough to lose little with a shard."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from memtail.datasets import Dataset
from memtail.models import check_model
from memtail.spec import Experiment
from memtail.trainers.images.devices import available_devices
from memtail.trainers.images.stack import is_stackable
from memtail.trainers.inputs import trainable

# Floating-point operations of one shard: about half a minute of a processor core, or of a GPU.
_SHARD_OPERATIONS = {"cpu": 1e12, "mps": 1e14, "cuda": 5e15}
_MOST_TRIALS = 64
# On CUDA, of networks that are trained stacked: two stacks of the largest width.
_MOST_STACKED = 1024


def checked_shard_size(experiment: Experiment, dataset: Dataset, devices: list[torch.device] | None = None) -> int:
    """Check that the model fits the dataset, and return the number of trials in a shard.

    It is the declared number, or one chosen by the cost of a trial, such that no device is idle. The operations of a trial are counted in
    the forward pass that checks the model, so that one network is built for both.

    Args:
        experiment: the declaration.
        dataset: its dataset.
        devices: devices to train on; by default this machine's.

    Raises:
        SpecError: the model does not fit the dataset, or this machine has no such device.
        DatasetError: the dataset holds neither images nor features.
    """
    devices = devices or available_devices(experiment.execution.device)
    declared = experiment.execution.trials_per_shard
    if declared != "auto":
        check_model(experiment.model, trainable(experiment, dataset).input_shape, len(dataset.classes))
        return declared
    network, operations = _checked_network(experiment, dataset)
    affordable = _SHARD_OPERATIONS[devices[0].type] / operations
    most = _MOST_STACKED if devices[0].type == "cuda" and is_stackable(network) else _MOST_TRIALS
    share = -(-experiment.subsets.trials // len(devices))
    return max(1, min(int(affordable), most, share))


def operations_per_trial(experiment: Experiment, dataset: Dataset) -> float:
    """Return the floating-point operations of one trial: three forward passes per example trained on, one per example evaluated.

    Args:
        experiment: the declaration.
        dataset: its dataset.

    Raises:
        SpecError: the model does not fit the dataset.
        DatasetError: the dataset holds neither images nor features.
    """
    return _checked_network(experiment, dataset)[1]


def _checked_network(experiment: Experiment, dataset: Dataset) -> tuple[nn.Module, float]:
    """Return the network, and the operations of a trial."""
    counter = FlopCounterMode(display=False)
    network = check_model(experiment.model, trainable(experiment, dataset).input_shape, len(dataset.classes), within=counter)
    trained = experiment.subsets.fraction * dataset.n_train * experiment.training.epochs
    return network, float(counter.get_total_flops()) * (3 * trained + dataset.n_train + dataset.n_test)
