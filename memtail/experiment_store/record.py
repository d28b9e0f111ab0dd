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
    """Record of an experiment: the object `experiment.json`.

    All processes that work on an experiment cut it into shards of the recorded size. An extension may add trials to the last shard of the
    cut, which two batches then cover; statistics count each trial once.

    Attributes:
        experiment: the declaration.
        fingerprint: SHA-256 (hex) of `canonical`.
        canonical: the canonical declaration, with the dataset's fingerprint.
        n_train, n_test: numbers of training and test examples.
        trials_per_shard: number of trials in a shard.
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
        """Whether a shard can belong to this experiment: not empty, not larger than its shards, no trial beyond the last."""
        return 0 < len(shard.trials) <= self.trials_per_shard and shard.last < self.experiment.subsets.trials

    def with_trials(self, trials: int) -> "Record":
        """Return the record with another number of trials."""
        subsets = self.experiment.subsets.model_copy(update={"trials": trials})
        return replace(self, experiment=self.experiment.model_copy(update={"subsets": subsets}))

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> "Record":
        """Read a record. Raises: StoreError."""
        try:
            fields = json.loads(data)
            if (schema := fields.pop("schema")) != SCHEMA:
                raise StoreError(f"{source}: has schema {schema}, this memtail reads {SCHEMA}: use the memtail that wrote it")
            experiment = Experiment.parse(fields.pop("experiment"), source=source)
            return cls(experiment=experiment, **fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{source}: is corrupt ({error}): restore it, or remove the experiment") from None
