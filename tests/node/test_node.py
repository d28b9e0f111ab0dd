"""The images and the chart on a real node: scaling from and to zero workers, and faults. Run by `make test-node`."""

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
from tests.e2e.deployment import WORKER, docker
from tests.node.release import NODE, TRIALS, Release, Training, main_process

# The only file that names the experiment.
SUMMARY = "summary.json"
# Small processes allocate memory until the kernel kills the largest process of the container, which is the training process; with cgroups
# of version 2 it kills all processes.
HOG = """
import os, pathlib, signal
processes = [pathlib.Path("/proc", pid) for pid in os.listdir("/proc") if pid.isdigit()]
[training] = [each for each in processes if "\\nPPid:\\t1\\n" in (each / "status").read_text()]
hogs = []
while training.exists():
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


def test_workers_scale_from_zero_and_back_to_zero(release: Release, embedded: dict[str, bytes], tmp_path: Path) -> None:
    assert not release.pods("worker")
    training = release.submit("untroubled")
    training.finish()
    assert training.trials() == list(range(TRIALS))
    assert training.progress.failed_attempts == 0
    assert training.scores(tmp_path) == embedded
    release.until(lambda: not release.pods("worker"))


def test_helm_test_succeeds(release: Release) -> None:
    assert "Succeeded" in release.helm("test", "--timeout", "5m")


def test_every_line_of_a_service_is_json(release: Release) -> None:
    for component in ("dispatcher", "aggregator"):
        for line in release.kubectl("logs", f"deployment/{release.name}-{component}", "--container", component).splitlines():
            assert json.loads(line)["event"]


def delete_pod(training: Training) -> None:
    training.release.kubectl("delete", "pod", _name(training.workers()[0]))


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
    release, pod = training.release, _name(training.workers()[0])
    release.execute(pod, "python", "-c", HOG)
    release.until(lambda: training.progress.failed_attempts or "OOMKilled" in release.kubectl("get", "pod", pod, "--output", "yaml"))


def kill_containers(training: Training) -> None:
    """Kill all processes of a container, as the kernel does with cgroups of version 2, until it was one with a shard."""
    release, killed = training.release, set()
    while not training.progress.failed_attempts:
        release.until(training.workers)
        pod = training.workers()[0]
        killed.add(_name(pod))
        os.kill(main_process(pod, "services.worker"), signal.SIGKILL)
        release.until(lambda pod=pod: _name(pod) not in map(_name, training.workers()))
        with suppress(AssertionError):
            release.until(lambda: training.progress.failed_attempts, 10)
    experiment_store = ExperimentStore(training.store, training.name)
    assert {failure.origin.host for shard in experiment_store.attempts() for failure in experiment_store.failures(shard)} <= killed


def upgrade_release(training: Training) -> None:
    release = training.release
    before = {_name(pod) for component in ("dispatcher", "aggregator") for pod in release.pods(component)}
    again = {"again": uuid.uuid4().hex}
    release.helm("upgrade", "--wait", "--timeout", "5m", dispatcher__annotations=again, aggregator__annotations=again)
    after = {_name(pod) for component in ("dispatcher", "aggregator") for pod in release.pods(component)}
    assert len(before) == 2
    assert len(after) >= 2
    assert after != before


FAULTS = [delete_pod, kill_containers, drain_node, restart_kubelet, run_out_of_memory, upgrade_release]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_in_training_changes_no_score(
    fault: Callable[[Training], None], release: Release, embedded: dict[str, bytes], tmp_path: Path
) -> None:
    training = release.submit(fault.__name__.replace("_", "-"))
    training.begin()
    fault(training)
    _assert_complete(training, embedded, tmp_path)


def test_an_image_that_cannot_be_pulled_gives_a_notice_and_is_used_once_available(
    release: Release, embedded: dict[str, bytes], tmp_path: Path
) -> None:
    image = f"memtail.local/worker:{uuid.uuid4().hex}"
    release.helm("upgrade", "--wait", "--timeout", "5m", workers__limits__images=[image])
    training = release.submit("late-image", image=image)
    release.until(lambda: any("Image" in line for line in training.progress.notice_lines))
    assert not training.workers()
    docker("tag", WORKER, image)
    try:
        release.node.give(image)
    finally:
        docker("rmi", image)
    _assert_complete(training, embedded, tmp_path)


def test_a_wrong_image_is_corrected_by_an_upgrade(release: Release, embedded: dict[str, bytes], tmp_path: Path) -> None:
    # first, so that no worker waits while the services are replaced
    release.helm("upgrade", "--wait", "--timeout", "5m", image__worker__tag="none", image__pullPolicy="Never")
    training = release.submit("wrong-image")
    release.until(lambda: any("ErrImageNeverPull" in line for line in training.progress.notice_lines))
    assert not training.workers()
    release.helm("upgrade", "--wait", "--timeout", "5m")
    _assert_complete(training, embedded, tmp_path)


def test_uninstalling_keeps_only_the_bucket_for_a_new_release(release: Release, embedded: dict[str, bytes], tmp_path: Path) -> None:
    """Runs last, because it uninstalls the release during training."""
    release.helm("upgrade", "--wait", "--timeout", "5m", workers__terminationGracePeriodSeconds=300)
    training = release.submit("uninstalled")
    training.begin()
    release.helm("uninstall", "--wait", "--timeout", "5m")
    bucket = f"persistentvolumeclaim/data-{release.name}-minio-0"
    # the workers do not wait for the end of their grace period
    release.until(lambda: release.contents() == {bucket, "configmap/kube-root-ca.crt", "serviceaccount/default"}, 120)
    release.helm("install", "--wait", "--timeout", "5m")
    _assert_complete(Training(release, training.name, release.store()), embedded, tmp_path)


def _name(pod: dict[str, Any]) -> str:
    return str(pod["metadata"]["name"])


def _assert_complete(training: Training, embedded: dict[str, bytes], folder: Path) -> None:
    """Assert that every trial is committed once, and that the scores equal those of an embedded run."""
    training.finish()
    assert training.trials() == list(range(TRIALS))
    scores = training.scores(folder)
    assert scores.keys() == embedded.keys()
    assert {name for name in scores if scores[name] != embedded[name]} <= {SUMMARY}
