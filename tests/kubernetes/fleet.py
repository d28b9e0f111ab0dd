"""A release of the chart in a namespace, and a real dispatcher with a broker and a bucket."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memtail.datasets import ImageDataset
from memtail.execution.progress import progress_of
from memtail.experiment_store import ExperimentStore
from memtail.spec import Experiment
from tests.kubernetes.chart import CHART, as_options, helm
from tests.kubernetes.conftest import Kubernetes
from tests.kubernetes.simulation import Pods
from tests.support.cluster import Cluster, Service

ACCOUNT = "memtail-dispatcher"
WORKERS = "app.kubernetes.io/instance=memtail,app.kubernetes.io/component=worker"
_VALUES = {
    "workers.gpus": 1,
    "workers.terminationGracePeriodSeconds": 1,
    "workers.resources": {"requests": {"cpu": "1m", "memory": "1Mi"}, "limits": {"cpu": "1", "memory": "1Mi"}},
    "workers.sharedMemory": "1Mi",
    "workers.limits.gpus": 4,
    "workers.limits.gpuResources": ["nvidia.com/gpu", "nvidia.com/mig-1g.10gb"],
}
_CLAIM = """
apiVersion: v1
kind: PersistentVolume
metadata: {{name: "{namespace}-{name}"}}
spec:
  storageClassName: ""
  claimRef: {{namespace: "{namespace}", name: "{name}"}}
  capacity: {{storage: 50Gi}}
  accessModes: [ReadWriteMany]
  hostPath: {{path: /nowhere}}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {{name: "{name}", namespace: "{namespace}"}}
spec:
  storageClassName: ""
  volumeName: "{namespace}-{name}"
  accessModes: [ReadWriteMany]
  resources: {{requests: {{storage: 50Gi}}}}
"""


class Fleet:
    """A release of the chart with simulated pods, and a real dispatcher as a process beside it.

    Args:
        kubernetes: the control plane.
        cluster: broker, bucket and processes.
        declare: creates experiments (see the fixture).
        digits: dataset of the experiments.
        max_workers: maximum of the fleet.
    """

    def __init__(
        self, kubernetes: Kubernetes, cluster: Cluster, declare: Callable[..., Experiment], digits: ImageDataset, max_workers: int = 300
    ) -> None:
        self.kubernetes, self.cluster, self._declare, self._digits = kubernetes, cluster, declare, digits
        self.namespace = kubernetes.namespace("fleet")
        self._values = {**_VALUES, "workers.max": max_workers}
        self._helm("install")
        self.kubeconfig = kubernetes.kubeconfig_of(self.namespace, ACCOUNT, cluster.folder / "kubeconfig")

    def _helm(self, command: str) -> None:
        options = ("--namespace", self.namespace, *as_options(self._values))
        done = helm(command, "memtail", str(CHART), *options, kubeconfig=self.kubernetes.kubeconfig)
        assert done.returncode == 0, done.stderr

    def upgrade(self, **values: Any) -> None:
        """Upgrade the release; two underscores stand for a dot in the name of a value. A dispatcher reads the settings when it starts."""
        self._values |= {name.replace("__", "."): value for name, value in values.items()}
        self._helm("upgrade")

    def dispatcher(self, kubeconfig: Path | None = None) -> Service:
        """Start a dispatcher with the settings of the chart and the rights of its service account."""
        path = self.cluster.folder / "fleet.yaml"
        config = ("get", "configmap/memtail-fleet", "--namespace", self.namespace, "--output", r"jsonpath={.data.fleet\.yaml}")
        path.write_text(self.kubernetes.kubectl(*config))
        return self.cluster.start("dispatcher", MEMTAIL_FLEET=str(path), KUBECONFIG=str(kubeconfig or self.kubeconfig))

    def submit(self, shards: int, name: str = "a", per_shard: int = 20, **workers: Any) -> ExperimentStore:
        """Submit an experiment."""
        execution = {"trials_per_shard": per_shard, "device": "cpu", "workers": workers or None}
        design = {"design": "balanced"} if per_shard % 20 == 0 else {}
        return self.cluster.submit(self._declare(per_shard * shards, name=name, execution=execution, subsets=design), self._digits)

    def pods(self, seconds: float = 1.0, rest: float = 2.0) -> Pods:
        """Create the stand-in for the workers' containers."""
        return Pods(
            self.kubernetes.kubeconfig, self.namespace, self.cluster.settings(lease_seconds=30.0), self.cluster.store, seconds, rest
        )

    def names(self, kind: str, *options: str) -> list[str]:
        """Return the names of objects."""
        return self.kubernetes.kubectl("get", kind, "--namespace", self.namespace, "--output", "name", *options).split()

    def set_status(self, pod: str, **status: Any) -> None:
        """Change the status of a pod, as a kubelet does."""
        patch = ("--subresource", "status", "--type", "merge", "--patch", json.dumps({"status": status}))
        self.kubernetes.kubectl("patch", pod, "--namespace", self.namespace, *patch)

    def end(self, pod: str, code: int) -> None:
        """Let the container of a pod end with an exit code."""
        self.kubernetes.kubectl("annotate", pod, "--namespace", self.namespace, f"memtail-test/exit-code={code}")

    def claim(self, name: str) -> None:
        """Create a claim on a volume that all nodes share."""
        self.kubernetes.kubectl("apply", "--filename", "-", stdin=_CLAIM.format(name=name, namespace=self.namespace))

    def running(self, name: str = "") -> list[str]:
        """Return the names of the running pods of all workers, or of those of an experiment."""
        selector = f"{WORKERS},memtail/experiment={name}" if name else WORKERS
        return self.names("pods", "--selector", selector, "--field-selector", "status.phase=Running")

    def notice(self, name: str = "a") -> str:
        """Return the notice that `memtail status` shows."""
        return "\n".join(progress_of(self.cluster.store, name).notice_lines)

    def done(self, experiment_store: ExperimentStore, shards: int) -> bool:
        """Return whether all shards are committed and no worker is left."""
        return len(experiment_store.committed()) == shards and not self.running()
