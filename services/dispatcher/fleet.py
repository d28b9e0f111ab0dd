"""Scales the workers of a Kubernetes cluster: work-queue Jobs whose pods end when nothing is left to train.

Each pass compares the target number of workers per experiment with the existing Jobs, including those of other dispatchers. Running
workers are never removed to scale down: their number falls when they end by themselves. Only the workers of cancelled experiments are
removed at once, and those of missing ones late.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import redis
import structlog

from memtail.errors import StoreError
from memtail.experiment_store import ExperimentStore, Notice
from memtail.storage import ObjectStore
from services.common.surplus import Surplus
from services.dispatcher import metrics
from services.dispatcher.absence import Absences
from services.dispatcher.cache_fills import CACHE_LABEL, CacheFills
from services.dispatcher.cluster import Cluster
from services.dispatcher.kubernetes_objects import Job, Pod
from services.dispatcher.shares import surplus_workers, target_workers
from services.dispatcher.stalls import Stalls
from services.dispatcher.watch_cache import ClusterError, RefusedError
from services.dispatcher.worker_jobs import (
    EXPERIMENT_LABEL,
    NUMBER_LABEL,
    Demand,
    FleetSettings,
    build_job,
    shards_per_worker,
    template_hash,
)
from services.dispatcher.worker_sets import Changes, WorkerSet, failed_beyond, outdated, scale, worker_sets

log = structlog.get_logger()

T = TypeVar("T", Job, Pod)

# Failed pods of a Job that are kept for `kubectl logs` and `kubectl describe`.
_FAILED_PODS = 10
# Failed pods deleted in a pass.
_DELETIONS = 100


class Fleet:
    """Keeps the number of workers at its target.

    Args:
        settings: of the fleet.
        cluster: runs the workers.
        store: receives notices.
        surplus: tells workers to end.
    """

    def __init__(self, settings: FleetSettings, cluster: Cluster, store: ObjectStore, surplus: Surplus) -> None:
        self._settings, self._cluster, self._store, self._surplus = settings, cluster, store, surplus
        self._notices: dict[str, Notice | None] = {}
        self._exported: set[str] = set()  # experiments with series
        self._refused: dict[str, str] = {}  # why the last pass could not create a Job, by experiment
        self._absences, self._stalls, self._fills = Absences(), Stalls(), CacheFills(settings, cluster)

    def reconcile(self, demands: list[Demand], unreadable: set[str]) -> None:
        """Run one pass. After an error of the API server the next pass tries again.

        Args:
            demands: demands of the experiments in the bucket.
            unreadable: names of experiments that cannot be read; their workers are left alone.
        """
        try:
            all_jobs, all_pods = self._cluster.jobs(), self._cluster.pods()
            jobs, pods = _workers(all_jobs), _workers(all_pods)
            sets = worker_sets(jobs, pods)
            blocked = {
                demand.experiment: f"execution.workers: {violation}"
                for demand in demands
                if demand.workers and (violation := self._settings.limits.violation(demand.workers))
            }
            fills = [job for job in all_jobs if CACHE_LABEL in job.labels and job.labels[EXPERIMENT_LABEL] not in unreadable]
            allowed = [demand for demand in demands if demand.experiment not in blocked]
            blocked |= self._fills.reconcile(allowed, fills, [pod for pod in all_pods if CACHE_LABEL in pod.labels])
            per_worker = {demand.experiment: shards_per_worker(self._settings, demand.workers) for demand in demands}
            running = dict.fromkeys((worker_set.experiment for worker_set in sets), 0)
            for worker_set in sets:
                running[worker_set.experiment] += worker_set.running
            allowed = [demand for demand in demands if demand.experiment not in blocked]
            targets = dict.fromkeys(blocked, 0) | target_workers(allowed, running, self._settings.max_workers, per_worker)
            readable = [worker_set for worker_set in sets if worker_set.experiment not in unreadable]
            cancelled = [demand.experiment for demand in demands if demand.state == "cancelled"]
            templates = {demand.experiment: template_hash(self._settings, demand) for demand in allowed if demand.experiment in running}
            elastic, listed = not self._settings.queue_name, {demand.experiment for demand in demands} | unreadable
            replaced = outdated(readable, templates) | self._stalls.overdue(readable)
            changes = scale(targets, readable, cancelled, replaced, elastic)
            metrics.MISSING.set(self._absences.remove(sets, listed, elastic, changes))
            self._apply(changes, {demand.experiment: demand for demand in demands}, jobs)
            self._offer_surplus(allowed, running, per_worker, pods)
            self._report(demands, targets, sets, pods, blocked)
            self._keep_metrics_of(listed)
            # last, since a role that was made by hand may not allow it
            for pod in failed_beyond(all_pods, _FAILED_PODS)[:_DELETIONS]:
                self._cluster.delete_pod(pod)
        except (ClusterError, redis.RedisError) as error:
            log.warning("workers left as they are", error=str(error))

    def pods(self) -> list[Pod]:
        """Return the pods of all workers; none while they are unknown."""
        try:
            return _workers(self._cluster.pods())
        except ClusterError:
            return []

    def clear_metrics(self) -> None:
        """Remove all series, because another dispatcher leads and exports them."""
        self._keep_metrics_of(set())
        metrics.MISSING.set(0)

    def _keep_metrics_of(self, experiments: set[str]) -> None:
        for name in self._exported - experiments:
            metrics.WORKERS.remove_by_labels({"experiment": name})
        self._exported &= experiments

    def _apply(self, changes: Changes, demands: dict[str, Demand], jobs: list[Job]) -> None:
        """Carry out the changes. What the API server refuses is kept in `_refused`, for the notice of its experiment."""
        experiments = {job.name: job.labels.get(EXPERIMENT_LABEL, "") for job in jobs}
        before, self._refused, done = self._refused, {}, Changes()

        @contextmanager
        def refusals_of(experiment: str) -> Iterator[None]:
            try:
                yield
            except RefusedError as error:
                self._refused[experiment] = str(error)
                if before.get(experiment) != str(error):
                    log.warning("change of workers refused", experiment=experiment, error=str(error))

        for name in changes.delete:
            with refusals_of(experiments[name]):
                self._cluster.delete_job(name)
                done.delete.append(name)
        for name, workers in changes.shrink.items():
            with refusals_of(experiments[name]):
                self._cluster.shrink_job(name, workers)
                done.shrink[name] = workers
        for experiment, workers in changes.create.items():
            with refusals_of(experiment):
                number = max((int(job.labels[NUMBER_LABEL]) for job in jobs if experiments[job.name] == experiment), default=0) + 1
                owner = self._cluster.owner(self._settings.owner)
                self._cluster.create_job(build_job(self._settings, demands[experiment], number, workers, owner))
                done.create[experiment] = workers
        if done != Changes():
            log.info("workers changed", created=done.create, deleted=done.delete, shrunk=done.shrink)

    def _offer_surplus(self, demands: list[Demand], running: dict[str, int], per_worker: dict[str, int], pods: list[Pod]) -> None:
        """Tell the workers of each experiment how many of them are to end."""
        stuck = {pod.labels.get(EXPERIMENT_LABEL, "") for pod in pods if pod.problem and pod.phase == "Pending"} | self._refused.keys()
        surplus = surplus_workers(demands, running, self._settings.max_workers, per_worker, stuck)
        hosts = self._surplus.leaving()
        leaving = Counter(pod.labels.get(EXPERIMENT_LABEL, "") for pod in pods if pod.phase == "Running" and pod.name in hosts)
        self._surplus.offer({name: number - leaving[name] for name, number in surplus.items() if number > leaving[name]})

    def _report(
        self,
        demands: list[Demand],
        targets: dict[str, int],
        sets: list[WorkerSet],
        pods: list[Pod],
        blocked: dict[str, str],
    ) -> None:
        """Update the metrics and the notice of each experiment."""
        by_experiment: dict[str, list[Pod]] = {}
        for pod in pods:
            by_experiment.setdefault(pod.labels.get(EXPERIMENT_LABEL, ""), []).append(pod)
        for demand in demands:
            name = demand.experiment
            own_sets, own_pods = [worker_set for worker_set in sets if worker_set.experiment == name], by_experiment.get(name, [])
            problems = Counter(pod.problem for pod in own_pods if pod.problem)
            running, workers = sum(each.running for each in own_sets), sum(each.workers for each in own_sets)
            failed = sum(pod.phase == "Failed" for pod in own_pods)
            if targets[name] or workers or failed:
                self._exported.add(name)
                for state, count in (("wanted", targets[name]), ("running", running), ("pending", workers - running), ("failed", failed)):
                    metrics.WORKERS.labels(name, state).set(count)
            else:
                self._keep_metrics_of(self._exported - {name})
            lines = [blocked[name]] if name in blocked else []
            if targets[name] or workers:
                lines.append(f"workers: {running} running, {workers - running} pending, target {targets[name]}")
            elif demand.state == "running" and demand.outstanding and name not in blocked:
                lines.append(f"waits for workers: other experiments have all {self._settings.max_workers} (workers.max)")
            if name in self._refused:
                lines.append(f"workers cannot be changed: {self._refused[name]}")
            lines += [f"{problem} ({count} workers)" for problem, count in problems.items()]
            self._set_notice(name, Notice(tuple(lines)) if lines else None)

    def _set_notice(self, name: str, notice: Notice | None) -> None:
        try:
            experiment_store = ExperimentStore(self._store, name)
            if name not in self._notices:
                self._notices[name] = experiment_store.notices().get("fleet")
            if self._notices[name] != notice:
                experiment_store.set_notice("fleet", notice)
                self._notices[name] = notice
        except StoreError as error:
            log.warning("notice not written", experiment=name, error=str(error))


def _workers(objects: list[T]) -> list[T]:
    """Return the Jobs or pods of workers, without those that fill the cache."""
    return [each for each in objects if CACHE_LABEL not in each.labels]
