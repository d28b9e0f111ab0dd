"""Access to a Kubernetes cluster: reads Jobs and pods from watch caches, changes Jobs, and records events."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import structlog
import urllib3
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

from services.dispatcher import metrics
from services.dispatcher.kubernetes_objects import Job, Pod, parse_job, parse_pod
from services.dispatcher.watch_cache import TIMEOUT, ClusterError, RefusedError, WatchCache, short_message

log = structlog.get_logger()

# Statuses below 500 with which the API server refuses requests of any content: credentials, timeout, too many requests.
_NOT_ABOUT_CONTENT = (401, 408, 429)


class Cluster:
    """Jobs that match a selector, and their pods.

    Args:
        namespace: namespace of the Jobs.
        selector: label selector of the Jobs and pods.

    Raises:
        ClusterError: no cluster is configured.
    """

    def __init__(self, namespace: str, selector: str) -> None:
        _load_config()
        self._namespace = namespace
        self._batch, self._core, self._apps = client.BatchV1Api(), client.CoreV1Api(), client.AppsV1Api()
        self._jobs = WatchCache("jobs", self._batch.list_namespaced_job, namespace, selector, parse_job)
        self._pods = WatchCache("pods", self._core.list_namespaced_pod, namespace, selector, parse_pod, self._on_pod_change)
        self._owner: dict[str, Any] | None = None
        self._reported: set[tuple[str, str]] = set()  # (Job, reason)

    def jobs(self) -> list[Job]:
        """Return the Jobs. Raises: ClusterError: they are currently unknown."""
        return self._jobs.objects()

    def pods(self) -> list[Pod]:
        """Return the pods. Raises: ClusterError: they are currently unknown."""
        return self._pods.objects()

    def owner(self, name: str) -> dict[str, Any]:
        """Build an owner reference to a Deployment, so that Jobs are deleted with it. Raises: ClusterError."""
        if self._owner is None:
            with _request(f"read Deployment {name}"):
                deployment: Any = self._apps.read_namespaced_deployment(name, self._namespace, _request_timeout=TIMEOUT)
            self._owner = {"apiVersion": "apps/v1", "kind": "Deployment", "name": name, "uid": deployment.metadata.uid, "controller": True}
        return self._owner

    def create_job(self, job: Any) -> None:
        """Create a Job, unless it exists: its name identifies its content. Raises: ClusterError."""
        with _request(f"create Job {job['metadata']['name']}", ignored_status=409):
            created = self._batch.create_namespaced_job(self._namespace, job, _request_timeout=TIMEOUT)
            self._jobs.put(created)

    def delete_job(self, name: str) -> None:
        """Delete a Job and its pods, if it exists. Raises: ClusterError."""
        with _request(f"delete Job {name}", ignored_status=404):
            self._batch.delete_namespaced_job(name, self._namespace, propagation_policy="Background", _request_timeout=TIMEOUT)
        self._jobs.remove(name)

    def delete_pod(self, name: str) -> None:
        """Delete a pod, if it exists. Raises: ClusterError."""
        with _request(f"delete pod {name}", ignored_status=404):
            self._core.delete_namespaced_pod(name, self._namespace, _request_timeout=TIMEOUT)
        self._pods.remove(name)

    def shrink_job(self, name: str, parallelism: int) -> None:
        """Reduce the number of a Job's pods; Kubernetes removes pending pods first. Raises: ClusterError."""
        with _request(f"shrink Job {name}", ignored_status=404):
            patched = self._batch.patch_namespaced_job(
                name, self._namespace, {"spec": {"parallelism": parallelism}}, _request_timeout=TIMEOUT
            )
            self._jobs.put(patched)

    def _on_pod_change(self, before: Pod | None, now: Pod) -> None:
        """Count each new problem of a pod; log it, and record an event at the Job, once per Job and reason."""
        if not now.problem or (before and before.reason == now.reason):
            return
        metrics.POD_TROUBLES.labels(now.reason).inc()
        if (now.job, now.reason) in self._reported:
            return
        self._reported.add((now.job, now.reason))
        log.warning("worker in trouble", pod=now.name, reason=now.reason, trouble=now.problem)
        event: Any = {
            "metadata": {"generateName": f"{now.job}.", "namespace": self._namespace},
            "involvedObject": {
                "apiVersion": "batch/v1",
                "kind": "Job",
                "name": now.job,
                "namespace": self._namespace,
                "uid": self._uid(now.job),
            },
            "reason": f"Worker{now.reason}",
            "message": f"{now.name}: {now.problem}"[:1024],
            "type": "Warning",
            "source": {"component": "memtail-dispatcher"},
            "firstTimestamp": datetime.now(UTC).isoformat(),
            "lastTimestamp": datetime.now(UTC).isoformat(),
            "count": 1,
        }
        try:
            self._core.create_namespaced_event(self._namespace, event, _request_timeout=TIMEOUT)
        except (ApiException, urllib3.exceptions.HTTPError) as error:
            log.warning("event not recorded", error=short_message(error))

    def _uid(self, job: str) -> str:
        cached = self._jobs.get(job)
        return cached.uid if cached else ""


def _load_config() -> None:
    """Use the kubeconfig, or else the service account of the pod. The client's own `load_config` prints a line when it does the same."""
    try:
        config.load_kube_config()
    except config.ConfigException as no_kubeconfig:
        try:
            config.load_incluster_config()
        except config.ConfigException as error:
            reasons = f"{no_kubeconfig}; {error}"
            raise ClusterError(f"no Kubernetes cluster is configured ({reasons}): provide a kubeconfig, or unset MEMTAIL_FLEET") from None


@contextmanager
def _request(action: str, ignored_status: int | None = None) -> Iterator[None]:
    """Convert the Kubernetes client's exceptions.

    Args:
        action: verb and object of the request, for the error message.
        ignored_status: HTTP status with which the API server answers if the action is already done.

    Raises:
        RefusedError: the API server refused it.
        ClusterError: the request failed.
    """
    try:
        yield
    except ApiException as error:
        if error.status != ignored_status:
            refused = error.status in range(400, 500) and error.status not in _NOT_ABOUT_CONTENT
            raise (RefusedError if refused else ClusterError)(f"cannot {action}: {short_message(error)}") from None
    except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        raise ClusterError(f"cannot {action}: {short_message(error)}") from None
