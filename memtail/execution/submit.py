"""`submit`: put an experiment and its dataset into a store, for the services to train. Imports no torch."""

from dataclasses import dataclass, replace

from memtail import datasets
from memtail.datasets import Dataset
from memtail.datasets.staged_dataset import stage
from memtail.datasets.staged_inputs import stage_inputs
from memtail.errors import SpecError
from memtail.execution.declare import declare, shard_size_in_child
from memtail.experiment_store import Control, ExperimentStore, Record, record_action
from memtail.experiment_store.record import OWNER
from memtail.spec import Experiment
from memtail.storage import ObjectStore, keys


@dataclass(frozen=True)
class Submission:
    """State of a store after `submit`.

    Attributes:
        record: the experiment's record.
        dataset: the dataset's fingerprint.
        staged: whether this call put the dataset into the store.
        trials_before: number of trials before this call; None if the experiment is new.
        control: the experiment's control.
    """

    record: Record
    dataset: str
    staged: bool
    trials_before: int | None
    control: Control

    @property
    def shards(self) -> int:
        """Number of shards of all trials."""
        return self.record.shards


def submit(
    experiment: Experiment,
    store: ObjectStore,
    *,
    dataset: Dataset | None = None,
    priority: int | None = None,
    owner: str | None = None,
) -> Submission:
    """Register an experiment and stage its dataset; more trials extend an experiment that is registered.

    Args:
        experiment: the declaration. Its device belongs to the workers and may be missing on this machine.
        store: the store the services work on.
        dataset: the experiment's dataset, if it is open already; by default it is prepared.
        priority: experiments with the highest priority are trained first; by default 0, or as before.
        owner: who or which team owns the experiment; by default nobody is named, or as before.

    Raises:
        SpecError, DatasetError: bad input.
        StoreError: another experiment has the name, or has more trials; or the store cannot be written.
    """
    if owner is not None and not OWNER.fullmatch(owner):
        raise SpecError(f"the owner is {owner!r}: give one line of 1 to 100 printable characters")
    experiment_store = ExperimentStore(store, experiment.name)
    dataset = dataset or datasets.prepare(experiment.dataset)
    declared = replace(declare(experiment, dataset, shard_size_in_child(experiment, dataset, store.address)), owner=owner)
    held = experiment_store.read_record() if store.exists(keys.experiment(experiment.name)) else None
    if held:
        declared = experiment_store.register(declared)  # refuse before a large dataset is uploaded
    staged = stage(dataset, store)
    stage_inputs(experiment, declared.canonical, store)
    before, control = experiment_store.change_control(lambda held: held if priority is None else replace(held, priority=priority))
    if held is None:
        declared = experiment_store.register(declared)
    if changes := _changes(held, declared, before, control):
        record_action(store, experiment.name, "submit", changes)
    return Submission(declared, dataset.fingerprint, staged, held.experiment.subsets.trials if held else None, control)


def _changes(held: Record | None, record: Record, before: Control, control: Control) -> str:
    """Describe what a submission changed; empty if nothing."""
    old, new = held.experiment.subsets.trials if held else None, record.experiment.subsets.trials
    parts = [
        f"{new} trials" if old is None else f"{old} -> {new} trials" if old != new else "",
        f"priority {before.priority} -> {control.priority}" if before != control else "",
        f"owner {record.owner}" if record.owner and (held is None or held.owner != record.owner) else "",
    ]
    return ", ".join(filter(None, parts))
