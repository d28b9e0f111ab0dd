"""What a store holds of one experiment: its declaration, its trial batches and its failures.

The store is the only memory there is. Whoever trains, folds or publishes asks here what is wanted and what is committed, and may
be killed at any moment.
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime

from pydantic import TypeAdapter, ValidationError

from memtail.errors import ForeignObjectError, StoreError
from memtail.experiment_store.control import Control, Failure, Notice
from memtail.experiment_store.record import Record
from memtail.spec.errors import differences
from memtail.spec.experiment import NAME
from memtail.storage import ObjectNotFound, ObjectStore, keys
from memtail.trials import Shard, TrialBatch, largest_batch

#: A shard that fails this often is given up.
MAX_ATTEMPTS = 3
# Bytes of the largest small object that is read.
_SMALL = 1 << 20


class ExperimentStore:
    """One experiment's objects in a store."""

    def __init__(self, store: ObjectStore, name: str) -> None:
        self.store = store
        self.name = name

    def read_record(self) -> Record:
        """The experiment's record. Raises: ObjectNotFound: there is none of this name; says which there are. StoreError."""
        key = keys.experiment(self.name)
        try:
            if not NAME.fullmatch(self.name):
                raise ObjectNotFound(key)
            return Record.from_bytes(self.store.get(key), key)
        except ObjectNotFound:
            there = ", ".join(experiment_names(self.store)) or "none"
            raise ObjectNotFound(f"there is no experiment '{self.name}' in the store; there: {there}") from None

    def register(self, wanted: Record) -> Record:
        """Enter an experiment, or find it entered already; returns the record that holds.

        More trials than recorded extend the experiment; the recorded grid stays.

        Raises:
            StoreError: another experiment has the name (says what differs), or fewer trials are asked for than recorded.
        """
        if self.store.put_if_absent(keys.experiment(self.name), wanted.to_bytes()):
            return wanted
        held = self.read_record()
        if held.fingerprint != wanted.fingerprint:
            changes = ", ".join(differences(held.canonical, wanted.canonical)) or "an unknown part"
            raise StoreError(
                f"experiment '{self.name}' is in the store with fingerprint {held.fingerprint[:8]}..., this spec has "
                f"{wanted.fingerprint[:8]}... ({changes}): choose another name"
            )
        if wanted.experiment.subsets.until:  # it began with fewer than it has come to
            wanted = wanted.with_trials(max(wanted.experiment.subsets.trials, held.experiment.subsets.trials))
        more, fewer = wanted.experiment.subsets.trials, held.experiment.subsets.trials
        if more < fewer:
            raise StoreError(f"experiment '{self.name}' is in the store with {fewer} trials, this spec has {more}: ask for {fewer} or more")
        current = Record(wanted.experiment, held.fingerprint, held.canonical, held.n_train, held.n_test, held.trials_per_shard)
        if current != held:
            self.store.put(keys.experiment(self.name), current.to_bytes())
        return current

    def committed(self) -> list[Shard]:
        """The shards that have a trial batch, by first trial."""
        return list(self.iterate_committed())

    def iterate_committed(self) -> Iterator[Shard]:
        """The same, listed as they are asked for."""
        return (Shard(*span) for key in self.store.list(keys.trials(self.name)) if (span := keys.parse_span(key)))

    def is_committed(self, shard: Shard) -> bool:
        """Whether the shard has a trial batch."""
        return self.store.exists(keys.trial_batch(self.name, shard.first, shard.last))

    def commit(self, batch: TrialBatch, fingerprint: str) -> bool:
        """Write a trial batch unless the shard has one; False if another was first, whose batch then stands.

        Raises:
            StoreError: it belongs to an experiment of another fingerprint.
        """
        self._check(str(batch.shard), batch, fingerprint)
        key = keys.trial_batch(self.name, batch.shard.first, batch.shard.last)
        return self.store.put_if_absent(key, batch.to_bytes())

    def batch(self, shard: Shard, record: Record) -> TrialBatch:
        """A committed trial batch of the experiment.

        Raises:
            ObjectNotFound: it is missing.
            ForeignObjectError: it is damaged, too large, holds other trials, or belongs to another experiment.
            StoreError: the store cannot be read.
        """
        key = keys.trial_batch(self.name, shard.first, shard.last)
        if shard.last >= record.experiment.subsets.trials or not len(shard.trials) > 0:
            raise ForeignObjectError(f"{key}: the experiment has {record.experiment.subsets.trials} trials: remove it")
        data = self.store.get(key, limit=largest_batch(len(shard.trials), record.n_train, record.n_test))
        batch = TrialBatch.from_bytes(data, key)
        if batch.trial.tolist() != list(shard.trials):
            raise ForeignObjectError(f"{key}: holds other trials than its name says: remove it, then run again")
        self._check(key, batch, record.fingerprint)
        if (batch.n_train, batch.n_test) != (record.n_train, record.n_test):
            raise ForeignObjectError(f"{key}: is of a dataset of another size: remove it, then run again")
        return batch

    def _check(self, source: str, batch: TrialBatch, fingerprint: str) -> None:
        if batch.fingerprint != fingerprint:
            raise ForeignObjectError(
                f"{source}: has fingerprint {batch.fingerprint[:8]}..., experiment '{self.name}' has {fingerprint[:8]}...: "
                f"it belongs to another experiment, remove it"
            )

    def extend(self, trials: int) -> Record:
        """Ask for so many trials, if there were fewer; returns the record that holds."""
        held = self.read_record()
        if trials <= held.experiment.subsets.trials:
            return held
        extended = held.with_trials(trials)
        self.store.put(keys.experiment(self.name), extended.to_bytes())
        return extended

    def control(self) -> Control:
        """What its owner asks of it. Raises: StoreError."""
        key = keys.control(self.name)
        try:
            return TypeAdapter(Control).validate_json(self.store.get(key, limit=_SMALL))
        except ObjectNotFound:
            return Control()
        except ValidationError as error:
            raise StoreError(f"{key}: is corrupt ({error.error_count()} errors): remove it") from None

    def set_control(self, control: Control) -> None:
        """Ask something of it."""
        self.store.put(keys.control(self.name), json.dumps(asdict(control)).encode())

    def notices(self) -> dict[str, Notice]:
        """What the services have to say about it, by service; a damaged notice is passed over."""
        found = {}
        for key in self.store.list(keys.notices(self.name)):
            with suppress(ObjectNotFound, ForeignObjectError, ValidationError):
                notice = TypeAdapter(Notice).validate_json(self.store.get(key, limit=_SMALL))
                found[key.removeprefix(keys.notices(self.name)).removesuffix(".json")] = notice
        return found

    def set_notice(self, source: str, notice: Notice | None) -> None:
        """Say something about it instead of what `source` said before; None: nothing."""
        key = keys.notice(self.name, source)
        if notice is None:
            self.store.delete(key)
        else:
            self.store.put(key, json.dumps(asdict(notice), indent=1).encode())

    def record_failure(self, shard: Shard, error: str, traceback: str = "", when: str | None = None) -> Failure:
        """Keep what went wrong in one attempt, just now unless `when` (UTC, ISO 8601) says otherwise; attempts count up from 1."""
        when = when or datetime.now(UTC).isoformat(timespec="seconds")
        attempt = self.attempts().get(shard, 0) + 1
        while True:
            failure = Failure(shard, attempt, error, traceback, when)
            content = {"attempt": attempt, "error": error, "traceback": traceback, "when": when}
            key = keys.failure(self.name, shard.first, shard.last, attempt)
            if self.store.put_if_absent(key, json.dumps(content, indent=1).encode()):
                return failure
            attempt += 1  # another worker failed at it at the same time

    def attempts(self) -> Counter[Shard]:
        """How many failed attempts at each shard are recorded."""
        spans = (keys.parse_span(key) for key in self.store.list(keys.failures(self.name)))
        return Counter(Shard(*span) for span in spans if span)

    def clear_failures(self, shard: Shard | None = None) -> int:
        """Remove the failure records of a shard, or all, so that it is tried again; returns how many there were."""
        wanted = None if shard is None else (shard.first, shard.last)
        records = [key for key in self.store.list(keys.failures(self.name)) if wanted in (None, keys.parse_span(key))]
        for key in records:
            self.store.delete(key)
        return len(records)

    def failures(self) -> Iterator[Failure]:
        """Every failed attempt, by shard."""
        for key in self.store.list(keys.failures(self.name)):
            if span := keys.parse_span(key):
                try:
                    yield Failure(Shard(*span), **json.loads(self.store.get(key)))
                except (ValueError, TypeError):
                    yield Failure(Shard(*span), 0, f"{key} cannot be read", "", "")


def experiment_names(store: ObjectStore) -> list[str]:
    """The names of all experiments in a store, ascending."""
    return [name for name in store.folders(keys.experiments()) if NAME.fullmatch(name) and store.exists(keys.experiment(name))]
