"""Reasons of pods that cannot start, have failed or were disrupted."""

import pytest

from services.dispatcher.kubernetes_objects import parse_pod

EVICTED = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "Eviction API: evicting"}


def pod(phase="Failed", *, waiting=None, terminated=None, conditions=(), metadata=None, **status):
    states = [{"state": {kind: state}} for kind, state in (("waiting", waiting), ("terminated", terminated)) if state]
    return parse_pod(
        {
            "metadata": {"name": "p", "uid": "u", "labels": {}, **(metadata or {})},
            "spec": {"nodeName": "n"},
            "status": {"phase": phase, "conditions": list(conditions), "containerStatuses": states, **status},
        }
    )


@pytest.mark.parametrize(
    "reason",
    [
        "ErrImagePull",
        "ImagePullBackOff",
        "ErrImageNeverPull",
        "ImageInspectError",
        "RegistryUnavailable",
        "SignatureValidationFailed",
        "InvalidImageName",
        "CreateContainerConfigError",
        "CreateContainerError",
        "RunContainerError",
    ],
)
def test_a_container_that_cannot_start_has_its_reason(reason):
    stuck = pod("Pending", waiting={"reason": reason, "message": "details"})
    assert (stuck.reason, stuck.problem) == (reason, f"cannot start: {reason}, details")
    assert pod("Pending", waiting={"reason": reason}).problem == f"cannot start: {reason}"


@pytest.mark.parametrize("reason", ["ContainerCreating", "PodInitializing"])
def test_a_container_that_is_about_to_start_has_no_problem(reason):
    assert pod("Pending", waiting={"reason": reason}).reason == ""


def test_a_pod_that_the_node_rejects_has_its_reason():
    rejected = pod(reason="UnexpectedAdmissionError", message="Allocate failed: no healthy devices")
    assert rejected.reason == "UnexpectedAdmissionError"
    assert rejected.problem == "failed: UnexpectedAdmissionError, Allocate failed: no healthy devices"
    assert pod().reason == "Failed"


def test_an_ended_container_has_its_reason():
    killed = pod(terminated={"exitCode": 137, "reason": "OOMKilled"})
    assert (killed.reason, killed.problem) == ("OOMKilled", "failed: exit code 137, OOMKilled")
    assert pod(terminated={"exitCode": 1, "reason": "Error"}).reason == "Failed"


def test_a_completed_pod_that_is_drained_is_not_disrupted():
    assert pod("Running", conditions=[EVICTED]).reason == "Disrupted"
    assert pod("Failed", conditions=[EVICTED]).reason == "Disrupted"
    assert pod("Succeeded", conditions=[EVICTED]).reason == ""


def test_a_pod_ended_with_its_container_or_when_the_node_rejected_it():
    created = {"name": "p", "uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z"}
    ended = {"exitCode": 1, "finishedAt": "2026-01-02T00:00:00Z"}
    assert pod(terminated=ended, metadata=created).ended == "2026-01-02T00:00:00Z"
    assert pod(reason="UnexpectedAdmissionError", metadata=created).ended == "2026-01-01T00:00:00Z"


def test_a_pod_has_the_devices_of_its_worker():
    def devices(*env):
        containers = [{"name": "proxy"}, {"name": "worker", "env": list(env)}]
        return parse_pod({"metadata": {"name": "p", "uid": "u"}, "spec": {"containers": containers}}).devices

    assert devices({"name": "MEMTAIL_DEVICES", "value": "cuda:0,cuda:1"}) == 2
    assert devices({"name": "MEMTAIL_DEVICES", "value": "auto"}) == devices() == 1


def test_a_killed_container_is_told_from_a_disruption_and_a_deletion():
    out_of_memory = {"exitCode": 137, "reason": "OOMKilled"}
    for killed in (
        pod(terminated=out_of_memory),
        pod(terminated={"exitCode": 137, "reason": "Error"}),
        pod(terminated={"exitCode": 1, "reason": "OOMKilled"}),
    ):
        assert killed.killed
        assert killed.node == "n"
    for other in (
        pod(terminated={"exitCode": 1, "reason": "Error"}),
        pod(terminated=out_of_memory, conditions=[EVICTED]),
        pod(terminated=out_of_memory, reason="Evicted"),
        pod(terminated=out_of_memory, metadata={"name": "p", "uid": "u", "deletionTimestamp": "2026-01-01T00:00:00Z"}),
        pod(terminated={"exitCode": 137, "reason": "ContainerStatusUnknown", "message": "The container could not be located"}),
        pod("Running", terminated=out_of_memory),
        pod("Succeeded"),
    ):
        assert not other.killed
