"""`ExperimentStore`: reads and writes the objects of one experiment.

All state is in the store. Processes that train, accumulate or publish read here which trials exist, and may be killed at any moment.
"""

import json
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime

import structlog
from pydantic import TypeAdapter, ValidationError

from memtail.errors import ForeignObjectError, StoreError, UnsupportedError
from memtail.experiment_store.control import Control, Failure, Notice, Origin
from memtail.experiment_store.finished import Finished
from memtail.experiment_store.names import experiment_names, refuse_leftovers
from memtail.experiment_store.record import Record
from memtail.experiment_store.replicas import Replica, unverified
from memtail.experiment_store.shard_grid import missing_shards
from memtail.spec.errors import differences
from memtail.spec.experiment import NAME
from memtail.storage import ObjectNotFound, ObjectStore, keys
from memtail.trials import Shard, TrialBatch, largest_batch

log = structlog.get_logger()

#: Number of failed attempts after which a shard is dead: not tried again.
MAX_ATTEMPTS = 3
# Tries to change an object that others change at the same time.
_MOST_TRIES = 100
# Limit in bytes of controls and notices.
_SMALL = 1 << 20
# Limit in bytes of a batch's entry in the record of an experiment's end.
_TAGGED = 200
# Verdicts on second trainings, in their keys.
_EQUAL, _DIFFERENT = "equal", "different"


class ExperimentStore:
    """The objects of one experiment in a store.

    Args:
        store: the object store.
        name: name of the experiment.
    """

    def __init__(self, store: ObjectStore, name: str) -> None:
        self.store = store
        self.name = name

    def read_record(self) -> Record:
        """Read the record.

        Raises:
            ObjectNotFound: there is no experiment of this name; the message lists those there are.
            StoreError: the record is corrupt, or the store cannot be read.
        """
        key = keys.experiment(self.name)
        try:
            if not NAME.fullmatch(self.name):
                raise ObjectNotFound(key)
            return Record.from_bytes(self.store.get(key), key)
        except ObjectNotFound:
            there = ", ".join(experiment_names(self.store)) or "none"
            raise ObjectNotFound(f"there is no experiment '{self.name}' in the store; there: {there}") from None

    def register(self, declared: Record) -> Record:
        """Register an experiment, unless it is registered; returns its record in the store.

        More trials than recorded extend the experiment; the recorded size of shards stays.

        Raises:
            StoreError: another experiment has the name (says what differs) or left trials or scores under it, or fewer trials are asked
                for than recorded.
            UnsupportedError: with the recorded size of shards the experiment is too large.
        """
        if not self.is_registered():
            refuse_leftovers(self.store, self.name, declared.fingerprint)
        if self.store.put_if_absent(keys.experiment(self.name), declared.to_bytes()):
            self.mark_changed()  # services may know a finished experiment of this name, which was removed
            return declared
        extended = self._change_record(lambda held: self._extended(held, declared))
        if self.finished(extended) is None:  # it was extended, now or by a submission that was interrupted here
            self.reopen("it was submitted with more trials, or with more shards to verify")
        return extended

    def _extended(self, held: Record, declared: Record) -> Record:
        """Return the record that a declaration makes of the one in the store. Raises: StoreError: they do not go together."""
        if held.fingerprint != declared.fingerprint:
            changes = ", ".join(differences(held.canonical, declared.canonical)) or "an unknown part"
            raise StoreError(
                f"experiment '{self.name}' is in the store with fingerprint {held.fingerprint[:8]}..., this spec has "
                f"{declared.fingerprint[:8]}... ({changes}): choose another name"
            )
        if declared.experiment.subsets.until:  # extended since it was declared
            declared = declared.with_trials(max(declared.experiment.subsets.trials, held.experiment.subsets.trials))
        more, fewer = declared.experiment.subsets.trials, held.experiment.subsets.trials
        if more < fewer:
            raise StoreError(f"experiment '{self.name}' is in the store with {fewer} trials, this spec has {more}: ask for {fewer} or more")
        extended = replace(held, experiment=declared.experiment, owner=declared.owner or held.owner)
        extended.check_limits()  # with the recorded size of shards
        return extended

    def _change_record(self, change: Callable[[Record], Record]) -> Record:
        """Replace the record by what a function makes of it, and return that, also if others do so at the same time.

        Raises:
            StoreError: the record cannot be read or written, or others change it all the time.
        """
        key = keys.experiment(self.name)
        for _ in range(_MOST_TRIES):
            data, tag = self.store.get_tagged(key)
            held = Record.from_bytes(data, key)
            changed = change(held)
            if changed == held or self.store.put_if_match(key, changed.to_bytes(), tag):
                return changed
        raise StoreError(f"{key}: others change it all the time: try again")

    def is_registered(self) -> bool:
        """Whether the store has the experiment's record."""
        return self.store.exists(keys.experiment(self.name))

    def check_registered(self, fingerprint: str) -> None:
        """Check that the experiment was not removed.

        Raises:
            ObjectNotFound: it was.
            StoreError: another experiment has the name now, or the store cannot be read.
        """
        with suppress(UnsupportedError):  # a later version has written the record since
            if self.read_record().fingerprint != fingerprint:
                raise StoreError(f"another experiment has the name '{self.name}' now, and what is made of the earlier one is dropped")

    def finished(self, record: Record) -> Finished | None:
        """Read the record of the experiment's end; None if there is none, or it does not hold any more.

        It holds until the experiment is extended, more of its shards are to be verified, or a batch is discarded.

        Args:
            record: the experiment's record.

        Raises:
            StoreError: the store cannot be read.
        """
        key, experiment, trials = keys.finished(self.name), record.experiment, record.experiment.subsets.trials
        try:
            finished = Finished.from_bytes(self.store.get(key, limit=_SMALL + _TAGGED * trials), key)
        except ObjectNotFound:
            return None
        except ForeignObjectError as error:
            log.warning("record of the end ignored", experiment=self.name, reason=str(error))
            return None
        if finished.fingerprint != record.fingerprint or finished.trials < trials or finished.verify < experiment.execution.verify:
            return None
        return finished if finished.discards == self.discards() else None

    def set_finished(self, finished: Finished) -> None:
        """Write the record of the experiment's end."""
        self.store.put(keys.finished(self.name), finished.to_bytes())

    def reopen(self, why: str) -> bool:
        """Remove the record of the experiment's end, so that missing trials are trained, and tell the services.

        Returns:
            Whether the experiment was finished.

        Raises:
            StoreError: the store cannot be read or written.
        """
        finished = self.store.exists(keys.finished(self.name))
        if finished:
            self.store.delete(keys.finished(self.name))
            log.info("experiment reopened", experiment=self.name, reason=why)
        self.mark_changed()  # after the removal, which services then see
        return finished

    def mark_changed(self) -> None:
        """Ask the services to look at the experiment again, although nothing was to happen in it."""
        self.store.put(keys.change(self.name), uuid.uuid4().hex.encode())  # another content than before has another tag

    def missing(self, record: Record) -> list[Shard]:
        """List the shards to train, by first trial; none of a finished experiment, even if its batches were removed."""
        if self.finished(record):
            return []
        return missing_shards(record.experiment.subsets.trials, record.trials_per_shard, self.committed())

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

    def discard(self, shard: Shard, why: str) -> None:
        """Remove a shard's trial batch, so that the scores no longer count it and it is trained again; the reason stays on record.

        One that was interrupted is completed by another.

        Raises:
            ObjectNotFound: the shard has no batch.
            StoreError: the store cannot be written.
        """
        if self.is_committed(shard):
            when = datetime.now(UTC).isoformat(timespec="microseconds")
            content = json.dumps({"why": why, "when": when}, indent=1).encode()
            self.store.put(keys.discard(self.name, shard.first, shard.last, when), content)
            for verdict in (_EQUAL, _DIFFERENT):  # comparisons with this batch
                self.store.delete(keys.replica(self.name, shard.first, shard.last, verdict))
            self.store.delete(keys.trial_batch(self.name, shard.first, shard.last))
        elif not self._is_discarded(shard):
            raise ObjectNotFound(f"experiment '{self.name}' has no trial batch {shard.span}: list them with memtail status --json")
        for key in self._open_discards(shard):
            self.store.put(keys.discard_end(key), b"{}")
        self.reopen(f"{shard} discarded")

    def _is_discarded(self, shard: Shard) -> bool:
        """Whether a discard of a shard was interrupted; also one whose experiment has not ended since.

        Later the batch is missing for another reason.
        """
        if self._open_discards(shard):
            return True
        discarded = any(self.store.list(keys.discards_of(self.name, shard.first, shard.last)))
        return discarded and self.finished(self.read_record()) is None

    def _open_discards(self, shard: Shard) -> list[str]:
        """List the keys of the discards of a shard whose end is not on record."""
        there = set(self.store.list(keys.discards_of(self.name, shard.first, shard.last)))
        return sorted(key for key in there if keys.discard_end(key) not in there)

    def discards(self) -> int:
        """Count the records of discards: one is written before a trial batch is removed, and one after.

        A listing that follows a count may hold a batch whose removal has begun, but none whose removal had ended.
        """
        return sum(1 for _ in self.store.list(keys.discards(self.name)))

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
        return batch, tag

    def check_device(self, record: Record, kind: str) -> None:
        """Check that a device may train an experiment that requires devices of one kind (`execution.require`).

        The first check decides, before training: for the kind of the first committed batch or, without one, of its own device.

        Args:
            record: the record.
            kind: kind of the device, as in `Provenance.kind`.

        Raises:
            UnsupportedError: another kind is required.
            StoreError: the store cannot be read or written.
        """
        if record.experiment.execution.require is None:
            return
        key = keys.device(self.name)
        if not self.store.exists(key):
            content = {"kind": self._first_kind(record) or kind}
            self.store.put_if_absent(key, json.dumps(content).encode())
        try:
            required = str(json.loads(self.store.get(key, limit=_SMALL))["kind"])
        except (ValueError, KeyError, TypeError):
            raise StoreError(f"{key}: is corrupt: remove it") from None
        if kind != required and not kind.startswith(f"{required}, "):  # batches of 0.1.0 do not name the processor
            raise UnsupportedError(
                f"experiment '{self.name}' is trained on {required} only (execution.require: same-device), and this is {kind}: "
                f"use such a device, or submit it without execution.require"
            )

    def _first_kind(self, record: Record) -> str | None:
        for shard in self.iterate_committed():
            with suppress(ObjectNotFound, ForeignObjectError):
                return self.batch(shard, record).provenance.kind
        return None

    def record_replica(self, replica: Replica) -> None:
        """Record the comparison of a second training; of a shard, the first equal and the first different one are kept."""
        key = keys.replica(self.name, replica.shard.first, replica.shard.last, _DIFFERENT if replica.differs else _EQUAL)
        self.store.put_if_absent(key, json.dumps(asdict(replica), indent=1).encode())

    def trained_twice(self) -> dict[Shard, bool]:
        """List the shards with a comparison of a second training, and whether one differed."""
        found: dict[Shard, bool] = {}
        for key in self.store.list(keys.replicas(self.name)):
            if span := keys.parse_span(key):
                shard = Shard(*span)
                found[shard] = found.get(shard, False) or key.endswith(f"/{_DIFFERENT}.json")
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
        key = keys.replica(self.name, shard.first, shard.last, _DIFFERENT)
        try:
            return str(TypeAdapter(Replica).validate_json(self.store.get(key, limit=_SMALL)))
        except (ObjectNotFound, ForeignObjectError, ValidationError):
            return f"{shard}: two trainings differ; {key} cannot be read"

    def _check(self, source: str, batch: TrialBatch, fingerprint: str) -> None:
        if batch.fingerprint != fingerprint:
            raise ForeignObjectError(
                f"{source}: has fingerprint {batch.fingerprint[:8]}..., experiment '{self.name}' has {fingerprint[:8]}...: "
                f"it belongs to another experiment, remove it"
            )

    def extend(self, trials: int) -> Record:
        """Raise the number of trials to `trials`, unless it is that high; returns the record in the store. Raises: StoreError."""
        return self._change_record(lambda held: held.with_trials(max(trials, held.experiment.subsets.trials)))

    def control(self) -> Control:
        """Read the control; the default one if none was set. Raises: StoreError: it is corrupt, or the store cannot be read."""
        key = keys.control(self.name)
        try:
            return self._parsed_control(self.store.get(key, limit=_SMALL))
        except ObjectNotFound:
            return Control()

    def _parsed_control(self, data: bytes) -> Control:
        try:
            return TypeAdapter(Control).validate_json(data)
        except ValidationError as error:
            raise StoreError(f"{keys.control(self.name)}: is corrupt ({error.error_count()} errors): remove it") from None

    def change_control(self, change: Callable[[Control], Control]) -> tuple[Control, Control]:
        """Replace the control by what a function makes of it, also if others do so at the same time.

        Returns:
            The control before and after.

        Raises:
            StoreError: it is corrupt, or the store cannot be read or written.
        """
        key = keys.control(self.name)
        for _ in range(_MOST_TRIES):
            try:
                data, tag = self.store.get_tagged(key, limit=_SMALL)
                before = self._parsed_control(data)
            except ObjectNotFound:
                before, tag = Control(), None
            after = change(before)
            content = json.dumps(asdict(after)).encode()
            if after == before:
                return before, after
            if self.store.put_if_absent(key, content) if tag is None else self.store.put_if_match(key, content, tag):
                return before, after
        raise StoreError(f"{key}: others change it all the time: try again")

    def set_control(self, control: Control) -> None:
        """Write the control, in place of any other one."""
        self.store.put(keys.control(self.name), json.dumps(asdict(control)).encode())

    def notices(self) -> dict[str, Notice]:
        """Read the notices, by service; damaged ones are skipped."""
        found = {}
        for key in self.store.list(keys.notices(self.name)):
            with suppress(ObjectNotFound, ForeignObjectError, ValidationError):
                notice = TypeAdapter(Notice).validate_json(self.store.get(key, limit=_SMALL))
                found[key.removeprefix(keys.notices(self.name)).removesuffix(".json")] = notice
        return found

    def set_notice(self, source: str, notice: Notice | None) -> None:
        """Write the notice of the service `source`, in place of its last one; None removes it."""
        key = keys.notice(self.name, source)
        if notice is None:
            self.store.delete(key)
        else:
            self.store.put(key, json.dumps(asdict(notice), indent=1).encode())

    def record_failure(
        self,
        shard: Shard,
        error: str,
        traceback: str = "",
        when: str | None = None,
        origin: Origin | None = None,
    ) -> Failure:
        """Record a failed attempt at a shard.

        Args:
            shard: the shard.
            error: the reason, in one line.
            traceback: Python's traceback.
            when: time in UTC, ISO 8601; by default now.
            origin: the process that made the attempt.

        Returns:
            The failure, numbered after those on record.
        """
        when = when or datetime.now(UTC).isoformat(timespec="seconds")
        attempt = self._attempts_at(shard) + 1
        while True:
            failure = Failure(shard, attempt, error, traceback, when, origin or Origin())
            content = {"attempt": attempt, "error": error, "traceback": traceback, "when": when, "origin": asdict(failure.origin)}
            key = keys.failure(self.name, shard.first, shard.last, attempt)
            if self.store.put_if_absent(key, json.dumps(content, indent=1).encode()):
                return failure
            attempt += 1  # another worker recorded a failure at the same time

    def attempts(self) -> Counter[Shard]:
        """Count the failed attempts on record, by shard."""
        spans = (keys.parse_span(key) for key in self.store.list(keys.failures(self.name)))
        return Counter(Shard(*span) for span in spans if span)

    def _attempts_at(self, shard: Shard) -> int:
        return sum(1 for _ in self.store.list(keys.failures_of(self.name, shard.first, shard.last)))

    def retry(self, shard: Shard | None = None) -> int:
        """Clear the failures of a shard, or of all shards, and let an experiment run again that was paused because of them.

        Returns:
            The number of failure records that were removed.

        Raises:
            StoreError: the store cannot be read or written.
        """
        count = self.clear_failures(shard)
        self.change_control(_continued)
        return count

    def clear_failures(self, shard: Shard | None = None) -> int:
        """Remove the failure records of a shard, or of all shards, so that it is tried again; returns their number."""
        span = None if shard is None else (shard.first, shard.last)
        records = [key for key in self.store.list(keys.failures(self.name)) if span in (None, keys.parse_span(key))]
        for key in records:
            self.store.delete(key)
        return len(records)

    def failures(self, shard: Shard | None = None) -> Iterator[Failure]:
        """Read the failure records of a shard, or of all shards, by shard and attempt."""
        prefix = keys.failures(self.name) if shard is None else keys.failures_of(self.name, shard.first, shard.last)
        for key in self.store.list(prefix):
            if span := keys.parse_span(key):
                try:
                    content = json.loads(self.store.get(key))
                    yield Failure(Shard(*span), **content | {"origin": Origin(**content.get("origin", {}))})
                except (ValueError, TypeError, AttributeError):
                    yield Failure(Shard(*span), 0, f"{key} cannot be read", "", "")


def _continued(control: Control) -> Control:
    """Return the control of an experiment that is no longer paused because of its failures."""
    if not control.tripped:
        return control
    return replace(control, state="running" if control.state == "paused" else control.state, tripped=False)
