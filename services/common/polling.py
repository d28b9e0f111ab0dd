"""Rules by which dispatcher and aggregator ask the bucket less often while nothing is to be trained."""

import time
from collections.abc import Collection, Hashable

from memtail.experiment_store import change_tags, experiment_names
from memtail.storage import ObjectStore

# Seconds between two listings of the names while no experiment needs work: the time until a submission is noticed.
_IDLE_SECONDS = 5.0
# Pause between two looks at an experiment in which nothing happens, as a share of the time since something did.
_PAUSE_SHARE = 0.1


class Listings:
    """Names of the experiments, and those that were marked as changed.

    Args:
        store: the bucket.
        seconds: time between two listings of the change markers.
    """

    def __init__(self, store: ObjectStore, seconds: float) -> None:
        self._store, self._seconds, self._idle_seconds = store, seconds, min(_IDLE_SECONDS, seconds)
        self._names: list[str] = []
        self._names_listed_at = self._changes_listed_at = float("-inf")
        self._tags: dict[str, str] = {}

    def names(self, at_rest: Collection[str]) -> list[str]:
        """Return the names of all experiments; while all are at rest those of a listing in the last seconds.

        Args:
            at_rest: experiments that are not looked at in this pass.
        """
        now = time.monotonic()
        if now - self._names_listed_at >= self._idle_seconds or any(name not in at_rest for name in self._names):
            self._names = experiment_names(self._store, known=at_rest)
            self._names_listed_at = now
        return self._names

    @property
    def changes_due(self) -> bool:
        """Whether it is time to list the change markers."""
        return time.monotonic() - self._changes_listed_at >= self._seconds

    def changed(self) -> set[str]:
        """List the change markers, and return the names whose marker was written since the last listing."""
        before, self._tags = self._tags, change_tags(self._store)
        self._changes_listed_at = time.monotonic()
        return {name for name, tag in self._tags.items() if before.get(name) != tag}


class Quiet:
    """Decides when an experiment that needs nothing, or that cannot be read, is looked at again: the longer it is so, the later."""

    def __init__(self) -> None:
        self._state: Hashable = None
        self._since = self._seen_at = time.monotonic()

    def seen(self, state: Hashable) -> bool:
        """Note what a look has seen, and return whether it is another state than before, which ends the quiet."""
        self._seen_at = time.monotonic()
        if state == self._state:
            return False
        self._state, self._since = state, self._seen_at
        return True

    @property
    def lasts(self) -> bool:
        """Whether the next look can wait."""
        return time.monotonic() - self._seen_at < _PAUSE_SHARE * (self._seen_at - self._since)
