"""The workers of a Kubernetes cluster: as many as there is work for, in Jobs of the work-queue kind, whose workers end when none is left.

Like the queue they are reconciled: each pass compares the workers that experiments could use with the Jobs that there are, whoever made
them. A busy worker is never taken away; there are fewer when workers end by themselves, or when an experiment is cancelled.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import structlog

from memtail.errors import StoreError
from memtail.experiment_store import ExperimentStore, Notice
from memtail.storage import ObjectStore
from services.dispatcher import metrics
from services.dispatcher.cluster import Cluster, ClusterError, Job, Pod
from services.dispatcher.worker_jobs import EXPERIMENT_LABEL, NUMBER_LABEL, Demand, FleetSettings, job_of, shards_per_worker

log = structlog.get_logger()


@dataclass(frozen=True)
class WorkerSet:
    """A Job and its pods, as far as their number matters.

    Attributes:
        workers: pods that it has or is about to have.
        running: those that run.
        winding_down: whether one has ended because nothing was left; then no more are started.
    """

    name: str
    experiment: str
    number: int
    workers: int
    running: int
    winding_down: bool = False


@dataclass(frozen=True)
class Changes:
    """What a pass does: Jobs to make, as workers by experiment; Jobs to remove; and those to have fewer workers."""

    create: dict[str, int] = field(default_factory=dict)
    delete: list[str] = field(default_factory=list)
    shrink: dict[str, int] = field(default_factory=dict)


def wanted(demands: Iterable[Demand], running: dict[str, int], max_workers: int, per_worker: dict[str, int]) -> dict[str, int]:
    """How many workers each experiment is to have: min(its maximum, its outstanding shards), while the fleet's maximum lasts.

    Experiments of a higher priority are served first; workers that run are not taken from the others for them.

    Args:
        demands: of all experiments.
        running: the workers that run, by experiment.
        max_workers: of all together.
        per_worker: the shards that a worker trains at a time, by experiment.
    """
    left = max_workers - sum(running.values())
    result = {}
    for demand in sorted(demands, key=lambda demand: (-demand.priority, demand.experiment)):
        name, runs = demand.experiment, running.get(demand.experiment, 0)
        could_use = -(-demand.outstanding // per_worker.get(name, 1)) if demand.state == "running" else 0
        most = (demand.workers and demand.workers.max) or max_workers
        result[name] = min(most, could_use, runs + max(0, left))
        left -= max(0, result[name] - runs)
    return result


def worker_sets(jobs: Iterable[Job], pods: Iterable[Pod]) -> list[WorkerSet]:
    """The Jobs that have not ended, with what their pods say of them: what a Job counts itself is often behind its pods."""
    phases = Counter((pod.job, pod.phase) for pod in pods)
    sets = []
    for job in jobs:
        if job.ended or EXPERIMENT_LABEL not in job.labels:
            continue
        running, winding_down = phases[job.name, "Running"], bool(job.succeeded or phases[job.name, "Succeeded"])
        # one that winds down has no more than it has
        workers = running + phases[job.name, "Pending"] if winding_down else job.parallelism
        number = int(job.labels.get(NUMBER_LABEL, 0))
        sets.append(WorkerSet(job.name, job.labels[EXPERIMENT_LABEL], number, workers, min(workers, running), winding_down))
    return sets


def scale(goal: dict[str, int], sets: Iterable[WorkerSet], cancelled: Iterable[str], elastic: bool) -> Changes:
    """The changes that bring the workers there are to those that are wanted.

    Args:
        goal: the workers each experiment is to have.
        sets: the Jobs that have not ended.
        cancelled: the experiments whose workers are to go at once.
        elastic: whether a Job may be given fewer workers; else only whole Jobs are removed.
    """
    changes = Changes()
    by_experiment: dict[str, list[WorkerSet]] = {name: [] for name in goal}
    for each in sets:
        by_experiment.setdefault(each.experiment, []).append(each)
    gone = set(cancelled)
    for name, theirs in by_experiment.items():
        if name in gone or name not in goal:
            changes.delete.extend(each.name for each in theirs)
            continue
        surplus = sum(each.workers for each in theirs) - goal[name]
        if surplus < 0:
            changes.create[name] = -surplus
        # workers that do not run yet are not needed any more
        for each in sorted(theirs, key=lambda each: -each.number):
            waiting = each.workers - each.running
            if surplus <= 0 or waiting <= 0:
                continue
            if each.running == 0 and each.workers <= surplus:
                changes.delete.append(each.name)
                surplus -= each.workers
            elif elastic and not each.winding_down:
                fewer = min(waiting, surplus)
                changes.shrink[each.name] = each.workers - fewer
                surplus -= fewer
    return changes


class Fleet:
    """Keeps the right number of workers.

    Args:
        settings: of the fleet.
        cluster: where they run.
        store: where notices are left.
    """

    def __init__(self, settings: FleetSettings, cluster: Cluster, store: ObjectStore) -> None:
        self._settings, self._cluster, self._store = settings, cluster, store
        self._notices: dict[str, Notice | None] = {}
        self._shown: set[str] = set()  # the experiments whose workers the metrics show

    def reconcile(self, demands: list[Demand], unknown: set[str]) -> None:
        """One pass. What the API server refuses now is tried again by the next.

        Args:
            demands: of the experiments in the bucket.
            unknown: experiments that cannot be read at present; their workers are left alone.
        """
        try:
            jobs, pods = self._cluster.jobs(), self._cluster.pods()
            sets = worker_sets(jobs, pods)
            refused = {
                demand.experiment: f"execution.workers: {violation}"
                for demand in demands
                if demand.workers and (violation := self._settings.limits.violation(demand.workers))
            }
            per_worker = {demand.experiment: shards_per_worker(self._settings, demand.workers) for demand in demands}
            running = dict.fromkeys((each.experiment for each in sets), 0)
            for each in sets:
                running[each.experiment] += each.running
            allowed = [demand for demand in demands if demand.experiment not in refused]
            goal = dict.fromkeys(refused, 0) | wanted(allowed, running, self._settings.max_workers, per_worker)
            known = [each for each in sets if each.experiment not in unknown]
            cancelled = [demand.experiment for demand in demands if demand.state == "cancelled"]
            changes = scale(goal, known, cancelled, elastic=not self._settings.queue_name)
            self._change(changes, {each.experiment: each for each in demands})
            self._tell(demands, goal, sets, pods, refused)
            self._keep_only({demand.experiment for demand in demands} | unknown)
        except ClusterError as error:
            log.warning("workers left as they are", error=str(error))

    def hide(self) -> None:
        """Another dispatcher acts, and shows the workers."""
        self._keep_only(set())

    def _keep_only(self, experiments: set[str]) -> None:
        for name in self._shown - experiments:
            metrics.WORKERS.remove_by_labels({"experiment": name})
        self._shown &= experiments

    def _change(self, changes: Changes, demands: dict[str, Demand]) -> None:
        for name in changes.delete:
            self._cluster.delete_job(name)
        for name, workers in changes.shrink.items():
            self._cluster.shrink_job(name, workers)
        for experiment, workers in changes.create.items():
            numbers = [int(job.labels[NUMBER_LABEL]) for job in self._cluster.jobs() if job.labels.get(EXPERIMENT_LABEL) == experiment]
            number = max(numbers, default=0) + 1
            owner = self._cluster.owner(self._settings.owner)
            self._cluster.create_job(job_of(self._settings, demands[experiment], number, workers, owner))
        if changes != Changes():
            log.info("workers changed", made=changes.create, removed=changes.delete, fewer=changes.shrink)

    def _tell(
        self,
        demands: list[Demand],
        goal: dict[str, int],
        sets: list[WorkerSet],
        pods: list[Pod],
        refused: dict[str, str],
    ) -> None:
        pods_of: dict[str, list[Pod]] = {}
        for pod in pods:
            pods_of.setdefault(pod.labels.get(EXPERIMENT_LABEL, ""), []).append(pod)
        for name in [demand.experiment for demand in demands]:
            theirs = [each for each in sets if each.experiment == name]
            troubles = Counter(pod.trouble for pod in pods_of.get(name, []) if pod.trouble)
            running, workers = sum(each.running for each in theirs), sum(each.workers for each in theirs)
            failed = sum(pod.phase == "Failed" for pod in pods_of.get(name, []))
            if goal[name] or workers or failed:
                self._shown.add(name)
                for state, count in (("wanted", goal[name]), ("running", running), ("pending", workers - running), ("failed", failed)):
                    metrics.WORKERS.labels(name, state).set(count)
            else:
                self._keep_only(self._shown - {name})
            lines = [refused[name]] if name in refused else []
            if goal[name] or workers:
                lines.append(f"{running} workers run, {workers - running} are to start, {goal[name]} are wanted")
            lines += [f"{trouble} ({count} workers)" for trouble, count in troubles.items()]
            self._give_notice(name, Notice(tuple(lines)) if lines else None)

    def _give_notice(self, name: str, notice: Notice | None) -> None:
        try:
            experiment_store = ExperimentStore(self._store, name)
            if name not in self._notices:
                self._notices[name] = experiment_store.notices().get("fleet")
            if self._notices[name] != notice:
                experiment_store.set_notice("fleet", notice)
                self._notices[name] = notice
        except StoreError as error:
            log.warning("notice not given", experiment=name, error=str(error))
