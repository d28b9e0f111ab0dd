"""Failures of shards whose worker was killed with its container, as by the kernel for want of memory.

Nobody in the container is left to record them. The pod says how it ended, and the lease, which nobody renews, names its shard. Workers that
were evicted, preempted or deleted are not at fault, nor are their shards.

Redis, where a worker can write any lease, is not trusted. A lease counts only if it was seen while the pod ran, for a shard of the
experiment that the pod's labels name, and at most one counts for each device of the pod.
"""

from collections import Counter
from collections.abc import Mapping

import structlog

from memtail.errors import MemtailError, UnreachableError
from memtail.experiment_store import ExperimentStore, Origin
from memtail.storage import ObjectStore
from memtail.trials import Shard
from services.common.broker import Assignment, Broker, parse_id
from services.dispatcher.kubernetes_objects import Pod
from services.dispatcher.worker_jobs import EXPERIMENT_LABEL

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

    def record(self, pods: list[Pod], watched: Mapping[tuple[str, str], float]) -> None:
        """Record the failures of killed pods.

        Args:
            pods: all pods of workers.
            watched: when each lease, as (id of the assignment, holder), that the last pass saw was first seen.

        Raises:
            UnreachableError: the bucket does not respond; the next call tries again.
            redis.RedisError: the same for Redis.
        """
        killed = {pod.name: pod for pod in pods if pod.killed}
        new = {name: pod for name, pod in killed.items() if pod.uid not in self._handled}
        leased, recorded = self._broker.leased() if new else {}, Counter[str]()
        for id_, holder in sorted(watched.keys() & leased.items(), key=watched.__getitem__):
            pod, parsed = new.get(holder.partition("/")[0]), parse_id(id_)
            if pod and parsed and recorded[pod.uid] < pod.devices and pod.labels.get(EXPERIMENT_LABEL, parsed[0]) == parsed[0]:
                recorded[pod.uid] += self._record(pod, holder, *parsed)
        self._handled = {pod.uid for pod in killed.values()}

    def _record(self, pod: Pod, holder: str, experiment: str, shard: Shard) -> bool:
        """Record the failure of a shard, and release its lease; returns whether the experiment has the shard."""
        experiment_store = ExperimentStore(self._store, experiment)
        end = pod.problem.removeprefix("failed: ")
        error = f"the container of the worker was killed ({end}): give workers more memory (workers.resources), or fewer trials per shard"
        try:
            record = experiment_store.read_record()
            if not record.has(shard):
                return False
            if not experiment_store.is_committed(shard):
                attempt = experiment_store.record_failure(shard, error, origin=Origin(node=pod.node, host=pod.name)).attempt
                log.error("shard failed", experiment=experiment, shard=str(shard), attempt=attempt, error=error)
        except UnreachableError:
            raise
        except MemtailError as problem:  # its lease ends by itself
            log.warning("failure not recorded", experiment=experiment, shard=str(shard), error=str(problem))
            return False
        assignment = Assignment(experiment=experiment, fingerprint=record.fingerprint, first=shard.first, last=shard.last)
        self._broker.release(assignment, holder)
        return True
