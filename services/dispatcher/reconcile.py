"""What is to be done, from what is wanted and what there is: pure functions, without a broker or a store.

Every pass starts from the state of things, not from what happened since the last one. Whatever was lost on the way (a message, a worker,
all of Redis, the dispatcher itself) is therefore made good by the next pass.
"""

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from memtail.experiment_store import MAX_ATTEMPTS, Control, missing_shards
from memtail.trials import Shard
from services.common.broker import Assignment


@dataclass
class View:
    """One experiment as a pass finds it.

    Attributes:
        missing: the shards still to be trained, dead ones included, by first trial.
        attempts: the failed attempts that are on record, by shard.
    """

    name: str
    fingerprint: str
    missing: Collection[Shard]
    control: Control = field(default_factory=Control)
    attempts: Counter[Shard] = field(default_factory=Counter)

    def assignment(self, shard: Shard) -> Assignment:
        """The message that has a shard trained."""
        return Assignment(experiment=self.name, fingerprint=self.fingerprint, first=shard.first, last=shard.last)


def shards_missing(trials: int, trials_per_shard: int, committed: set[Shard]) -> list[Shard]:
    """What is not committed of trials 0 to `trials` - 1, by first trial; as `missing_shards`, but quick where all is cut alike."""
    grid = [Shard(first, min(first + trials_per_shard, trials) - 1) for first in range(0, trials, trials_per_shard)]
    absent = [shard for shard in grid if shard not in committed]
    if len(grid) - len(absent) == len(committed):
        return absent
    # batches of another length, from before the experiment was extended
    return missing_shards(trials, trials_per_shard, sorted(committed, key=lambda shard: shard.first))


@dataclass(frozen=True)
class Plan:
    """What a pass does.

    Attributes:
        send: assignments to put into the queue, the most urgent first.
        clear: whether to empty the queue before, since what waits in it is no longer wanted, or not so soon.
        lost: shards whose worker has vanished so often that it counts as a failure.
        outstanding: of each experiment, how many shards are neither committed nor dead.
        dead: of each experiment, the shards that failed too often.
    """

    send: list[Assignment]
    clear: bool
    lost: list[Assignment]
    outstanding: dict[str, int]
    dead: dict[str, list[Shard]]

    @classmethod
    def of_all(cls, plans: Iterable["Plan"]) -> "Plan":
        """The plans for several queues as one."""
        joined = cls([], False, [], {}, {})
        for plan in plans:
            joined = cls(
                joined.send + plan.send,
                joined.clear or plan.clear,
                joined.lost + plan.lost,
                joined.outstanding | plan.outstanding,
                joined.dead | plan.dead,
            )
        return joined


def reconcile(
    views: Iterable[View],
    queued: list[Assignment],
    busy: set[str],
    starts: dict[str, int],
    *,
    max_starts: int,
    max_queued: int,
) -> Plan:
    """Decide what a pass does.

    Args:
        views: the experiments that share a queue.
        queued: what waits in their queue, in its order.
        busy: ids of the assignments that are leased, or on their way from the queue to a lease.
        starts: how often each was begun and did not end in order, by id; of a busy one that is one more than its worker vanished.
        max_starts: vanished workers that count as one failure.
        max_queued: assignments in the queue at most.
    """
    wanted: list[Assignment] = []
    lost: list[Assignment] = []
    outstanding: dict[str, int] = {}
    dead: dict[str, list[Shard]] = {}
    priority: dict[str, int] = {}  # of those that run
    waiting = {assignment.id for assignment in queued}
    for view in sorted(views, key=lambda view: (-view.control.priority, view.name)):
        failed = {shard for shard, attempts in view.attempts.items() if attempts >= MAX_ATTEMPTS}
        dead[view.name] = sorted((shard for shard in failed if shard in view.missing), key=lambda shard: shard.first)
        outstanding[view.name] = len(view.missing) - len(dead[view.name])
        if view.control.state != "running":
            continue
        priority[view.name] = view.control.priority
        for shard in view.missing:
            if len(wanted) >= max_queued + len(queued):
                break
            assignment = view.assignment(shard)
            if shard in failed or assignment.id in busy:
                continue
            if starts.get(assignment.id, 0) >= max_starts:
                lost.append(assignment)
            else:
                wanted.append(assignment)
    send = [assignment for assignment in wanted if assignment.id not in waiting][: max(0, max_queued - len(queued))]
    clear = any(assignment.experiment not in priority for assignment in queued) or _more_urgent(send, queued, priority)
    return Plan(wanted[:max_queued] if clear else send, clear, lost, outstanding, dead)


def _more_urgent(send: list[Assignment], queued: list[Assignment], priority: dict[str, int]) -> bool:
    """Whether something to be sent would wait behind something less urgent."""
    if not queued or not send:
        return False
    return priority[send[0].experiment] > min(priority.get(assignment.experiment, 0) for assignment in queued)
