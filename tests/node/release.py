"""A release of the chart on a real node, with images built from this checkout, and the experiments that it trains."""

import base64
import itertools
import json
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from memtail.errors import MemtailError
from memtail.execution.progress import ExperimentProgress, progress_of
from memtail.execution.submit import submit
from memtail.scores.fetch import fetch_scores
from memtail.settings import S3Settings
from memtail.spec.experiment import Experiment
from memtail.storage import keys
from memtail.storage.s3 import S3Store
from tests.kubernetes.chart import CHART, as_options, helm
from tests.kubernetes.conftest import Kubernetes

NODE = "real-node"
VERSION = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
TRIALS, PER_SHARD = 240, 10
SPEC = {
    "dataset": {"name": "digits"},
    "model": {"name": "mlp", "hidden": [256]},
    "training": {"epochs": 80, "batch_size": 64},
    "subsets": {"trials": TRIALS},
}
# The only score file that names the experiment.
_SUMMARY = "summary.json"
_QUICK = [{"name": "MEMTAIL_LEASE_SECONDS", "value": "10"}, {"name": "MEMTAIL_RESYNC_SECONDS", "value": "5"}]
VALUES = {
    # everything fits on two cores
    "workers.resources": {"requests": {"cpu": "100m", "memory": "512Mi"}, "limits": {"memory": "2Gi"}},
    "workers.max": 4,
    "workers.terminationGracePeriodSeconds": 30,
    **{f"{component}.cache.sizeLimit": "1Gi" for component in ("workers", "aggregator", "explorer")},
    "explorer.resources.limits.memory": "512Mi",
    **{f"{component}.extraEnv": _QUICK for component in ("dispatcher", "aggregator", "workers")},
}


class RealNode(Kubernetes):
    """A control plane with this machine as its node, which runs containers. At most one can exist."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        del self._environment["KUBERNETES_PORT"]  # the chart lets pods reach API servers at 443 and 6443 only

    def start(self) -> None:
        self._control("real-node")

    def give(self, *images: str) -> None:
        """Copy images of this machine's Docker engine to the node."""
        self._control("images", *images)

    def stop_kubelet(self) -> None:
        self._control("kubelet", "stop")

    def start_kubelet(self) -> None:
        self._control("kubelet", "start")

    def get(self, kind: str, *arguments: str) -> Any:
        """Return an object, or a list of objects."""
        return json.loads(self.kubectl("get", kind, *arguments, "--output", "json"))


@dataclass(frozen=True)
class Release:
    """The chart, installed in a namespace that admits only pods of the level "restricted"."""

    node: RealNode
    namespace: str
    name: str = "memtail"

    def helm(self, command: str, *arguments: str, **values: Any) -> str:
        """Run helm, and return its output; fails on warnings. Two underscores stand for a dot in the name of a value."""
        named = {name.replace("__", "."): value for name, value in values.items()}
        options = [str(CHART), *as_options(VALUES | named)] if command in ("install", "upgrade") else []
        done = helm(command, self.name, *options, *arguments, "--namespace", self.namespace, kubeconfig=self.node.kubeconfig)
        assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{self.situation()}"
        assert "warning" not in (done.stdout + done.stderr).lower(), done.stderr
        return done.stdout

    def kubectl(self, *arguments: str) -> str:
        return self.node.kubectl("--namespace", self.namespace, *arguments)

    def execute(self, pod: str, *command: str) -> str:
        """Run a command in a pod, and return its output; ignores its exit code, since the pod may end."""
        prefix = ["kubectl", "--kubeconfig", self.node.kubeconfig, "--namespace", self.namespace]
        return subprocess.run([*prefix, "exec", pod, "--", *command], capture_output=True, text=True, check=False).stdout

    def pods(self, component: str, experiment: str = "") -> list[dict[str, Any]]:
        """Return the running pods of a component that are not being deleted."""
        selector = f"app.kubernetes.io/component={component}" + (f",memtail/experiment={experiment}" if experiment else "")
        pods = self.node.get("pods", "--namespace", self.namespace, "--selector", selector)["items"]
        return [pod for pod in pods if pod["status"].get("phase") == "Running" and "deletionTimestamp" not in pod["metadata"]]

    def contents(self) -> set[str]:
        """Return the names of all objects of the namespace except events."""
        resources = self.node.kubectl("api-resources", "--namespaced", "--verbs=list", "--output=name").split()
        kinds = ",".join(kind for kind in resources if not kind.startswith("events"))
        return set(self.kubectl("get", kinds, "--output", "name", "--ignore-not-found").split())

    def secret(self, key: str) -> str:
        """Return a value of the chart's Secret."""
        return base64.b64decode(self.node.get("secret", self.name, "--namespace", self.namespace)["data"][key]).decode()

    def store(self) -> S3Store:
        """Open the bucket by the cluster IP of its service."""
        address = self.node.get("service", f"{self.name}-minio", "--namespace", self.namespace)["spec"]["clusterIP"]
        access, secret_key = map(self.secret, ("s3-access-key", "s3-secret-key"))
        return S3Store("memtail", settings=S3Settings(endpoint=f"http://{address}:9000", access_key=access, secret_key=secret_key))

    def submit(self, name: str, **workers: Any) -> "Training":
        """Submit the experiment under a name; `workers` is its `execution.workers`."""
        store = self.store()
        submit(Experiment.parse(declaration(name, **workers)), store)
        return Training(self, name, store)

    def until(self, what: Callable[[], Any], seconds: float = 600) -> None:
        """Wait until a condition is true; an unreachable store counts as false."""
        end = time.monotonic() + seconds
        while True:
            with suppress(MemtailError):
                if what():
                    return
            assert time.monotonic() < end, self.situation()
            time.sleep(0.5)

    def situation(self) -> str:
        """Return pods, Jobs, events and recent logs, for the message of a failed test."""
        commands = (
            ["get", "pods,jobs", "--output", "wide"],
            ["get", "events", "--sort-by", ".lastTimestamp"],
            *(
                ["logs", "--tail", "30", "--selector", f"app.kubernetes.io/component={each}"]
                for each in ("dispatcher", "aggregator", "worker")
            ),
        )
        prefix = ["kubectl", "--kubeconfig", self.node.kubeconfig, "--namespace", self.namespace]
        return "\n".join(subprocess.run([*prefix, *command], capture_output=True, text=True, check=False).stdout for command in commands)


@dataclass(frozen=True)
class Training:
    """An experiment that a release trains."""

    release: Release
    name: str
    store: S3Store

    @property
    def progress(self) -> ExperimentProgress:
        return progress_of(self.store, self.name)

    def workers(self) -> list[dict[str, Any]]:
        """Return the running pods of its workers."""
        return self.release.pods("worker", self.name)

    def begin(self) -> None:
        """Wait until the experiment is in training: at least one shard is committed, and at least one is missing."""
        self.release.until(lambda: self.progress.committed and self.workers())
        assert self.progress.missing, "all shards were committed before the fault: declare more epochs"

    def finish(self) -> None:
        """Wait until all scores are published."""
        self.release.until(lambda: self.progress.ending)
        assert self.progress.ending == "published", self.release.situation()

    def longest_pause(self) -> float:
        """Return the longest time between two commits in seconds."""
        times = sorted(stored.modified for stored in self.store.inventory(keys.trials(self.name)))
        return max(later - earlier for earlier, later in itertools.pairwise(times))

    def trials(self) -> list[int]:
        """Return the committed trials, ascending."""
        return sorted(trial for shard in self.progress.committed for trial in shard.trials)

    def scores(self, folder: Path) -> dict[str, bytes]:
        """Return the published files by name."""
        pointer = self.progress.pointer
        assert pointer
        fetch_scores(self.store, self.name, pointer, folder)
        return files(folder)

    def assert_complete(self, embedded: dict[str, bytes], folder: Path) -> None:
        """Assert that every trial is committed once, and that the scores equal those of an embedded run."""
        self.finish()
        assert self.trials() == list(range(TRIALS))
        scores = self.scores(folder)
        assert scores.keys() == embedded.keys()
        assert {name for name in scores if scores[name] != embedded[name]} <= {_SUMMARY}


def declaration(name: str, **workers: Any) -> dict[str, Any]:
    """Return the declaration of an experiment."""
    execution: dict[str, Any] = {"trials_per_shard": PER_SHARD, "device": "cpu", "workers": {"max": 2, **workers}}
    return {"name": name, **SPEC, "execution": execution}


def files(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def name_of(pod: dict[str, Any]) -> str:
    return str(pod["metadata"]["name"])


def main_process(pod: dict[str, Any], command: str) -> int:
    """Return the process id, on this machine, of the first process of a pod that runs a command."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # the process has ended
            if pod["metadata"]["uid"] in (process / "cgroup").read_text() and command in (process / "cmdline").read_text():
                found.append(int(process.name))
    return min(found)
