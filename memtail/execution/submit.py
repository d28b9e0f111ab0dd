"""Entering an experiment in a store, for the services to train: its dataset first, then what is wanted."""

from dataclasses import dataclass, replace

import torch

from memtail import datasets
from memtail.datasets import ImageDataset
from memtail.datasets.staged_dataset import stage, stage_masks
from memtail.execution.embedded import declare
from memtail.experiment_store import Control, ExperimentStore, Record
from memtail.spec import Experiment
from memtail.storage import ObjectStore, keys


@dataclass(frozen=True)
class Submission:
    """What a store holds after `submit`.

    Attributes:
        record: what is wanted.
        dataset: its fingerprint.
        staged: whether the dataset was put into the store now, and was not there.
        trials_before: how many trials were wanted before; None if the experiment is new.
        control: what is asked of it.
    """

    record: Record
    dataset: str
    staged: bool
    trials_before: int | None
    control: Control

    @property
    def shards(self) -> int:
        """How many shards all trials make."""
        return -(-self.record.experiment.subsets.trials // self.record.trials_per_shard)


def submit(experiment: Experiment, store: ObjectStore, *, dataset: ImageDataset | None = None, priority: int | None = None) -> Submission:
    """Enter an experiment, or find it entered; more trials extend it.

    Args:
        experiment: the declaration. Its device is the workers' and need not be on this machine.
        store: where the services look for work.
        dataset: the experiment's, if it is open already; by default it is prepared.
        priority: experiments with the highest are trained first; by default 0, or what it was.

    Raises:
        SpecError, DatasetError: bad input.
        StoreError: another experiment has the name, or fewer trials are asked for; or the store cannot be written.
    """
    experiment_store = ExperimentStore(store, experiment.name)
    dataset = dataset or datasets.prepare(experiment.dataset)
    device = experiment.execution.device
    wanted = declare(experiment, dataset, None if device == "auto" else [torch.device(device)])
    before = None
    if store.exists(keys.experiment(experiment.name)):
        before = experiment_store.read_record().experiment.subsets.trials
        experiment_store.register(wanted)  # what is refused is refused before a large dataset goes up
    staged = stage(dataset, store)
    if experiment.subsets.masks is not None:
        stage_masks(experiment.subsets.masks, wanted.canonical["subsets"]["masks"], store)
    control = experiment_store.control()
    if priority is not None and priority != control.priority:
        control = replace(control, priority=priority)
        experiment_store.set_control(control)
    return Submission(experiment_store.register(wanted), dataset.fingerprint, staged, before, control)
