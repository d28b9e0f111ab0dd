"""Job manifests of the fleet, from the fleet's settings file and an experiment's `execution.workers`."""

import copy
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from kubernetes.utils import parse_quantity
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.alias_generators import to_camel

from memtail.spec import WorkersSpec
from services.common.settings import ServiceError
from services.dispatcher.kubernetes_objects import devices_of

#: Labels of Jobs and pods: the experiment's name, and the number of the Job within the experiment.
EXPERIMENT_LABEL, NUMBER_LABEL = "memtail/experiment", "memtail/number"
#: Label of Jobs: hash of the settings that they were created with.
TEMPLATE_LABEL = "memtail/template"
_QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
_MIN_PARALLELISM = "kueue.x-k8s.io/job-min-parallelism"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=to_camel, coerce_numbers_to_str=True)


class Limits(_Section):
    """Limits on an experiment's `execution.workers`: maxima of numbers, and lists of allowed values."""

    max_workers: int
    gpus: int
    memory: str
    cpu: str
    images: list[str]
    node_selectors: dict[str, list[str]]
    gpu_resources: list[str]
    priority_classes: list[str]
    toleration_keys: list[str]

    def violation(self, requested: WorkersSpec) -> str | None:
        """Describe the first violated limit; None if the request is allowed."""
        for key, maximum in (("max", self.max_workers), ("gpus", self.gpus), ("cpu", self.cpu), ("memory", self.memory)):
            value = getattr(requested, key)
            if value is not None and parse_quantity(value) > parse_quantity(maximum):
                return f"{key} is {value}, at most {maximum} is allowed"
        for key, allowed in (
            ("image", self.images),
            ("gpu_resource", self.gpu_resources),
            ("priority_class", self.priority_classes),
        ):
            value = getattr(requested, key)
            if value is not None and value not in allowed:
                return f"{key} is {value}, allowed: {', '.join(allowed) or 'none'}"
        for label, value in requested.node_selector.items():
            if value not in self.node_selectors.get(label, []):
                return f"node_selector {label} is {value}, allowed: {', '.join(self.node_selectors.get(label, [])) or 'none'}"
        for toleration in requested.tolerations:
            if toleration.key not in self.toleration_keys:
                return f"tolerations name {toleration.key}, allowed: {', '.join(self.toleration_keys) or 'none'}"
        return None


class FleetSettings(_Section):
    """Settings file of the fleet, named by `MEMTAIL_FLEET` (YAML, keys in camelCase).

    Attributes:
        namespace: namespace of the Jobs.
        owner: Deployment that owns the Jobs, so that they are deleted with it.
        instance: prefix of the Jobs' names, and value of their label `app.kubernetes.io/instance`.
        max_workers: maximum number of workers of all experiments together.
        queue_name: Kueue's LocalQueue that admits the Jobs; empty: no Kueue.
        limits: limits on the requests of experiments.
        job: `metadata` and `spec` of a Job, with a container called `worker`.
        fill: the same of a Job that fills the workers' shared cache, with a container that takes an experiment's name as its argument;
            None: workers fill it themselves.
    """

    namespace: str
    owner: str
    instance: str
    max_workers: int
    queue_name: str
    limits: Limits
    job: dict[str, Any]
    fill: dict[str, Any] | None = None

    @classmethod
    def load(cls, path: str) -> "FleetSettings":
        """Read the settings file. Raises: ServiceError: the file is unreadable or invalid."""
        try:
            return cls.model_validate(yaml.safe_load(Path(path).read_text()))
        except (OSError, yaml.YAMLError) as error:
            raise ServiceError(f"MEMTAIL_FLEET file {path} is unreadable ({error}): set it to the fleet's YAML file") from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise ServiceError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


@dataclass(frozen=True)
class Demand:
    """Demand of an experiment for workers.

    Attributes:
        outstanding: number of shards that are neither committed nor dead, including those in training; 0 if workers of this version do not
            train them.
        workers: the experiment's `execution.workers`.
    """

    experiment: str
    state: Literal["running", "paused", "cancelled"]
    priority: int
    outstanding: int
    workers: WorkersSpec | None = None


def build_job(settings: FleetSettings, demand: Demand, number: int, workers: int, owner: dict[str, Any]) -> dict[str, Any]:
    """Build the manifest of a Job with workers for an experiment.

    Args:
        settings: of the fleet.
        demand: demand of the experiment.
        number: number of the Job within the experiment. It is part of the Job's name, so two dispatchers cannot create the Job twice.
        workers: number of workers.
        owner: owner reference.
    """
    job, name = _template(settings, demand), demand.experiment
    labels, template = {EXPERIMENT_LABEL: name, NUMBER_LABEL: str(number)}, settings_hash(job)
    metadata, spec = job["metadata"], job["spec"]
    metadata["name"] = job_name(settings, name, str(number))
    metadata["namespace"] = settings.namespace
    metadata["ownerReferences"] = [owner]
    metadata["labels"] |= {**labels, TEMPLATE_LABEL: template}
    spec["parallelism"] = workers
    if settings.queue_name and workers > 1:  # Kueue may admit a part of the pods
        metadata["annotations"] = {**metadata.get("annotations", {}), _MIN_PARALLELISM: "1"}
    spec["template"]["metadata"]["labels"] |= labels
    return {"apiVersion": "batch/v1", "kind": "Job", **job}


def job_name(settings: FleetSettings, experiment: str, suffix: str) -> str:
    """Name a Job for an experiment."""
    slug = re.sub(r"[^a-z0-9]+", "-", experiment)[:24].strip("-")
    return f"{settings.instance[:24].rstrip('-')}-{slug}-{hashlib.sha256(experiment.encode()).hexdigest()[:6]}-{suffix}"


def template_hash(settings: FleetSettings, demand: Demand) -> str:
    """Return the hash that a Job created now would have; Jobs with another one were created with other settings."""
    return settings_hash(_template(settings, demand))


def _template(settings: FleetSettings, demand: Demand) -> dict[str, Any]:
    """Build what all Jobs of an experiment share."""
    job = copy.deepcopy(settings.job)
    metadata, spec = job.setdefault("metadata", {}), job["spec"]
    labels = metadata.setdefault("labels", {})
    if settings.queue_name:
        spec["suspend"] = True
        labels[_QUEUE_LABEL] = settings.queue_name
    pod = spec["template"]
    pod.setdefault("metadata", {}).setdefault("labels", {})
    _apply(demand.workers or WorkersSpec(), settings.limits, pod["spec"])
    _set_variable(_worker(pod["spec"]), "MEMTAIL_EXPERIMENT", demand.experiment)
    return job


def settings_hash(template: dict[str, Any]) -> str:
    """Return a hash of the settings of a Job, for its label."""
    return hashlib.sha256(json.dumps(template, sort_keys=True, default=str).encode()).hexdigest()[:16]


def shards_per_worker(settings: FleetSettings, requested: WorkersSpec | None) -> int:
    """Count the shards that a worker trains at a time: one per device."""
    if requested and requested.gpus is not None:
        return max(1, requested.gpus)
    return devices_of(settings.job["spec"]["template"]["spec"])


def _apply(requested: WorkersSpec, limits: Limits, pod: dict[str, Any]) -> None:
    container = _worker(pod)
    if requested.image:
        container["image"] = requested.image
    resources = container.setdefault("resources", {})
    for key, value in (("cpu", requested.cpu), ("memory", requested.memory)):
        if value:
            resources.setdefault("requests", {})[key] = value
            if key in resources.get("limits", {}):
                resources["limits"][key] = value
    if requested.gpus is not None or requested.gpu_resource is not None:
        _set_gpus(requested, limits, container, resources)
    for kind, amounts in resources.items():
        resources[kind] = {key: str(amount) for key, amount in amounts.items()}
    pod["nodeSelector"] = {**pod.get("nodeSelector", {}), **requested.node_selector}
    pod["tolerations"] = pod.get("tolerations", []) + [each.model_dump(exclude_none=True) for each in requested.tolerations]
    if requested.priority_class:
        pod["priorityClassName"] = requested.priority_class


def _set_gpus(requested: WorkersSpec, limits: Limits, container: dict[str, Any], resources: dict[str, Any]) -> None:
    amounts = resources.setdefault("limits", {})
    default_resource = next((key for key in amounts if key in limits.gpu_resources), None)
    resource = requested.gpu_resource or default_resource or next(iter(limits.gpu_resources), "nvidia.com/gpu")
    gpus = requested.gpus if requested.gpus is not None else int(amounts.get(default_resource, 1))
    for each in resources.values():
        each.pop(default_resource, None)
    if gpus:
        amounts[resource] = gpus
    _set_variable(container, "MEMTAIL_DEVICES", ",".join(f"cuda:{index}" for index in range(gpus)) or "cpu")


def _worker(pod: dict[str, Any]) -> dict[str, Any]:
    container: dict[str, Any] = next(each for each in pod["containers"] if each["name"] == "worker")
    return container


def _set_variable(container: dict[str, Any], name: str, value: str) -> None:
    others = [entry for entry in container.get("env", []) if entry["name"] != name]
    container["env"] = [*others, {"name": name, "value": value}]
