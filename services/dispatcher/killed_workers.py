"""Failures of shards whose worker was killed with its container, as by the kernel for want of memory.

Nobody in the container is left to record them. The pod says how it ended, and the lease, which nobody renews, names its shard. Workers that
were evicted, preempted or deleted are not at fault, nor are their shards.
"""

import structlog

from memtail.errors import MemtailError, UnreachableError
from memtail.experiment_store import ExperimentStore, Origin
from memtail.storage import ObjectStore
from memtail.trials import Shard
from services.common.broker import Assignment, Broker, parse_id
from services.dispatcher.kubernetes_objects import Pod

log = structlog.get_logger()


class KilledWorkers:
    """Records failures, and releases the leases, so that the shards need not wait for their end.

    A lease that is released is not found again, so each death is recorded once, also after a restart of the dispatcher.

    Args:
        store: the bucket.
        broker: holds the leases.
    """

    def __init__(self, store: ObjectStore, broker: Broker) -> None:
        self._store, self._broker = store, broker
        self._handled: set[str] = set()  # uids of pods

    def record(self, pods: list[Pod]) -> None:
        """Record the failures of killed pods.

        Raises:
            UnreachableError: the bucket does not respond; the next call tries again.
            redis.RedisError: the same for Redis.
        """
        killed = {pod.name: pod for pod in pods if pod.killed}
        if any(pod.uid not in self._handled for pod in killed.values()):
            for id_, holder in self._broker.leased().items():
                pod, parsed = killed.get(holder.partition("/")[0]), parse_id(id_)
                if pod and parsed:
                    self._record(pod, holder, *parsed)
        self._handled = {pod.uid for pod in killed.values()}

    def _record(self, pod: Pod, holder: str, experiment: str, shard: Shard) -> None:
        experiment_store = ExperimentStore(self._store, experiment)
        end = pod.problem.removeprefix("failed: ")
        error = f"the container of the worker was killed ({end}): give workers more memory (workers.resources), or fewer trials per shard"
        try:
            fingerprint = experiment_store.read_record().fingerprint
            if not experiment_store.is_committed(shard):
                attempt = experiment_store.record_failure(shard, error, origin=Origin(node=pod.node, host=pod.name)).attempt
                log.error("shard failed", experiment=experiment, shard=str(shard), attempt=attempt, error=error)
        except UnreachableError:
            raise
        except MemtailError as problem:  # its lease ends by itself
            log.warning("failure not recorded", experiment=experiment, shard=str(shard), error=str(problem))
            return
        assignment = Assignment(experiment=experiment, fingerprint=fingerprint, first=shard.first, last=shard.last)
        self._broker.release(assignment, holder)
