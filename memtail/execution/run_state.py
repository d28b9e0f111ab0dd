"""State of an embedded run, which progress displays read."""

from collections import defaultdict
from dataclasses import dataclass, field

from memtail.datasets import Dataset
from memtail.execution.aggregation import Aggregation
from memtail.experiment_store import Record
from memtail.statistics import Statistics
from memtail.trials import Shard


@dataclass
class RunState:
    """State of a run, for progress displays.

    Attributes:
        aggregation: the accumulated trials.
        dataset: the experiment's dataset.
        devices: the devices it trains on.
        partial: trained part of each shard in training (0 to 1).
        failed: shards this run gave up, with their last error.
        seconds: seconds of training, in all rounds.
        phases: seconds by phase: those of the training processes together, and of committing, accumulating and publishing as "writing".
        computing: seconds of computation of the devices, by name; those of a CPU's processes together.
    """

    aggregation: Aggregation
    dataset: Dataset
    devices: list[str]
    partial: dict[Shard, float] = field(default_factory=dict)
    failed: dict[Shard, str] = field(default_factory=dict)
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    computing: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def record(self) -> Record:
        """The experiment's record."""
        return self.aggregation.record

    @property
    def statistics(self) -> Statistics:
        """Statistics of the accumulated trials."""
        return self.aggregation.statistics

    @property
    def total(self) -> int:
        """Number of trials the experiment asks for."""
        return self.aggregation.total

    @property
    def trials(self) -> int:
        """Number of committed trials, diverged ones included."""
        return self.aggregation.trials

    @property
    def progress(self) -> float:
        """Number of trained trials; shards in training count by the part that is trained."""
        return self.trials + sum(share * len(shard.trials) for shard, share in self.partial.items())
