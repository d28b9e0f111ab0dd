"""Chooses the trials per shard: enough to outweigh its start-up, few enough to lose little with a shard."""

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

from memtail.datasets import Dataset
from memtail.models import check_model
from memtail.spec import Experiment
from memtail.trainers.images.devices import available_devices
from memtail.trainers.images.stack import is_stackable
from memtail.trainers.inputs import trainable

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

# Floating-point operations of one shard: about half a minute of a processor core, or of a GPU.
_SHARD_OPERATIONS = {"cpu": 1e12, "mps": 1e14, "cuda": 5e15}
_MOST_TRIALS = 64
# On CUDA, of networks that are trained stacked: two stacks of the largest width.
_MOST_STACKED = 1024
# Operations of a trial from which on its network is compiled on CUDA: 500 trials then take ten minutes of a GPU.
_COMPILED_OPERATIONS = 20 * _SHARD_OPERATIONS["cuda"] / 500


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


def is_compiled(experiment: Experiment, network: nn.Module, input_shape: tuple[int, ...], n_train: int, n_test: int) -> bool:
    """Return whether a built-in network is compiled on CUDA, where that does not fail.

    `execution.compile: auto` compiles it if 500 trials, the fewest whose scores are not marked as few, take more than ten minutes of a GPU
    by their floating-point operations: compiling takes one or two minutes in each process. It does not ask for the declared number of
    trials, since compiled networks round otherwise, and no bit of a trial may depend on the number.

    Args:
        experiment: the declaration.
        network: the network.
        input_shape: of an example, (C, H, W) or (D,).
        n_train: training examples.
        n_test: test examples.
    """
    declared = experiment.execution.compile
    if declared != "auto":
        return declared
    key = experiment.model.model_dump_json(), input_shape, sum(parameter.numel() for parameter in network.parameters())
    if key not in _forward_operations:
        counter, counted = _counter(), copy.deepcopy(network).to("meta").eval()
        with counter, torch.no_grad():
            counted(torch.empty(1, *input_shape, device="meta"))
        _forward_operations[key] = counter.get_total_flops()
    return is_long(_of_trial(experiment, _forward_operations[key], n_train, n_test))


def is_long(operations: float) -> bool:
    """Return whether trials of so many operations take so long that `execution.compile: auto` compiles the network on CUDA."""
    return operations >= _COMPILED_OPERATIONS


# Of an example, by model, shape of the example and number of parameters: it is asked for with each stack.
_forward_operations: dict[tuple[str, tuple[int, ...], int], int] = {}


def _checked_network(experiment: Experiment, dataset: Dataset) -> tuple[nn.Module, float]:
    """Return the network, and the operations of a trial."""
    counter = _counter()
    network = check_model(experiment.model, trainable(experiment, dataset).input_shape, len(dataset.classes), within=counter)
    return network, _of_trial(experiment, counter.get_total_flops(), dataset.n_train, dataset.n_test)


def _of_trial(experiment: Experiment, forward: int, n_train: int, n_test: int) -> float:
    """Return the operations of a trial, given those of the forward pass of an example."""
    trained = experiment.subsets.fraction * n_train * experiment.training.epochs
    return float(forward) * (3 * trained + n_train + n_test)


def _counter() -> "FlopCounterMode":
    from torch.utils.flop_counter import FlopCounterMode  # takes a fifth of a second

    return FlopCounterMode(display=False)
