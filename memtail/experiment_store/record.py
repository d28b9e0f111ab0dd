"""The record of an experiment, `experiment.json`: its declaration, its fingerprint, and the size of its shards."""

import json
from dataclasses import dataclass, replace
from typing import Any

from memtail.errors import StoreError
from memtail.spec.experiment import Experiment
from memtail.trials import Shard

SCHEMA = 1


@dataclass(frozen=True)
class Record:
    """The object `experiment.json`: what is wanted, and by which grid it is cut into shards.

    Everyone who works on an experiment cuts it by the recorded grid. A grid cell that an extension adds to may be covered by two
    batches; statistics count each trial once.
    """

    experiment: Experiment
    fingerprint: str
    canonical: dict[str, Any]
    n_train: int
    n_test: int
    trials_per_shard: int

    def to_bytes(self) -> bytes:
        """The record as JSON."""
        return json.dumps(
            {
                "schema": SCHEMA,
                "experiment": self.experiment.model_dump(mode="json"),
                "fingerprint": self.fingerprint,
                "canonical": self.canonical,
                "n_train": self.n_train,
                "n_test": self.n_test,
                "trials_per_shard": self.trials_per_shard,
            },
            indent=1,
        ).encode()

    def has(self, shard: Shard) -> bool:
        """Whether a shard is of this experiment: some of its trials, and no more than its shards have."""
        return 0 < len(shard.trials) <= self.trials_per_shard and shard.last < self.experiment.subsets.trials

    def with_trials(self, trials: int) -> "Record":
        """The same with another number of trials."""
        subsets = self.experiment.subsets.model_copy(update={"trials": trials})
        return replace(self, experiment=self.experiment.model_copy(update={"subsets": subsets}))

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> "Record":
        """Read a record. Raises: StoreError."""
        try:
            fields = json.loads(data)
            if (schema := fields.pop("schema")) != SCHEMA:
                raise StoreError(f"{source}: is of schema {schema}, this memtail reads {SCHEMA}: use the memtail that wrote it")
            experiment = Experiment.parse(fields.pop("experiment"), source=source)
            return cls(experiment=experiment, **fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{source}: is corrupt ({error}): restore it, or remove the experiment") from None
