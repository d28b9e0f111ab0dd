"""What a store holds of one experiment: its declaration, its trial batches and its failures.

The store is the only memory there is. Whoever trains, folds or publishes asks here what is wanted and what is committed, and may
be killed at any moment.
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from memtail.errors import ForeignObjectError, StoreError
from memtail.spec.experiment import NAME, Experiment, differences
from memtail.storage import ObjectNotFound, ObjectStore, keys
from memtail.trials import Shard, TrialBatch, largest_batch

SCHEMA = 1
#: A shard that fails this often is given up.
MAX_ATTEMPTS = 3
# Bytes of the largest small object that is read.
_SMALL = 1 << 20


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


@dataclass(frozen=True)
class Failure:
    """One failed attempt at a shard."""

    shard: Shard
    attempt: int
    error: str
    traceback: str
    when: str


@dataclass(frozen=True)
class Control:
    """What its owner asks of an experiment on a cluster.

    Attributes:
        state: "running", "paused" (nothing new is begun) or "cancelled" (what is being trained is dropped, too).
        priority: shards of the experiments with the highest are trained first.
    """

    state: Literal["running", "paused", "cancelled"] = "running"
    priority: int = 0


@dataclass(frozen=True)
class Notice:
    """What a service has to say about an experiment at present.

    Attributes:
        lines: for people.
        final: whether there will never be scores as it is.
    """

    lines: tuple[str, ...]
    final: bool = False


class ExperimentArchive:
    """One experiment's objects in a store."""

    def __init__(self, store: ObjectStore, name: str) -> None:
        self.store = store
        self.name = name

    def record(self) -> Record:
        """The experiment's record. Raises: ObjectNotFound: there is none of this name; says which there are. StoreError."""
        key = keys.experiment(self.name)
        try:
            if not NAME.fullmatch(self.name):
                raise ObjectNotFound(key)
            return Record.from_bytes(self.store.get(key), key)
        except ObjectNotFound:
            there = ", ".join(experiment_names(self.store)) or "none"
            raise ObjectNotFound(f"there is no experiment '{self.name}' in the store; there: {there}") from None

    def enroll(self, wanted: Record) -> Record:
        """Enter an experiment, or find it entered already; returns the record that holds.

        More trials than recorded extend the experiment; the recorded grid stays.

        Raises:
            StoreError: another experiment has the name (says what differs), or fewer trials are asked for than recorded.
        """
        if self.store.put_if_absent(keys.experiment(self.name), wanted.to_bytes()):
            return wanted
        held = self.record()
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
        held = self.record()
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

    def forgive(self, shard: Shard | None = None) -> int:
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


def missing_shards(trials: int, trials_per_shard: int, committed: list[Shard]) -> list[Shard]:
    """The shards still to be trained: what is not committed of trials 0 to `trials` - 1, cut at multiples of `trials_per_shard`.

    A grid cell that is committed in part, because the experiment was extended, is missing the rest.
    """
    have = {trial for shard in committed for trial in shard.trials}
    missing: list[Shard] = []
    for trial in range(trials):
        if trial in have:
            continue
        if missing and missing[-1].last == trial - 1 and trial % trials_per_shard:
            missing[-1] = Shard(missing[-1].first, trial)
        else:
            missing.append(Shard(trial, trial))
    return missing
