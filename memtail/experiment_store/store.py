"""`ExperimentStore`: reads and writes the objects of one experiment.

All state is in the store. Processes that train, accumulate or publish read here which trials exist, and may be killed at any moment.
"""

import json
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime

import structlog

from memtail.errors import ForeignObjectError, StoreError, UnsupportedError
from memtail.experiment_store.batch_objects import DIFFERENT, EQUAL, BatchObjects
from memtail.experiment_store.control_objects import ControlObjects
from memtail.experiment_store.finished import Finished
from memtail.experiment_store.names import experiment_names, refuse_leftovers
from memtail.experiment_store.objects import MOST_TRIES, SMALL
from memtail.experiment_store.record import Record
from memtail.experiment_store.shard_grid import missing_shards
from memtail.spec import ImportedTrainer
from memtail.spec.errors import differences
from memtail.spec.experiment import NAME
from memtail.storage import ObjectNotFound, keys
from memtail.trials import Shard

log = structlog.get_logger()

#: Number of failed attempts after which a shard is dead: not tried again.
MAX_ATTEMPTS = 3
# Limit in bytes of a batch's entry in the record of an experiment's end.
_TAGGED = 200


class ExperimentStore(BatchObjects, ControlObjects):
    """The objects of one experiment in a store.

    Args:
        store: the object store.
        name: name of the experiment.
    """

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

        More trials than recorded extend the experiment; the recorded size of shards stays. The record in the store says whether trials have
        scores (`Record.decided`).

        Raises:
            StoreError: another experiment has the name (says what differs) or left trials or scores under it, or fewer trials are asked
                for than recorded.
            UnsupportedError: with the recorded size of shards the experiment is too large.
        """
        if not self.is_registered():
            refuse_leftovers(self.store, self.name, declared.fingerprint)
        if self.store.put_if_absent(keys.experiment(self.name), (new := declared.decided()).to_bytes()):
            self.mark_changed()  # services may know a finished experiment of this name, which was removed
            return new
        extended = self._change_record(lambda held: self._extended(held, declared))
        if self.finished(extended) is None:  # it was extended, now or by a submission that was interrupted here
            self.reopen("it was submitted with more trials, other bounds, or more shards to verify")
        return extended

    def _extended(self, held: Record, declared: Record) -> Record:
        """Return the record that a declaration makes of the one in the store. Raises: StoreError: they do not go together."""
        if held.fingerprint != declared.fingerprint:
            if isinstance(held.experiment.trainer, ImportedTrainer):
                raise StoreError(
                    f"experiment '{self.name}' consists of imported trials ({held.experiment.trainer.imported}), whose masks are its "
                    "design, and cannot be extended: choose another name, and import all trials under it"
                )
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
        extended = replace(held, experiment=declared.decided(held).experiment, owner=declared.owner or held.owner)
        extended.check_limits()  # with the recorded size of shards
        return extended

    def _change_record(self, change: Callable[[Record], Record]) -> Record:
        """Replace the record by what a function makes of it, and return that, also if others do so at the same time.

        Raises:
            StoreError: the record cannot be read or written, or others change it all the time.
        """
        key = keys.experiment(self.name)
        for _ in range(MOST_TRIES):
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

        It holds until the experiment is extended or asks for other bounds, more of its shards are to be verified, or a batch is discarded.

        Args:
            record: the experiment's record.

        Raises:
            StoreError: the store cannot be read.
        """
        key, trials = keys.finished(self.name), record.experiment.subsets.trials
        try:
            finished = Finished.from_bytes(self.store.get(key, limit=SMALL + _TAGGED * trials), key)
        except ObjectNotFound:
            return None
        except ForeignObjectError as error:
            log.warning("record of the end ignored", experiment=self.name, reason=str(error))
            return None
        if finished.fingerprint != record.fingerprint or not finished.holds_for(record.experiment):
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
            for verdict in (EQUAL, DIFFERENT):  # comparisons with this batch
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
            required = str(json.loads(self.store.get(key, limit=SMALL))["kind"])
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

    def extend(self, trials: int) -> Record:
        """Raise the number of trials to `trials`, unless it is that high; returns the record in the store. Raises: StoreError."""
        return self._change_record(lambda held: held.with_trials(max(trials, held.experiment.subsets.trials)))
