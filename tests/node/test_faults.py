"""Faults in training: each trial is committed once, and the scores equal those of an embedded run."""

import json
import os
import signal
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from memtail.experiment_store import ExperimentStore
from services.tools.rights import RIGHTS
from services.worker.app import WORKER_AT_FAULT
from tests.node.release import NODE, Release, Training, main_process, name_of

# Small processes allocate memory until the kernel kills the largest process of the container: the training process, or the explorer. With
# cgroups of version 2 it kills all processes.
HOG = """
import os, pathlib, signal
processes = [pathlib.Path("/proc", pid) for pid in os.listdir("/proc") if pid.isdigit()]
largest = max(processes, key=lambda process: int((process / "statm").read_text().split()[1]))
hogs = []
while largest.exists():
    reader, writer = os.pipe()
    if hog := os.fork():
        hogs.append(hog)
        os.close(writer)
        os.read(reader, 1)
    else:
        taken = bytearray(b"x") * (64 << 20)
        os.write(writer, b"x")
        signal.pause()
for hog in hogs:
    os.kill(hog, signal.SIGKILL)
"""
# Waits until the worker says why it is not ready.
READINESS = """
import time, urllib.error, urllib.request
end = time.monotonic() + 60
while time.monotonic() < end:
    try:
        urllib.request.urlopen("http://127.0.0.1:9100/readyz")
    except urllib.error.HTTPError as error:
        if "heartbeat" not in (reason := error.read().decode()):
            print(error.code, reason)
            break
    except OSError:
        pass
    time.sleep(0.05)
"""


def delete_pod(training: Training) -> None:
    training.release.kubectl("delete", "pod", name_of(training.workers()[0]))


def drain_node(training: Training) -> None:
    node = training.release.node
    node.kubectl("drain", NODE, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=300s")
    assert not training.workers()
    node.kubectl("uncordon", NODE)


def restart_kubelet(training: Training) -> None:
    node, committed = training.release.node, len(training.progress.committed)
    node.stop_kubelet()
    training.release.until(lambda: len(training.progress.committed) > committed)
    node.start_kubelet()
    node.kubectl("wait", "--for=condition=Ready", f"node/{NODE}", "--timeout=120s")


def run_out_of_memory(training: Training) -> None:
    release, pod = training.release, name_of(training.workers()[0])
    release.execute(pod, "python", "-c", HOG)
    release.until(lambda: training.progress.failed_attempts or "OOMKilled" in release.kubectl("get", "pod", pod, "--output", "yaml"))


def kill_containers(training: Training) -> None:
    """Kill all processes of a container, as the kernel does with cgroups of version 2, until it was one with a shard."""
    release, killed = training.release, set()
    while not training.progress.failed_attempts:
        release.until(training.workers)
        pod = training.workers()[0]
        killed.add(name_of(pod))
        os.kill(main_process(pod, "services.worker"), signal.SIGKILL)
        release.until(lambda pod=pod: name_of(pod) not in map(name_of, training.workers()))
        with suppress(AssertionError):
            release.until(lambda: training.progress.failed_attempts, 10)
    experiment_store = ExperimentStore(training.store, training.name)
    assert {failure.origin.host for shard in experiment_store.attempts() for failure in experiment_store.failures(shard)} <= killed


def upgrade_and_roll_back(training: Training) -> None:
    release, workers = training.release, set(map(name_of, training.workers()))
    seen = [_services(release)]
    again = {"again": uuid.uuid4().hex}
    release.helm("upgrade", "--wait", "--timeout", "5m", dispatcher__annotations=again, aggregator__annotations=again)
    seen.append(_services(release))
    release.helm("rollback", "--wait", "--timeout", "5m")
    seen.append(_services(release))
    assert all(len(services) == 2 for services in seen)
    assert not set.intersection(*seen)
    assert workers & set(map(name_of, training.workers())), "no worker was in training: declare more trials"


def add_a_worker_without_its_device(training: Training) -> None:
    release, template = training.release, training.workers()[0]
    name = f"{training.name}-without-device"
    labels = {key: value for key, value in template["metadata"]["labels"].items() if "job" not in key and "controller" not in key}
    spec = {key: value for key, value in template["spec"].items() if key != "nodeName"}
    for variable in spec["containers"][0]["env"]:
        if variable["name"] == "MEMTAIL_DEVICES":
            variable["value"] = "cuda:31"
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": spec}
    release.node.kubectl("--namespace", release.namespace, "create", "--filename", "-", stdin=json.dumps(pod))
    try:
        release.kubectl("wait", "--for=jsonpath={.status.phase}=Running", f"pod/{name}", "--timeout=120s")
        assert "503 device cuda cannot be used" in release.execute(name, "python", "-c", READINESS)
        release.kubectl("wait", "--for=jsonpath={.status.phase}=Failed", f"pod/{name}", "--timeout=120s")
        [ended] = release.node.get("pod", name, "--namespace", release.namespace)["status"]["containerStatuses"]
        assert ended["state"]["terminated"]["exitCode"] == WORKER_AT_FAULT  # it was given a shard twice, while others were being trained
        assert training.progress.failed_attempts == 0
    finally:
        release.kubectl("delete", "pod", name)


def exhaust_the_explorer(training: Training) -> None:
    release = training.release
    [explorer], [aggregator] = release.pods("explorer"), release.pods("aggregator")
    restarts = {name_of(pod): _restarts(release, pod) for pod in (explorer, aggregator)}
    release.execute(name_of(explorer), "python", "-c", HOG)
    release.until(lambda: _restarts(release, explorer) > restarts[name_of(explorer)])
    assert "OOMKilled" in release.kubectl("get", "pod", name_of(explorer), "--output", "yaml")
    release.kubectl("wait", "--for=condition=Ready", f"pod/{name_of(explorer)}", "--timeout=120s")
    committed = len(training.progress.committed)
    release.until(lambda: len(training.progress.committed) > committed)
    assert _restarts(release, aggregator) == restarts[name_of(aggregator)]


def rotate_keys(training: Training) -> None:
    """Give every component a new key of the bucket."""
    release = training.release
    pods = [release.pods(component)[0] for component in ("aggregator", "explorer")] + training.workers()
    restarts = [_restarts(release, pod) for pod in pods]
    keys = {f"s3-secret-key-{component}": uuid.uuid4().hex for component in RIGHTS}
    release.kubectl("patch", "secret", release.name, "--patch", json.dumps({"stringData": keys}))
    # its first container gives the keys to the server
    release.kubectl("rollout", "restart", f"deployment/{release.name}-dispatcher")
    release.kubectl("rollout", "status", f"deployment/{release.name}-dispatcher", "--timeout=300s")
    for pod in pods:
        key = keys[f"s3-secret-key-{pod['metadata']['labels']['app.kubernetes.io/component']}"]
        release.until(lambda pod=pod, key=key: release.execute(name_of(pod), "cat", "/run/memtail/s3-secret-key") == key, 180)
    committed = len(training.progress.committed)
    release.until(lambda: len(training.progress.committed) > committed)
    assert training.progress.failed_attempts == 0
    assert [_restarts(release, pod) for pod in pods] == restarts


FAULTS = [
    delete_pod,
    kill_containers,
    drain_node,
    restart_kubelet,
    run_out_of_memory,
    upgrade_and_roll_back,
    add_a_worker_without_its_device,
    exhaust_the_explorer,
    rotate_keys,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_in_training_changes_no_score(
    fault: Callable[[Training], None], release: Release, embedded: dict[str, bytes], tmp_path: Path
) -> None:
    training = release.submit(fault.__name__.replace("_", "-"))
    training.begin()
    fault(training)
    training.assert_complete(embedded, tmp_path)
    print(f"\n{fault.__name__}: longest time without a commit {training.longest_pause():.0f} s")


def test_workers_refuse_a_dataset_larger_than_their_cache_without_an_attempt(
    release: Release, embedded: dict[str, bytes], tmp_path: Path
) -> None:
    release.helm("upgrade", "--wait", "--timeout", "5m", workers__cache__limit=1e-6)
    training = release.submit("small-cache")
    release.until(lambda: any(f"failed: exit code {WORKER_AT_FAULT}" in line for line in training.progress.notice_lines))
    pods = f"memtail/experiment={training.name}"
    log = release.kubectl("logs", "--selector", pods, "--tail", "-1").splitlines()
    faults = {json.loads(line)["error"] for line in log if "worker at fault" in line}
    assert len(faults) == 1
    assert "more than the cache may hold" in faults.pop()
    assert "Evicted" not in release.kubectl("get", "pods", "--selector", pods, "--output", "yaml")
    assert training.progress.failed_attempts == 0
    release.helm("upgrade", "--wait", "--timeout", "5m")
    training.assert_complete(embedded, tmp_path)


def _services(release: Release) -> set[str]:
    """Return the names of the pods of dispatcher and aggregator."""
    return {name_of(pod) for component in ("dispatcher", "aggregator") for pod in release.pods(component)}


def _restarts(release: Release, pod: dict[str, Any]) -> int:
    """Return how often the container of a pod was restarted."""
    [container] = release.node.get("pod", name_of(pod), "--namespace", release.namespace)["status"]["containerStatuses"]
    restarts: int = container["restartCount"]
    return restarts
