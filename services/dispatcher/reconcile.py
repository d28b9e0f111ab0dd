"""Decides which shards to send, from the declared experiments and the state of the bucket and the broker. Pure functions, no I/O.

Each pass compares states and does not depend on the events before it. Whatever was lost (a message, a worker, all of Redis, the dispatcher
itself) is therefore repaired by the next pass.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice, zip_longest

from memtail.experiment_store import MAX_ATTEMPTS, Control, missing_shards
from memtail.trials import Shard
from services.common.broker import Assignment

# Share of the queue for experiments that only workers of another version train. If there are no such workers, the messages stay.
_UNSUPPORTED_SHARE = 0.1


@dataclass
class View:
    """State of an experiment in the bucket, as read by a pass.

    Attributes:
        missing: shards that are not committed, including dead ones, ordered by first trial.
        attempts: recorded failed attempts per shard.
        resting: shards that failed recently, whose next attempt waits.
        unverified: committed shards to train a second time.
        supported: whether workers of the dispatcher's version train the experiment.
        served_at: when a worker last began a shard, as seconds of any clock.
    """

    name: str
    fingerprint: str
    missing: Collection[Shard]
    control: Control = field(default_factory=Control)
    attempts: Counter[Shard] = field(default_factory=Counter)
    resting: Collection[Shard] = ()
    unverified: Collection[Shard] = ()
    supported: bool = True
    served_at: float = float("-inf")

    @property
    def trains(self) -> bool:
        """Whether the experiment is running and has shards to train."""
        return self.control.state == "running" and bool(self.missing or self.unverified)

    def assignment(self, shard: Shard) -> Assignment:
        """Create the message that assigns a shard to a worker."""
        return Assignment(experiment=self.name, fingerprint=self.fingerprint, first=shard.first, last=shard.last)


def shards_missing(trials: int, trials_per_shard: int, committed: set[Shard]) -> list[Shard]:
    """List the shards to train of trials 0 to `trials` - 1, ordered by first trial.

    Equals `missing_shards`, but is faster where all committed shards lie on the grid of `trials_per_shard`.
    """
    grid = [Shard(first, min(first + trials_per_shard, trials) - 1) for first in range(0, trials, trials_per_shard)]
    absent = [shard for shard in grid if shard not in committed]
    if len(grid) - len(absent) == len(committed):
        return absent
    # the last shard before an extension may be shorter than the grid's
    return missing_shards(trials, trials_per_shard, sorted(committed, key=lambda shard: shard.first))


@dataclass(frozen=True)
class Actions:
    """Decisions of a pass.

    Attributes:
        send: assignments to queue, most urgent first; second trainings come last, and only where there is room.
        clear: whether to clear the queue before, because its messages are obsolete or less urgent than those in `send`.
        lost: assignments that lost `max_starts` workers, which counts as a failed attempt.
        outstanding: number of shards that are neither committed nor dead, by experiment.
        dead: shards without attempts left, by experiment.
    """

    send: list[Assignment]
    clear: bool
    lost: list[Assignment]
    outstanding: dict[str, int]
    dead: dict[str, list[Shard]]

    @classmethod
    def merge(cls, parts: Iterable["Actions"]) -> "Actions":
        """Combine the actions of several queues."""
        merged = cls([], False, [], {}, {})
        for part in parts:
            merged = cls(
                merged.send + part.send,
                merged.clear or part.clear,
                merged.lost + part.lost,
                merged.outstanding | part.outstanding,
                merged.dead | part.dead,
            )
        return merged


def reconcile(
    views: Collection[View],
    queued: list[Assignment],
    busy: set[str],
    losses: Mapping[str, int],
    *,
    max_starts: int,
    max_queued: int,
) -> Actions:
    """Decide on the actions for one queue.

    Args:
        views: experiments that share the queue.
        queued: assignments in the queue, in its order.
        busy: ids of assignments that are leased, or in transit from the queue to a lease.
        losses: lost workers per assignment id.
        max_starts: number of lost workers that counts as one failed attempt.
        max_queued: maximum length of the queue.
    """
    lost: list[Assignment] = []
    outstanding: dict[str, int] = {}
    dead: dict[str, list[Shard]] = {}
    by_priority: dict[int, list[Iterator[Assignment]]] = {}  # the shards to train of running experiments
    priorities: dict[str, int] = {}
    queued_ids = {assignment.id for assignment in queued}
    left_to_others = max(1, int(_UNSUPPORTED_SHARE * max_queued))

    def to_train(view: View, exhausted: set[Shard]) -> Iterator[Assignment]:
        nonlocal left_to_others
        for shard in view.missing:
            if not (view.supported or left_to_others):
                return
            assignment = view.assignment(shard)
            if shard in exhausted or shard in view.resting or assignment.id in busy:
                continue
            if losses.get(assignment.id, 0) >= max_starts:
                lost.append(assignment)
            else:
                left_to_others -= not view.supported
                yield assignment

    # the one that has waited longest comes first, since the queue may not have room for a shard of each
    for view in sorted(views, key=lambda view: (-view.control.priority, view.served_at, view.name)):
        exhausted = {shard for shard, attempts in view.attempts.items() if attempts >= MAX_ATTEMPTS}
        dead[view.name] = sorted((shard for shard in exhausted if shard in view.missing), key=lambda shard: shard.first)
        outstanding[view.name] = len(view.missing) - len(dead[view.name])
        if view.control.state == "running":
            priorities[view.name] = view.control.priority
            by_priority.setdefault(view.control.priority, []).append(to_train(view, exhausted))
    ready = list(islice(chain.from_iterable(map(_take_turns, by_priority.values())), max_queued + len(queued)))
    send = [assignment for assignment in ready if assignment.id not in queued_ids][: max(0, max_queued - len(queued))]
    clear = (
        any(assignment.experiment not in priorities for assignment in queued)
        or _is_more_urgent(send, queued, priorities)
        or _waits_behind_others(ready[:max_queued], queued, priorities)
    )
    chosen = ready[:max_queued] if clear else send
    room = max(0, max_queued - len(chosen) - (0 if clear else len(queued)))
    verifications = (each for each in _verifications(views, busy, losses, max_starts) if clear or each.id not in queued_ids)
    return Actions(chosen + list(islice(verifications, room)), clear, lost, outstanding, dead)


def _verifications(views: Iterable[View], busy: set[str], losses: Mapping[str, int], max_starts: int) -> Iterator[Assignment]:
    """Yield assignments of shards to train a second time; a shard that failed often, or lost its workers, is not verified."""
    for view in sorted(views, key=lambda view: (-view.control.priority, view.name)):
        for shard in view.unverified if view.control.state == "running" else ():
            assignment = view.assignment(shard)
            tried = view.attempts[shard] >= MAX_ATTEMPTS or shard in view.resting
            if not tried and assignment.id not in busy and losses.get(assignment.id, 0) < max_starts:
                yield assignment


def _take_turns(iterators: list[Iterator[Assignment]]) -> Iterator[Assignment]:
    """Yield one assignment of each iterator in turn, until all are exhausted."""
    return (assignment for turn in zip_longest(*iterators) for assignment in turn if assignment is not None)


def _is_more_urgent(send: list[Assignment], queued: list[Assignment], priorities: dict[str, int]) -> bool:
    """Return whether an assignment to send has a higher priority than one in the queue."""
    if not queued or not send:
        return False
    return priorities[send[0].experiment] > min(priorities.get(assignment.experiment, 0) for assignment in queued)


def _waits_behind_others(ready: list[Assignment], queued: list[Assignment], priorities: dict[str, int]) -> bool:
    """Return whether an experiment has shards among those to queue, and none in a queue that holds those of others of its priority."""
    there = {assignment.experiment for assignment in queued}
    levels = {priorities.get(name) for name in there}
    return any(assignment.experiment not in there and priorities[assignment.experiment] in levels for assignment in ready)
