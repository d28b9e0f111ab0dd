"""How many trials make a shard: enough to pay for starting it, few enough to lose little when one is lost."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from memtail.datasets import ImageDataset
from memtail.models import build_model, check_model
from memtail.spec import Experiment
from memtail.trainers.images.devices import available_devices

# Floating-point operations worth one shard: about half a minute of a processor core, or of a GPU.
_SHARD_OPERATIONS = {"cpu": 1e12, "mps": 1e14, "cuda": 1e15}
_MOST_TRIALS = 64


def checked_shard_size(experiment: Experiment, dataset: ImageDataset, devices: list[torch.device] | None = None) -> int:
    """Check that the model can be built for the dataset, and return the number of trials in a shard.

    Args:
        experiment: the declaration.
        dataset: its dataset.
        devices: devices to train on; by default this machine's.

    Raises:
        SpecError: the model cannot be built for the dataset, or the device is not here.
    """
    check_model(experiment.model, dataset.image_shape, len(dataset.classes))
    return trials_per_shard(experiment, dataset, devices or available_devices(experiment.execution.device))


def trials_per_shard(experiment: Experiment, dataset: ImageDataset, devices: list[torch.device]) -> int:
    """The declared number, or one chosen by the cost of a trial; never so many that a device would stay idle."""
    if experiment.execution.trials_per_shard != "auto":
        return experiment.execution.trials_per_shard
    affordable = _SHARD_OPERATIONS[devices[0].type] / operations_per_trial(experiment, dataset)
    share = -(-experiment.subsets.trials // len(devices))
    return max(1, min(int(affordable), _MOST_TRIALS, share))


def operations_per_trial(experiment: Experiment, dataset: ImageDataset) -> float:
    """Floating-point operations of one trial: three forward passes' worth per image trained on, one per image evaluated."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), FlopCounterMode(display=False) as counter:
        build_model(experiment.model, dataset.image_shape, len(dataset.classes)).eval()(torch.zeros(1, *dataset.image_shape))
    trained = experiment.subsets.fraction * dataset.n_train * experiment.training.epochs
    return float(counter.get_total_flops()) * (3 * trained + dataset.n_train + dataset.n_test)
