"""The images and the chart on a real node: from no worker to none, and through faults. Run by `make test-node`."""

import os
import signal
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.deployment import WORKER, docker
from tests.node.release import NODE, TRIALS, Release, Training, main_process

# The only file that names the experiment.
SUMMARY = "summary.json"
# Takes memory until the kernel ends the training process, the only child of the container's first process. With cgroups of version 1 the
# kernel ends one process, and would choose this one if it were not told otherwise; with version 2 it ends all of the container.
HOG = """
import os, pathlib
processes = [pathlib.Path("/proc", pid) for pid in os.listdir("/proc") if pid.isdigit()]
[training] = [each for each in processes if "\\nPPid:\\t1\\n" in (each / "status").read_text()]
(training / "oom_score_adj").write_text("1000")
taken = []
while training.exists():
    taken.append(bytearray(b"x") * (32 << 20))
"""


def test_an_experiment_is_trained_from_no_worker_to_none(release: Release, embedded: dict[str, bytes], tmp_path: Path) -> None:
    assert not release.pods("worker")
    training = release.submit("untroubled")
    training.finish()
    assert training.trials() == list(range(TRIALS))
    assert training.progress.failed_attempts == 0
    assert training.scores(tmp_path) == embedded
    release.until(lambda: not release.pods("worker"))


def test_helm_test_succeeds(release: Release) -> None:
    assert "Succeeded" in release.helm("test", "--timeout", "5m")


def delete_pod(training: Training) -> None:
    training.release.kubectl("delete", "pod", _name(training.workers()[0]))


def kill_process(training: Training) -> None:
    pod = training.workers()[0]
    os.kill(main_process(pod, "services.worker"), signal.SIGKILL)
    training.release.until(lambda: _name(pod) not in map(_name, training.workers()))


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
    pod = _name(training.workers()[0])
    training.release.kubectl("exec", pod, "--", "sh", "-c", 'python -c "$0" || true', HOG)
    training.release.until(lambda: training.progress.failed_attempts or pod not in map(_name, training.workers()))


def upgrade_release(training: Training) -> None:
    release = training.release
    before = {_name(pod) for component in ("dispatcher", "aggregator") for pod in release.pods(component)}
    again = {"again": uuid.uuid4().hex}
    release.helm("upgrade", "--wait", "--timeout", "5m", dispatcher__annotations=again, aggregator__annotations=again)
    after = {_name(pod) for component in ("dispatcher", "aggregator") for pod in release.pods(component)}
    assert len(before) == 2
    assert len(after) >= 2
    assert after != before


FAULTS = [delete_pod, kill_process, drain_node, restart_kubelet, run_out_of_memory, upgrade_release]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_in_training_changes_no_score(
    fault: Callable[[Training], None], release: Release, embedded: dict[str, bytes], tmp_path: Path
) -> None:
    training = release.submit(fault.__name__.replace("_", "-"))
    training.begin()
    fault(training)
    _assert_complete(training, embedded, tmp_path)


def test_an_image_that_cannot_be_pulled_is_told_and_used_once_it_is_there(
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


def test_nothing_is_left_of_a_release_but_its_bucket(release: Release, embedded: dict[str, bytes], tmp_path: Path) -> None:
    """The last one: it ends the release in training, and installs it again."""
    training = release.submit("uninstalled")
    training.begin()
    release.helm("uninstall", "--wait", "--timeout", "5m")
    bucket = f"persistentvolumeclaim/data-{release.name}-minio-0"
    release.until(lambda: release.contents() == {bucket, "configmap/kube-root-ca.crt", "serviceaccount/default"})
    release.helm("install", "--wait", "--timeout", "5m")
    _assert_complete(Training(release, training.name, release.store()), embedded, tmp_path)


def _name(pod: dict[str, Any]) -> str:
    return str(pod["metadata"]["name"])


def _assert_complete(training: Training, embedded: dict[str, bytes], folder: Path) -> None:
    """Every trial is there once, and the scores are those of an embedded run."""
    training.finish()
    assert training.trials() == list(range(TRIALS))
    scores = training.scores(folder)
    assert scores.keys() == embedded.keys()
    assert {name for name in scores if scores[name] != embedded[name]} <= {SUMMARY}
