"""Workers of the existing Jobs, and the changes that take them to their target. Pure functions, no I/O."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from services.dispatcher.kubernetes_objects import Job, Pod
from services.dispatcher.worker_jobs import EXPERIMENT_LABEL, NUMBER_LABEL, TEMPLATE_LABEL


@dataclass(frozen=True)
class WorkerSet:
    """Numbers of workers of a Job.

    Attributes:
        workers: pods that the Job has or is about to create.
        running: pods that run.
        winding_down: whether a pod has ended because nothing was left to train; the Job then creates no more pods.
        stalled: pods that failed and that the Job has not replaced, although it is not suspended.
        template: hash of the settings that the Job was created with; empty if it was created by a version that did not record it.
    """

    name: str
    experiment: str
    number: int
    workers: int
    running: int
    winding_down: bool = False
    stalled: int = 0
    template: str = ""


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
        failed = phases[job.name, "Failed"] and not job.suspended
        stalled = max(0, workers - running - phases[job.name, "Pending"]) if failed else 0
        number, template = int(job.labels.get(NUMBER_LABEL, 0)), job.labels.get(TEMPLATE_LABEL, "")
        sets.append(
            WorkerSet(job.name, job.labels[EXPERIMENT_LABEL], number, workers, min(workers, running), winding_down, stalled, template)
        )
    return sets


def outdated(sets: Iterable[WorkerSet], templates: Mapping[str, str]) -> dict[str, int]:
    """Count the workers, by the name of their Job, that do not run and were created with other settings, which may be why.

    Args:
        sets: unfinished Jobs.
        templates: hash of the current settings, by experiment; the Jobs of an experiment without one are left alone.
    """
    return {
        each.name: each.workers - each.running
        for each in sets
        if each.workers > each.running and each.template != templates.get(each.experiment, each.template)
    }


def scale(
    targets: dict[str, int], sets: Iterable[WorkerSet], cancelled: Iterable[str], replaced: Mapping[str, int], elastic: bool
) -> Changes:
    """Compute the changes from the existing workers to the target.

    Args:
        targets: target number of workers, by experiment.
        sets: unfinished Jobs.
        cancelled: experiments whose workers are removed at once.
        replaced: numbers of workers that are to be replaced, by the name of their Job.
        elastic: whether the parallelism of a Job may be reduced; otherwise only whole Jobs are deleted.
    """
    changes = Changes()
    by_experiment: dict[str, list[WorkerSet]] = {name: [] for name in targets}
    for worker_set in sets:
        by_experiment.setdefault(worker_set.experiment, []).append(worker_set)
    removed = set(cancelled)
    for name, all_sets in by_experiment.items():
        if name not in targets and name not in removed:  # see `services.dispatcher.absence`
            continue
        if name in removed:
            changes.delete.extend(worker_set.name for worker_set in all_sets)
            continue
        own_sets = _without_replaced(all_sets, replaced, elastic, changes)
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


def failed_beyond(pods: Iterable[Pod], kept: int) -> list[str]:
    """Name the failed pods of each Job but the last `kept` ones; Kubernetes would keep them until the Job ends."""
    failed: dict[str, list[Pod]] = {}
    for pod in pods:
        if pod.phase == "Failed":
            failed.setdefault(pod.job, []).append(pod)
    return [pod.name for each in failed.values() for pod in sorted(each, key=lambda pod: pod.ended)[: max(0, len(each) - kept)]]


def _without_replaced(sets: list[WorkerSet], replaced: Mapping[str, int], elastic: bool, changes: Changes) -> list[WorkerSet]:
    """Remove the workers that are to be replaced; returns the sets that remain."""
    remaining = []
    for worker_set in sets:
        kept = worker_set.workers - replaced.get(worker_set.name, 0)
        if worker_set.name in replaced and not kept:
            changes.delete.append(worker_set.name)
            continue
        if kept < worker_set.workers and elastic and not worker_set.winding_down:
            changes.shrink[worker_set.name] = kept
            remaining.append(replace(worker_set, workers=kept))
        else:
            remaining.append(worker_set)
    return remaining
