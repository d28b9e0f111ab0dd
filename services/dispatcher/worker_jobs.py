"""The Jobs of the fleet: what its file says, what an experiment may ask for instead, and the Job that comes of both."""

import copy
import hashlib
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
    for key, value in (("cpu", asked.cpu), ("memory", asked.memory)):
        if value:
            resources.setdefault("requests", {})[key] = value
            if key in resources.get("limits", {}):
                resources["limits"][key] = value
    if asked.gpus is not None or asked.gpu_resource is not None:
        _give_gpus(asked, limits, container, resources)
    for kind, amounts in resources.items():
        resources[kind] = {key: str(amount) for key, amount in amounts.items()}
    pod["nodeSelector"] = {**pod.get("nodeSelector", {}), **asked.node_selector}
    pod["tolerations"] = pod.get("tolerations", []) + [each.model_dump(exclude_none=True) for each in asked.tolerations]
    if asked.priority_class:
        pod["priorityClassName"] = asked.priority_class


def _give_gpus(asked: WorkersSpec, limits: Limits, container: dict[str, Any], resources: dict[str, Any]) -> None:
    given = resources.setdefault("limits", {})
    there = next((key for key in given if key in limits.gpu_resources), None)
    resource = asked.gpu_resource or there or next(iter(limits.gpu_resources), "nvidia.com/gpu")
    gpus = asked.gpus if asked.gpus is not None else int(given.get(there, 1))
    for amounts in resources.values():
        amounts.pop(there, None)
    if gpus:
        given[resource] = gpus
    _set_variable(container, "MEMTAIL_DEVICES", ",".join(f"cuda:{index}" for index in range(gpus)) or "cpu")


def _worker(pod: dict[str, Any]) -> dict[str, Any]:
    container: dict[str, Any] = next(each for each in pod["containers"] if each["name"] == "worker")
    return container


def _set_variable(container: dict[str, Any], name: str, value: str) -> None:
    others = [entry for entry in container.get("env", []) if entry["name"] != name]
    container["env"] = [*others, {"name": name, "value": value}]
