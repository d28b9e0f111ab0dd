"""What the fleet sees of a Kubernetes cluster, and what it does there: Jobs and pods, kept up to date by watches."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

import structlog
import urllib3
from kubernetes import client, config, watch
from kubernetes.client.exceptions import ApiException
from tenacity import wait_random_exponential

from memtail.errors import MemtailError
from services.dispatcher import metrics

log = structlog.get_logger()

# Seconds after which a watch begins anew with a list, and for which an answer or a sign of life is waited.
_RESYNC, _TIMEOUT, _SILENCE = 300, 10, 120
# A pod that waits for one of these does not start by itself.
_STUCK = frozenset(("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "CreateContainerConfigError", "CreateContainerError"))


Seen = TypeVar("Seen", bound="Job | Pod")


class ClusterError(MemtailError):
    """The API server did not do what was asked."""


@dataclass(frozen=True)
class Job:
    """A Job: the pods that it is to have, those that ended well, and whether all of it has ended."""

    name: str
    uid: str
    labels: dict[str, str]
    parallelism: int
    succeeded: int
    ended: bool


@dataclass(frozen=True)
class Pod:
    """A pod: its phase, and in words why it does not run, or how it failed."""

    name: str
    uid: str
    job: str
    labels: dict[str, str]
    phase: str
    trouble: str
    reason: str


class Cluster:
    """The Jobs with some labels in a namespace, and their pods.

    Args:
        namespace: where they are.
        selector: of their labels.

    Raises:
        ClusterError: there is no cluster.
    """

    def __init__(self, namespace: str, selector: str) -> None:
        try:
            config.load_config()
        except config.ConfigException as error:
            raise ClusterError(f"there is no Kubernetes cluster to be reached ({error}): unset MEMTAIL_FLEET") from None
        self._namespace = namespace
        self._batch, self._core, self._apps = client.BatchV1Api(), client.CoreV1Api(), client.AppsV1Api()
        self._jobs = _Cache(self._batch.list_namespaced_job, namespace, selector, _job)
        self._pods = _Cache(self._core.list_namespaced_pod, namespace, selector, _pod, self._pod_changed)
        self._owner: dict[str, Any] | None = None
        self._told: set[tuple[str, str]] = set()

    def jobs(self) -> list[Job]:
        """Its Jobs. Raises: ClusterError: they are not known at present."""
        return self._jobs.objects()

    def pods(self) -> list[Pod]:
        """Its pods. Raises: ClusterError: they are not known at present."""
        return self._pods.objects()

    def owner(self, name: str) -> dict[str, Any]:
        """A reference to a Deployment, for what is to go when it goes. Raises: ClusterError."""
        if self._owner is None:
            with _asked(f"read Deployment {name}"):
                found: Any = self._apps.read_namespaced_deployment(name, self._namespace, _request_timeout=_TIMEOUT)
            self._owner = {"apiVersion": "apps/v1", "kind": "Deployment", "name": name, "uid": found.metadata.uid, "controller": True}
        return self._owner

    def create_job(self, job: Any) -> None:
        """Make a Job; fine if it is there already, since its name says what it is. Raises: ClusterError."""
        with _asked(f"create Job {job['metadata']['name']}", fine=409):
            made = self._batch.create_namespaced_job(self._namespace, job, _request_timeout=_TIMEOUT)
            self._jobs.remember(made)

    def delete_job(self, name: str) -> None:
        """Remove a Job and its pods; fine if it is gone. Raises: ClusterError."""
        with _asked(f"delete Job {name}", fine=404):
            self._batch.delete_namespaced_job(name, self._namespace, propagation_policy="Background", _request_timeout=_TIMEOUT)
        self._jobs.forget(name)

    def shrink_job(self, name: str, parallelism: int) -> None:
        """Give a Job fewer pods; those that do not run go first. Raises: ClusterError."""
        with _asked(f"shrink Job {name}", fine=404):
            patched = self._batch.patch_namespaced_job(
                name, self._namespace, {"spec": {"parallelism": parallelism}}, _request_timeout=_TIMEOUT
            )
            self._jobs.remember(patched)

    def _pod_changed(self, before: Pod | None, now: Pod) -> None:
        """Once for each trouble of a pod, and each end that was none of its own: a metric, a line in the log, an event at its Job."""
        if not now.trouble or (before and before.reason == now.reason):
            return
        metrics.POD_TROUBLES.labels(now.reason).inc()
        if (now.job, now.reason) in self._told:
            return
        self._told.add((now.job, now.reason))
        log.warning("worker in trouble", pod=now.name, reason=now.reason, trouble=now.trouble)
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
            "message": f"{now.name}: {now.trouble}"[:1024],
            "type": "Warning",
            "source": {"component": "memtail-dispatcher"},
            "firstTimestamp": datetime.now(UTC).isoformat(),
            "lastTimestamp": datetime.now(UTC).isoformat(),
            "count": 1,
        }
        try:
            self._core.create_namespaced_event(self._namespace, event, _request_timeout=_TIMEOUT)
        except (ApiException, urllib3.exceptions.HTTPError) as error:
            log.warning("event not recorded", error=_short(error))

    def _uid(self, job: str) -> str:
        known = self._jobs.get(job)
        return known.uid if known else ""


class _Cache(threading.Thread, Generic[Seen]):
    """All objects of a kind, by a list and a watch from there on, again and again."""

    def __init__(
        self,
        list_objects: Callable[..., Any],
        namespace: str,
        selector: str,
        read: Callable[[dict[str, Any]], Seen],
        changed: Callable[[Seen | None, Seen], None] | None = None,
    ) -> None:
        super().__init__(daemon=True)
        self._list, self._read, self._changed = list_objects, read, changed
        self._where = {"namespace": namespace, "label_selector": selector}
        self._objects: dict[str, tuple[int, Seen]] = {}
        self._lock = threading.Lock()
        self._error = "not listed yet"
        self.start()

    def objects(self) -> list[Seen]:
        """What is there now. Raises: ClusterError: it is not known."""
        if self._error:
            raise ClusterError(f"the API server cannot be followed: {self._error}")
        with self._lock:
            return [seen for _, seen in self._objects.values()]

    def get(self, name: str) -> Seen | None:
        """The object of a name, as it was last known."""
        with self._lock:
            held = self._objects.get(name)
        return held[1] if held else None

    def remember(self, answer: Any) -> None:
        """What the server has answered, which the watch has perhaps not told yet."""
        self._store(client.ApiClient().sanitize_for_serialization(answer))

    def forget(self, name: str) -> None:
        """What is about to go."""
        with self._lock:
            self._objects.pop(name, None)

    def run(self) -> None:
        pause, failures = wait_random_exponential(multiplier=0.5, max=30), 0
        while True:
            try:
                for _ in self._follow():
                    failures, self._error = 0, ""
            except (ApiException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
                if getattr(error, "status", None) == 410:  # the watch fell too far behind: list again
                    continue
                failures += 1
                self._error = _short(error)
                log.warning("watch broken off", error=self._error)
                time.sleep(pause(_Attempt(failures)))  # type: ignore[arg-type]

    def _follow(self) -> Iterator[None]:
        listed = client.ApiClient().sanitize_for_serialization(self._list(**self._where, _request_timeout=(_TIMEOUT, _SILENCE)))
        names = {item["metadata"]["name"] for item in listed["items"]}
        for item in listed["items"]:
            self._store(item)
        with self._lock:
            self._objects = {name: kept for name, kept in self._objects.items() if name in names}
        yield
        options = {"resource_version": listed["metadata"]["resourceVersion"], "allow_watch_bookmarks": True}
        timeouts = {"timeout_seconds": _RESYNC, "_request_timeout": (_TIMEOUT, _SILENCE)}
        for event in watch.Watch().stream(self._list, **self._where, **options, **timeouts):
            if event["type"] == "DELETED":
                self._store(event["raw_object"])  # how it ended
                self.forget(event["raw_object"]["metadata"]["name"])
            elif event["type"] != "BOOKMARK":
                self._store(event["raw_object"])
            yield

    def _store(self, item: dict[str, Any]) -> None:
        name, version = item["metadata"]["name"], int(item["metadata"]["resourceVersion"])
        seen = self._read(item)
        with self._lock:
            held = self._objects.get(name)
            if held and held[1].uid == seen.uid and held[0] >= version:
                return
            self._objects[name] = version, seen
        if self._changed:
            self._changed(held[1] if held and held[1].uid == seen.uid else None, seen)


@dataclass
class _Attempt:
    """What tenacity's pauses depend on."""

    attempt_number: int


def _job(item: dict[str, Any]) -> Job:
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


def _pod(item: dict[str, Any]) -> Pod:
    status = item.get("status", {})
    reason, trouble = _trouble(status)
    labels = item["metadata"].get("labels", {})
    return Pod(
        name=item["metadata"]["name"],
        uid=item["metadata"]["uid"],
        job=labels.get("batch.kubernetes.io/job-name", ""),
        labels=labels,
        phase=status.get("phase", "Pending"),
        trouble=trouble,
        reason=reason,
    )


def _trouble(status: dict[str, Any]) -> tuple[str, str]:
    """(reason, in words) why a pod does not run, or how it failed; empty if all is well."""
    conditions = {each["type"]: each for each in status.get("conditions", [])}
    if (disrupted := conditions.get("DisruptionTarget")) and disrupted["status"] == "True":
        return "Disrupted", f"taken away: {disrupted.get('reason', '')}, {disrupted.get('message', '')}"
    containers = status.get("initContainerStatuses", []) + status.get("containerStatuses", [])
    if status.get("phase") == "Failed":
        for container in containers:
            ended = container.get("state", {}).get("terminated")
            if ended and ended["exitCode"]:
                return "Failed", f"failed: exit code {ended['exitCode']}, {ended.get('reason', 'Error')}"
        return "Failed", f"failed: {status.get('reason', 'for no given reason')}, {status.get('message', '')}"
    if status.get("phase") == "Pending":
        for container in containers:
            waiting = container.get("state", {}).get("waiting") or {}
            if waiting.get("reason") in _STUCK:
                return waiting["reason"], f"cannot start: {waiting['reason']}, {waiting.get('message', '')}"
        scheduled = conditions.get("PodScheduled", {})
        if scheduled.get("status") == "False" and scheduled.get("reason") == "Unschedulable":
            return "Unschedulable", f"cannot be scheduled: {scheduled.get('message', '')}"
    return "", ""


@contextmanager
def _asked(what: str, fine: int | None = None) -> Iterator[None]:
    """Requests to the API server; `fine` is the status that means that it is so already."""
    try:
        yield
    except ApiException as error:
        if error.status != fine:
            raise ClusterError(f"cannot {what}: {_short(error)}") from None
    except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        raise ClusterError(f"cannot {what}: {_short(error)}") from None


def _short(error: Exception) -> str:
    if isinstance(error, ApiException):
        return f"{error.status} {error.reason}: {' '.join(str(error.body or '').split())[:300]}"
    return str(error) or type(error).__name__
