"""`ControlObjects`: control, notices and failures of an experiment in a store."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime

from pydantic import TypeAdapter, ValidationError

from memtail.errors import ForeignObjectError, StoreError
from memtail.experiment_store.control import Control, Failure, Notice, Origin
from memtail.experiment_store.objects import MOST_TRIES, SMALL, ExperimentObjects
from memtail.storage import ObjectNotFound, keys
from memtail.trials import Shard


class ControlObjects(ExperimentObjects):
    """The part of `ExperimentStore` about control, notices and failures."""

    def control(self) -> Control:
        """Read the control; the default one if none was set. Raises: StoreError: it is corrupt, or the store cannot be read."""
        key = keys.control(self.name)
        try:
            return self._parsed_control(self.store.get(key, limit=SMALL))
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
        for _ in range(MOST_TRIES):
            try:
                data, tag = self.store.get_tagged(key, limit=SMALL)
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
                notice = TypeAdapter(Notice).validate_json(self.store.get(key, limit=SMALL))
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
