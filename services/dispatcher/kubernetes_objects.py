"""Jobs and pods as the fleet sees them, parsed from the API server's JSON."""

from dataclasses import dataclass
from typing import Any

# Reasons of a waiting container that no retry of the kubelet resolves by itself.
_STUCK = frozenset(("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "CreateContainerConfigError", "CreateContainerError"))


@dataclass(frozen=True)
class Job:
    """A Job.

    Attributes:
        parallelism: number of pods that the Job keeps.
        succeeded: number of pods that succeeded.
        ended: whether the Job is complete, failed, or being deleted.
    """

    name: str
    uid: str
    labels: dict[str, str]
    parallelism: int
    succeeded: int
    ended: bool


@dataclass(frozen=True)
class Pod:
    """A pod.

    Attributes:
        job: name of the pod's Job.
        problem: message why the pod cannot start, or how it failed; empty if nothing is wrong.
        reason: the same in one word, for metrics and events.
    """

    name: str
    uid: str
    job: str
    labels: dict[str, str]
    phase: str
    problem: str
    reason: str


def parse_job(item: dict[str, Any]) -> Job:
    """Parse a batch/v1 Job."""
    status = item.get("status", {})
    return Job(
        name=item["metadata"]["name"],
        uid=item["metadata"]["uid"],
        labels=item["metadata"].get("labels", {}),
        parallelism=item["spec"].get("parallelism", 1),
        succeeded=status.get("succeeded", 0),
        ended=any(each["type"] in ("Complete", "Failed") and each["status"] == "True" for each in status.get("conditions", []))
        or "deletionTimestamp" in item["metadata"],
    )


def parse_pod(item: dict[str, Any]) -> Pod:
    """Parse a v1 Pod."""
    status = item.get("status", {})
    reason, problem = _problem(status)
    labels = item["metadata"].get("labels", {})
    return Pod(
        name=item["metadata"]["name"],
        uid=item["metadata"]["uid"],
        job=labels.get("batch.kubernetes.io/job-name", ""),
        labels=labels,
        phase=status.get("phase", "Pending"),
        problem=problem,
        reason=reason,
    )


def _problem(status: dict[str, Any]) -> tuple[str, str]:
    """Explain why a pod does not run or has failed, as (reason, message); empty strings if nothing is wrong."""
    conditions = {each["type"]: each for each in status.get("conditions", [])}
    if (disruption := conditions.get("DisruptionTarget")) and disruption["status"] == "True":
        return "Disrupted", f"disrupted: {disruption.get('reason', '')}, {disruption.get('message', '')}"
    containers = status.get("initContainerStatuses", []) + status.get("containerStatuses", [])
    if status.get("phase") == "Failed":
        for container in containers:
            terminated = container.get("state", {}).get("terminated")
            if terminated and terminated["exitCode"]:
                return "Failed", f"failed: exit code {terminated['exitCode']}, {terminated.get('reason', 'Error')}"
        return "Failed", f"failed: {status.get('reason', 'no reason known')}, {status.get('message', '')}"
    if status.get("phase") == "Pending":
        for container in containers:
            waiting = container.get("state", {}).get("waiting") or {}
            if waiting.get("reason") in _STUCK:
                return waiting["reason"], f"cannot start: {waiting['reason']}, {waiting.get('message', '')}"
        scheduled = conditions.get("PodScheduled", {})
        if scheduled.get("status") == "False" and scheduled.get("reason") == "Unschedulable":
            return "Unschedulable", f"cannot be scheduled: {scheduled.get('message', '')}"
    return "", ""
