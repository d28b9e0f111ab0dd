"""Jobs and pods as the fleet sees them, parsed from the API server's JSON."""

from dataclasses import dataclass
from typing import Any

# Reasons of a waiting container that is about to start. All others are errors; their number grows with Kubernetes.
_STARTING = frozenset(("", "ContainerCreating", "PodInitializing"))
# Exit code of a container that was killed, as for want of memory where the kubelet did not see the reason. A container that the kubelet
# lost, as after a restart of the node, has it too, with a reason that says so.
_KILLED, _LOST = 137, "ContainerStatusUnknown"


@dataclass(frozen=True)
class Job:
    """A Job.

    Attributes:
        parallelism: number of pods that the Job keeps.
        succeeded: number of pods that succeeded.
        ended: whether the Job is complete, failed, or being deleted.
        suspended: whether the Job has no pods until it is admitted, as by Kueue, which may also suspend it again.
    """

    name: str
    uid: str
    labels: dict[str, str]
    parallelism: int
    succeeded: int
    ended: bool
    suspended: bool = False


@dataclass(frozen=True)
class Pod:
    """A pod.

    Attributes:
        job: name of the pod's Job.
        problem: message why the pod cannot start, or how it failed; empty if nothing is wrong.
        reason: the same in one word, for metrics and events.
        node: name of its node; empty before it has one.
        ended: time at which its last container ended, else that of its creation, ISO 8601.
        killed: whether its container was killed, but not because of a disruption or a deletion of the pod.
        devices: number of devices of its worker, each of which trains a shard.
    """

    name: str
    uid: str
    job: str
    labels: dict[str, str]
    phase: str
    problem: str
    reason: str
    node: str = ""
    ended: str = ""
    killed: bool = False
    devices: int = 1


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
        suspended=bool(item["spec"].get("suspend")),
    )


def parse_pod(item: dict[str, Any]) -> Pod:
    """Parse a v1 Pod."""
    status = item.get("status", {})
    reason, problem = _problem(status)
    labels = item["metadata"].get("labels", {})
    ends = [end["finishedAt"] for end in _terminated(status) if end.get("finishedAt")]
    return Pod(
        name=item["metadata"]["name"],
        uid=item["metadata"]["uid"],
        job=labels.get("batch.kubernetes.io/job-name", ""),
        labels=labels,
        phase=status.get("phase", "Pending"),
        problem=problem,
        reason=reason,
        node=item["spec"].get("nodeName", ""),
        ended=max(ends, default=item["metadata"].get("creationTimestamp", "")),
        killed="deletionTimestamp" not in item["metadata"] and _is_killed(status),
        devices=devices_of(item["spec"]),
    )


def devices_of(pod: dict[str, Any]) -> int:
    """Count the devices of the worker in a pod's spec."""
    variables = (entry for container in pod.get("containers", []) if container["name"] == "worker" for entry in container.get("env", []))
    return next((len(entry.get("value", "").split(",")) for entry in variables if entry["name"] == "MEMTAIL_DEVICES"), 1)


def _problem(status: dict[str, Any]) -> tuple[str, str]:
    """Explain why a pod does not run or has failed, as (reason, message); empty strings if nothing is wrong."""
    phase, conditions = status.get("phase"), {each["type"]: each for each in status.get("conditions", [])}
    if phase == "Succeeded":
        return "", ""
    if disruption := _disruption(status):
        return "Disrupted", _line("disrupted", disruption.get("reason"), disruption.get("message"))
    if phase == "Failed":
        for terminated in _terminated(status):
            reason = terminated.get("reason", "Error")
            last = terminated.get("message", "").strip().rpartition("\n")[2]  # of the log, if the container is to report it
            return "Failed" if reason == "Error" else reason, _line("failed", f"exit code {terminated['exitCode']}", reason, last)
        return status.get("reason") or "Failed", _line("failed", status.get("reason", "no reason known"), status.get("message"))
    if phase == "Pending":
        for container in _containers(status):
            waiting = container.get("state", {}).get("waiting") or {}
            if waiting.get("reason", "") not in _STARTING:
                return waiting["reason"], _line("cannot start", waiting["reason"], waiting.get("message"))
        scheduled = conditions.get("PodScheduled", {})
        if scheduled.get("status") == "False" and scheduled.get("reason") == "Unschedulable":
            return "Unschedulable", _line("cannot be scheduled", scheduled.get("message"))
    return "", ""


def _is_killed(status: dict[str, Any]) -> bool:
    """Return whether a container of a failed pod was killed. A reason of the pod itself says that the kubelet ended it."""
    if status.get("phase") != "Failed" or status.get("reason") or _disruption(status):
        return False
    ends = [(end["exitCode"], end.get("reason")) for end in _terminated(status)]
    return any(reason == "OOMKilled" or (code == _KILLED and reason != _LOST) for code, reason in ends)


def _line(what: str, *details: str | None) -> str:
    return f"{what}: {', '.join(filter(None, details))}"


def _disruption(status: dict[str, Any]) -> dict[str, Any] | None:
    """Return the condition of a pod that was evicted, preempted or lost with its node."""
    conditions: list[dict[str, Any]] = status.get("conditions", [])
    return next((each for each in conditions if each["type"] == "DisruptionTarget" and each["status"] == "True"), None)


def _containers(status: dict[str, Any]) -> list[dict[str, Any]]:
    return [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]


def _terminated(status: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the ends of the containers that ended with an error."""
    ends = (container.get("state", {}).get("terminated") for container in _containers(status))
    return [end for end in ends if end and end["exitCode"]]
