"""Scales the workers of a Kubernetes cluster: work-queue Jobs whose pods end when nothing is left to train.

Each pass compares the target number of workers per experiment with the existing Jobs, including those of other dispatchers. Running
workers are never removed to scale down: their number falls when they end by themselves. Only the workers of cancelled and deleted
experiments are removed.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import structlog

from memtail.errors import StoreError
from memtail.experiment_store import ExperimentStore, Notice
from memtail.storage import ObjectStore
from services.dispatcher import metrics
from services.dispatcher.cluster import Cluster
from services.dispatcher.kubernetes_objects import Job, Pod
from services.dispatcher.watch_cache import ClusterError
from services.dispatcher.worker_jobs import EXPERIMENT_LABEL, NUMBER_LABEL, Demand, FleetSettings, build_job, shards_per_worker

log = structlog.get_logger()


@dataclass(frozen=True)
class WorkerSet:
    """Numbers of workers of a Job.

    Attributes:
        workers: pods that the Job has or is about to create.
        running: pods that run.
        winding_down: whether a pod has ended because nothing was left to train; the Job then creates no more pods.
    """

    name: str
    experiment: str
    number: int
    workers: int
    running: int
    winding_down: bool = False


@dataclass(frozen=True)
class Changes:
    """Changes of a pass.

    Attributes:
        create: workers of a Job to create, by experiment.
        delete: names of Jobs to delete.
        shrink: new number of workers by name of the Job.
    """

    create: dict[str, int] = field(default_factory=dict)
    delete: list[str] = field(default_factory=list)
    shrink: dict[str, int] = field(default_factory=dict)


def target_workers(demands: Iterable[Demand], running: dict[str, int], max_workers: int, per_worker: dict[str, int]) -> dict[str, int]:
    """Divide the fleet among experiments: each gets min(its maximum, its outstanding shards) workers while the fleet's maximum lasts.

    Experiments with a higher priority are served first, and those of equal priority get equal numbers. None takes running workers from
    another.

    Args:
        demands: demands of all experiments.
        running: running workers, by experiment.
        max_workers: maximum of all experiments together.
        per_worker: shards that a worker trains at a time, by experiment.
    """
    left = max_workers - sum(running.values())
    targets, most = {}, {}
    by_priority: dict[int, list[str]] = {}
    for demand in sorted(demands, key=lambda demand: (-demand.priority, demand.experiment)):
        name = demand.experiment
        usable = -(-demand.outstanding // per_worker.get(name, 1)) if demand.state == "running" else 0
        most[name] = min((demand.workers and demand.workers.max) or max_workers, usable)
        targets[name] = min(most[name], running.get(name, 0))
        by_priority.setdefault(demand.priority, []).append(name)
    for names in by_priority.values():
        while left > 0 and (growing := [name for name in names if targets[name] < most[name]]):
            targets[min(growing, key=targets.__getitem__)] += 1
            left -= 1
    return targets


def worker_sets(jobs: Iterable[Job], pods: Iterable[Pod]) -> list[WorkerSet]:
    """Count the workers of unfinished Jobs by their pods, since the status of a Job lags behind."""
    phases = Counter((pod.job, pod.phase) for pod in pods)
    sets = []
    for job in jobs:
        if job.ended or EXPERIMENT_LABEL not in job.labels:
            continue
        running, winding_down = phases[job.name, "Running"], bool(job.succeeded or phases[job.name, "Succeeded"])
        # a Job that winds down replaces no pods
        workers = running + phases[job.name, "Pending"] if winding_down else job.parallelism
        number = int(job.labels.get(NUMBER_LABEL, 0))
        sets.append(WorkerSet(job.name, job.labels[EXPERIMENT_LABEL], number, workers, min(workers, running), winding_down))
    return sets


def scale(targets: dict[str, int], sets: Iterable[WorkerSet], cancelled: Iterable[str], elastic: bool) -> Changes:
    """Compute the changes from the existing workers to the target.

    Args:
        targets: target number of workers, by experiment.
        sets: unfinished Jobs.
        cancelled: experiments whose workers are removed at once.
        elastic: whether the parallelism of a Job may be reduced; otherwise only whole Jobs are deleted.
    """
    changes = Changes()
    by_experiment: dict[str, list[WorkerSet]] = {name: [] for name in targets}
    for worker_set in sets:
        by_experiment.setdefault(worker_set.experiment, []).append(worker_set)
    removed = set(cancelled)
    for name, own_sets in by_experiment.items():
        if name in removed or name not in targets:
            changes.delete.extend(worker_set.name for worker_set in own_sets)
            continue
        surplus = sum(worker_set.workers for worker_set in own_sets) - targets[name]
        if surplus < 0:
            changes.create[name] = -surplus
        # only workers that are not running yet are removed, the newest Jobs' first
        for worker_set in sorted(own_sets, key=lambda worker_set: -worker_set.number):
            pending = worker_set.workers - worker_set.running
            if surplus <= 0 or pending <= 0:
                continue
            if worker_set.running == 0 and worker_set.workers <= surplus:
                changes.delete.append(worker_set.name)
                surplus -= worker_set.workers
            elif elastic and not worker_set.winding_down:
                fewer = min(pending, surplus)
                changes.shrink[worker_set.name] = worker_set.workers - fewer
                surplus -= fewer
    return changes


class Fleet:
    """Keeps the number of workers at its target.

    Args:
        settings: of the fleet.
        cluster: runs the workers.
        store: receives notices.
    """

    def __init__(self, settings: FleetSettings, cluster: Cluster, store: ObjectStore) -> None:
        self._settings, self._cluster, self._store = settings, cluster, store
        self._notices: dict[str, Notice | None] = {}
        self._exported: set[str] = set()  # experiments with series

    def reconcile(self, demands: list[Demand], unreadable: set[str]) -> None:
        """Run one pass. After an error of the API server the next pass tries again.

        Args:
            demands: demands of the experiments in the bucket.
            unreadable: names of experiments that cannot be read; their workers are left alone.
        """
        try:
            jobs, pods = self._cluster.jobs(), self._cluster.pods()
            sets = worker_sets(jobs, pods)
            violations = {
                demand.experiment: f"execution.workers: {violation}"
                for demand in demands
                if demand.workers and (violation := self._settings.limits.violation(demand.workers))
            }
            per_worker = {demand.experiment: shards_per_worker(self._settings, demand.workers) for demand in demands}
            running = dict.fromkeys((worker_set.experiment for worker_set in sets), 0)
            for worker_set in sets:
                running[worker_set.experiment] += worker_set.running
            allowed = [demand for demand in demands if demand.experiment not in violations]
            targets = dict.fromkeys(violations, 0) | target_workers(allowed, running, self._settings.max_workers, per_worker)
            readable = [worker_set for worker_set in sets if worker_set.experiment not in unreadable]
            cancelled = [demand.experiment for demand in demands if demand.state == "cancelled"]
            changes = scale(targets, readable, cancelled, elastic=not self._settings.queue_name)
            self._apply(changes, {demand.experiment: demand for demand in demands})
            self._report(demands, targets, sets, pods, violations)
            self._keep_metrics_of({demand.experiment for demand in demands} | unreadable)
        except ClusterError as error:
            log.warning("workers left as they are", error=str(error))

    def clear_metrics(self) -> None:
        """Remove all series, because another dispatcher leads and exports them."""
        self._keep_metrics_of(set())

    def _keep_metrics_of(self, experiments: set[str]) -> None:
        for name in self._exported - experiments:
            metrics.WORKERS.remove_by_labels({"experiment": name})
        self._exported &= experiments

    def _apply(self, changes: Changes, demands: dict[str, Demand]) -> None:
        for name in changes.delete:
            self._cluster.delete_job(name)
        for name, workers in changes.shrink.items():
            self._cluster.shrink_job(name, workers)
        for experiment, workers in changes.create.items():
            numbers = [int(job.labels[NUMBER_LABEL]) for job in self._cluster.jobs() if job.labels.get(EXPERIMENT_LABEL) == experiment]
            number = max(numbers, default=0) + 1
            owner = self._cluster.owner(self._settings.owner)
            self._cluster.create_job(build_job(self._settings, demands[experiment], number, workers, owner))
        if changes != Changes():
            log.info("workers changed", created=changes.create, deleted=changes.delete, shrunk=changes.shrink)

    def _report(
        self,
        demands: list[Demand],
        targets: dict[str, int],
        sets: list[WorkerSet],
        pods: list[Pod],
        violations: dict[str, str],
    ) -> None:
        """Update the metrics and the notice of each experiment."""
        by_experiment: dict[str, list[Pod]] = {}
        for pod in pods:
            by_experiment.setdefault(pod.labels.get(EXPERIMENT_LABEL, ""), []).append(pod)
        for name in [demand.experiment for demand in demands]:
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
            lines = [violations[name]] if name in violations else []
            if targets[name] or workers:
                lines.append(f"workers: {running} running, {workers - running} pending, target {targets[name]}")
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
