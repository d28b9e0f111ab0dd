"""The workers of a Kubernetes cluster: as many as there is work for, in Jobs of the work-queue kind, whose workers end when none is left.

Like the queue they are reconciled: each pass compares the workers that experiments could use with the Jobs that there are, whoever made
them. A busy worker is never taken away; there are fewer when workers end by themselves, or when an experiment is cancelled.
"""

import copy
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import structlog
import yaml
from kubernetes.utils import parse_quantity
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.alias_generators import to_camel

from memtail.archive import ExperimentArchive, Notice
from memtail.errors import StoreError
from memtail.experiment import WorkersSpec
from memtail.storage import ObjectStore
from services.dispatcher import metrics
from services.dispatcher.cluster import Cluster, ClusterError, Pod
from services.settings import ServiceError

log = structlog.get_logger()

#: Labels of Jobs and pods: the experiment they work for, and the number of the Job among those of the experiment.
EXPERIMENT_LABEL, NUMBER_LABEL = "memtail/experiment", "memtail/number"
_QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
_MIN_PARALLELISM = "kueue.x-k8s.io/job-min-parallelism"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=to_camel, coerce_numbers_to_str=True)


class Limits(_Part):
    """What an experiment may ask for in its `execution.workers`; of lists and tables, what they name."""

    max_workers: int
    gpus: int
    memory: str
    cpu: str
    images: list[str]
    node_selectors: dict[str, list[str]]
    gpu_resources: list[str]
    priority_classes: list[str]
    toleration_keys: list[str]

    def violation(self, asked: WorkersSpec) -> str | None:
        """What is asked for and not allowed, in words."""
        for key, most in (("max", self.max_workers), ("gpus", self.gpus), ("cpu", self.cpu), ("memory", self.memory)):
            value = getattr(asked, key)
            if value is not None and parse_quantity(value) > parse_quantity(most):
                return f"{key} is {value}, at most {most} is allowed"
        for key, allowed in (
            ("image", self.images),
            ("gpu_resource", self.gpu_resources),
            ("priority_class", self.priority_classes),
        ):
            value = getattr(asked, key)
            if value is not None and value not in allowed:
                return f"{key} is {value}, allowed: {', '.join(allowed) or 'none'}"
        for label, value in asked.node_selector.items():
            if value not in self.node_selectors.get(label, []):
                return f"node_selector {label} is {value}, allowed: {', '.join(self.node_selectors.get(label, [])) or 'none'}"
        for toleration in asked.tolerations:
            if toleration.key not in self.toleration_keys:
                return f"tolerations name {toleration.key}, allowed: {', '.join(self.toleration_keys) or 'none'}"
        return None


class FleetSettings(_Part):
    """The file that `MEMTAIL_FLEET` names (YAML, keys in camelCase).

    Attributes:
        namespace: where Jobs are made.
        owner: the Deployment that owns them, so that they go with it.
        instance: begins their names, and is their label `app.kubernetes.io/instance`.
        max_workers: of all experiments together.
        queue_name: Kueue's local queue, which admits them; none if empty.
        limits: of what experiments may ask for.
        job: `metadata` and `spec` of a Job, with a container called `worker`.
    """

    namespace: str
    owner: str
    instance: str
    max_workers: int
    queue_name: str
    limits: Limits
    job: dict[str, Any]

    @classmethod
    def load(cls, path: str) -> "FleetSettings":
        """Read the file. Raises: ServiceError."""
        try:
            return cls.model_validate(yaml.safe_load(Path(path).read_text()))
        except (OSError, yaml.YAMLError) as error:
            raise ServiceError(f"MEMTAIL_FLEET names {path}, which cannot be read ({error}): name the fleet's YAML file") from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise ServiceError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


@dataclass(frozen=True)
class Demand:
    """The workers that an experiment could use; `outstanding` shards are neither committed nor dead: they wait, or are being trained."""

    experiment: str
    state: Literal["running", "paused", "cancelled"]
    priority: int
    outstanding: int
    workers: WorkersSpec | None = None


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


def scale(goal: dict[str, int], sets: Iterable[WorkerSet], cancelled: Iterable[str], elastic: bool) -> Changes:
    """The changes that bring the workers there are to those that are wanted.

    Args:
        goal: the workers each experiment is to have.
        sets: the Jobs that have not ended.
        cancelled: the experiments whose workers are to go at once, and do not include those that ended well.
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


def job_of(settings: FleetSettings, demand: Demand, number: int, workers: int, owner: dict[str, Any]) -> dict[str, Any]:
    """The Job that gives an experiment so many more workers.

    Args:
        settings: of the fleet.
        demand: the experiment's.
        number: of the Job among those of the experiment; its name follows from it, so that two dispatchers cannot make it twice.
        workers: how many.
        owner: the owner reference.
    """
    job = copy.deepcopy(settings.job)
    name = demand.experiment
    slug = re.sub(r"[^a-z0-9]+", "-", name)[:24].strip("-")
    labels = {EXPERIMENT_LABEL: name, NUMBER_LABEL: str(number)}
    metadata, spec = job.setdefault("metadata", {}), job["spec"]
    metadata["name"] = f"{settings.instance[:24].rstrip('-')}-{slug}-{hashlib.sha256(name.encode()).hexdigest()[:6]}-{number}"
    metadata["namespace"] = settings.namespace
    metadata["ownerReferences"] = [owner]
    metadata["labels"] = {**metadata.get("labels", {}), **labels}
    spec["parallelism"] = workers
    if settings.queue_name:
        spec["suspend"] = True
        metadata["labels"][_QUEUE_LABEL] = settings.queue_name
        if workers > 1:  # fewer of them may start when there is no room for all
            metadata["annotations"] = {**metadata.get("annotations", {}), _MIN_PARALLELISM: "1"}
    pod = spec["template"]
    pod_labels = pod.setdefault("metadata", {}).get("labels", {})
    pod["metadata"]["labels"] = {**pod_labels, **labels}
    _apply(demand.workers or WorkersSpec(), settings.limits, pod["spec"])
    _set_variable(_worker(pod["spec"]), "MEMTAIL_EXPERIMENT", name)
    return {"apiVersion": "batch/v1", "kind": "Job", **job}


def shards_per_worker(settings: FleetSettings, asked: WorkersSpec | None) -> int:
    """How many shards a worker trains at a time: one on each of its devices."""
    if asked and asked.gpus is not None:
        return max(1, asked.gpus)
    variables = _worker(settings.job["spec"]["template"]["spec"]).get("env", [])
    return next((len(entry["value"].split(",")) for entry in variables if entry["name"] == "MEMTAIL_DEVICES"), 1)


def _apply(asked: WorkersSpec, limits: Limits, pod: dict[str, Any]) -> None:
    container = _worker(pod)
    if asked.image:
        container["image"] = asked.image
    resources = container.setdefault("resources", {})
    amounts: dict[str, str] = {key: value for key, value in (("cpu", asked.cpu), ("memory", asked.memory)) if value}
    for kind in ("requests", "limits"):
        if amounts and (kind == "requests" or resources.get("limits")):
            resources[kind] = {**resources.get(kind, {}), **{key: value for key, value in amounts.items() if _sets(resources, kind, key)}}
    if asked.gpus is not None or asked.gpu_resource is not None:
        _give_gpus(asked, limits, container, resources)
    for kind in ("requests", "limits"):
        if kind in resources:
            resources[kind] = {key: str(value) for key, value in resources[kind].items()}
    pod["nodeSelector"] = {**pod.get("nodeSelector", {}), **asked.node_selector}
    pod["tolerations"] = pod.get("tolerations", []) + [each.model_dump(exclude_none=True) for each in asked.tolerations]
    if asked.priority_class:
        pod["priorityClassName"] = asked.priority_class


def _sets(resources: dict[str, Any], kind: str, key: str) -> bool:
    """Whether an amount that is asked for is set there: always as a request, as a limit only in place of another."""
    return kind == "requests" or key in resources.get("limits", {})


def _give_gpus(asked: WorkersSpec, limits: Limits, container: dict[str, Any], resources: dict[str, Any]) -> None:
    given = resources.get("limits", {})
    there = next((key for key in given if key in limits.gpu_resources), None)
    resource = asked.gpu_resource or there or next(iter(limits.gpu_resources), "nvidia.com/gpu")
    gpus = asked.gpus if asked.gpus is not None else int(given.get(there, 1)) if there else 1
    for kind in ("requests", "limits"):
        if kind in resources:
            resources[kind] = {key: value for key, value in resources[kind].items() if key != there}
    if gpus:
        resources["limits"] = {**resources.get("limits", {}), resource: gpus}
    _set_variable(container, "MEMTAIL_DEVICES", ",".join(f"cuda:{index}" for index in range(gpus)) or "cpu")


def _worker(pod: dict[str, Any]) -> dict[str, Any]:
    container: dict[str, Any] = next(each for each in pod["containers"] if each["name"] == "worker")
    return container


def _set_variable(container: dict[str, Any], name: str, value: str) -> None:
    others = [entry for entry in container.get("env", []) if entry["name"] != name]
    container["env"] = [*others, {"name": name, "value": value}]


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

    def reconcile(self, demands: list[Demand], unknown: set[str]) -> None:
        """One pass. What the API server refuses now is tried again by the next.

        Args:
            demands: of the experiments in the bucket.
            unknown: experiments that cannot be read at present; their workers are left alone.
        """
        try:
            sets, pods = self._observe()
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
            changes = scale(goal, known, self._cancelled(demands), not self._settings.queue_name)
            self._change(changes, {each.experiment: each for each in demands})
            self._tell(demands, goal, sets, pods, refused)
        except ClusterError as error:
            log.warning("workers left as they are", error=str(error))

    def _observe(self) -> tuple[list[WorkerSet], dict[str, list[Pod]]]:
        jobs, pods = self._cluster.jobs(), self._cluster.pods()
        running: dict[str, int] = {}
        by_experiment: dict[str, list[Pod]] = {}
        for pod in pods:
            by_experiment.setdefault(pod.labels.get(EXPERIMENT_LABEL, ""), []).append(pod)
            if pod.phase == "Running":
                running[pod.job] = running.get(pod.job, 0) + 1
        sets = []
        for job in jobs:
            if not job.ended and EXPERIMENT_LABEL in job.labels:
                workers = job.active if job.succeeded else job.parallelism
                name, number = job.labels[EXPERIMENT_LABEL], int(job.labels.get(NUMBER_LABEL, 0))
                sets.append(WorkerSet(job.name, name, number, workers, min(workers, running.get(job.name, 0)), job.succeeded > 0))
        return sets, by_experiment

    def _cancelled(self, demands: list[Demand]) -> list[str]:
        return [demand.experiment for demand in demands if demand.state == "cancelled"]

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
        pods: dict[str, list[Pod]],
        refused: dict[str, str],
    ) -> None:
        metrics.WORKERS.clear()
        for name in [demand.experiment for demand in demands]:
            theirs = [each for each in sets if each.experiment == name]
            troubles = dict.fromkeys(pod.trouble for pod in pods.get(name, []) if pod.trouble)
            running, workers = sum(each.running for each in theirs), sum(each.workers for each in theirs)
            failed = sum(pod.phase == "Failed" for pod in pods.get(name, []))
            if goal[name] or workers or failed:
                for state, count in (("wanted", goal[name]), ("running", running), ("pending", workers - running), ("failed", failed)):
                    metrics.WORKERS.labels(name, state).set(count)
            lines = [refused[name]] if name in refused else []
            if goal[name] or workers:
                lines.append(f"{running} workers run, {workers - running} are to start, {goal[name]} are wanted")
            lines += [f"{trouble} ({sum(pod.trouble == trouble for pod in pods[name])} workers)" for trouble in troubles]
            self._give_notice(name, Notice(tuple(lines)) if lines else None)

    def _give_notice(self, name: str, notice: Notice | None) -> None:
        try:
            archive = ExperimentArchive(self._store, name)
            if name not in self._notices:
                self._notices[name] = archive.notices().get("fleet")
            if self._notices[name] != notice:
                archive.set_notice("fleet", notice)
                self._notices[name] = notice
        except StoreError as error:
            log.warning("notice not given", experiment=name, error=str(error))
