"""`BatchObjects`: trial batches of an experiment in a store, and the comparisons of those that were trained twice."""

import json
from collections.abc import Collection, Iterator
from dataclasses import asdict

from pydantic import TypeAdapter, ValidationError

from memtail.errors import ForeignObjectError
from memtail.experiment_store.objects import SMALL, ExperimentObjects
from memtail.experiment_store.record import Record
from memtail.experiment_store.replicas import Replica, unverified
from memtail.storage import ObjectNotFound, keys
from memtail.trials import Shard, TrialBatch, largest_batch

#: Verdicts on second trainings, in their keys.
EQUAL, DIFFERENT = "equal", "different"


class BatchObjects(ExperimentObjects):
    """The part of `ExperimentStore` about trial batches."""

    def committed(self) -> list[Shard]:
        """List the shards that have a trial batch, by first trial."""
        return list(self.iterate_committed())

    def iterate_committed(self) -> Iterator[Shard]:
        """Yield the shards that have a trial batch, by first trial, while they are listed."""
        return (Shard(*span) for key in self.store.list(keys.trials(self.name)) if (span := keys.parse_span(key)))

    def committed_tags(self) -> dict[Shard, str]:
        """List the shards that have a trial batch, by first trial, with tags that change when a batch is replaced."""
        listed = self.store.list_tagged(keys.trials(self.name))
        return {Shard(*span): tag for key, tag in listed if (span := keys.parse_span(key))}

    def is_committed(self, shard: Shard) -> bool:
        """Whether the shard has a trial batch."""
        return self.store.exists(keys.trial_batch(self.name, shard.first, shard.last))

    def commit(self, batch: TrialBatch, fingerprint: str) -> bool:
        """Write a trial batch unless the shard has one.

        Returns:
            Whether this call wrote it; otherwise the earlier batch counts.

        Raises:
            StoreError: the batch has another fingerprint, or the store cannot be written.
        """
        self._check(str(batch.shard), batch, fingerprint)
        key = keys.trial_batch(self.name, batch.shard.first, batch.shard.last)
        return self.store.put_if_absent(key, batch.to_bytes())

    def batch(self, shard: Shard, record: Record) -> TrialBatch:
        """Read a committed trial batch, as `tagged_batch` does, without its tag."""
        return self.tagged_batch(shard, record)[0]

    def tagged_batch(self, shard: Shard, record: Record) -> tuple[TrialBatch, str]:
        """Read a committed trial batch with its tag, and check that it belongs to the experiment.

        Raises:
            ObjectNotFound: it is missing.
            ForeignObjectError: it is damaged, too large, holds other trials, or belongs to another experiment.
            StoreError: the store cannot be read.
        """
        key = keys.trial_batch(self.name, shard.first, shard.last)
        if shard.last >= record.experiment.subsets.trials or not len(shard.trials) > 0:
            raise ForeignObjectError(f"{key}: the experiment has {record.experiment.subsets.trials} trials: remove it")
        data, tag = self.store.get_tagged(key, limit=largest_batch(len(shard.trials), record.n_train, record.n_test))
        batch = TrialBatch.from_bytes(data, key)
        if batch.trial.tolist() != list(shard.trials):
            raise ForeignObjectError(f"{key}: holds other trials than its name says: remove it, then run again")
        self._check(key, batch, record.fingerprint)
        if (batch.n_train, batch.n_test) != (record.n_train, record.n_test):
            raise ForeignObjectError(f"{key}: is of a dataset of another size: remove it, then run again")
        if batch.scores_only != record.experiment.record.scores_only:
            raise ForeignObjectError(f"{key}: {'lacks' if batch.scores_only else 'has'} correctness, against the declaration: remove it")
        return batch, tag

    def _check(self, source: str, batch: TrialBatch, fingerprint: str) -> None:
        if batch.fingerprint != fingerprint:
            raise ForeignObjectError(
                f"{source}: has fingerprint {batch.fingerprint[:8]}..., experiment '{self.name}' has {fingerprint[:8]}...: "
                f"it belongs to another experiment, remove it"
            )

    def record_replica(self, replica: Replica) -> None:
        """Record the comparison of a second training; of a shard, the first equal and the first different one are kept."""
        key = keys.replica(self.name, replica.shard.first, replica.shard.last, DIFFERENT if replica.differs else EQUAL)
        self.store.put_if_absent(key, json.dumps(asdict(replica), indent=1).encode())

    def trained_twice(self) -> dict[Shard, bool]:
        """List the shards with a comparison of a second training, and whether one differed."""
        found: dict[Shard, bool] = {}
        for key in self.store.list(keys.replicas(self.name)):
            if span := keys.parse_span(key):
                shard = Shard(*span)
                found[shard] = found.get(shard, False) or key.endswith(f"/{DIFFERENT}.json")
        return found

    def unverified(self, record: Record, committed: Collection[Shard]) -> list[Shard]:
        """List those of the committed shards that are to be trained a second time and have not been, by first trial."""
        share = record.experiment.execution.verify
        if not share or not committed:
            return []
        found = unverified(record.fingerprint, share, committed, self.trained_twice())
        return sorted(filter(record.has, found), key=lambda shard: shard.first)

    def difference(self, shard: Shard) -> str:
        """Describe the difference between two trainings of a shard in one line."""
        key = keys.replica(self.name, shard.first, shard.last, DIFFERENT)
        try:
            return str(TypeAdapter(Replica).validate_json(self.store.get(key, limit=SMALL)))
        except (ObjectNotFound, ForeignObjectError, ValidationError):
            return f"{shard}: two trainings differ; {key} cannot be read"
