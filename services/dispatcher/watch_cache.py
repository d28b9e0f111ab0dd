"""Local copy of Kubernetes objects, kept current by a list and a watch in a background thread."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import structlog
import urllib3
from kubernetes import client, watch
from kubernetes.client.exceptions import ApiException
from tenacity import wait_random_exponential

from memtail.errors import MemtailError
from services.dispatcher import metrics
from services.dispatcher.kubernetes_objects import Job, Pod

log = structlog.get_logger()

#: Timeout of a request to the API server in seconds.
TIMEOUT = 10
# Seconds until a watch is restarted with a list, and read timeout of a watch, longer than the interval between bookmarks.
_RESYNC, _READ_TIMEOUT = 300, 120
# Seconds after which the end of a watch is none of a series of failures.
_LASTING = 5.0

KubernetesObject = TypeVar("KubernetesObject", bound=Job | Pod)


class ClusterError(MemtailError):
    """A request to the Kubernetes API server failed."""


class RefusedError(ClusterError):
    """The API server refused a request because of its content, as for a quota or a policy; other requests may succeed."""


class WatchCache(threading.Thread, Generic[KubernetesObject]):
    """All objects of a kind that match a selector.

    Args:
        kind: name of the kind in metrics and logs.
        list_objects: method of the Kubernetes client that lists the objects.
        namespace: namespace of the objects.
        selector: label selector.
        parse: parses an object of the API server.
        on_change: called with the previous and the new version of an object; the previous version is None for a new object.
    """

    def __init__(
        self,
        kind: str,
        list_objects: Callable[..., Any],
        namespace: str,
        selector: str,
        parse: Callable[[dict[str, Any]], KubernetesObject],
        on_change: Callable[[KubernetesObject | None, KubernetesObject], None] | None = None,
    ) -> None:
        super().__init__(daemon=True)
        self._kind, self._list, self._parse, self._on_change = kind, list_objects, parse, on_change
        metrics.WATCH_INTERRUPTIONS.labels(kind)
        metrics.WATCHED.labels(kind).set_to_current_time()
        self._scope = {"namespace": namespace, "label_selector": selector}
        self._objects: dict[str, tuple[int, KubernetesObject]] = {}  # (resource version, object) by name
        self._lock = threading.Lock()
        self._error = "not listed yet"
        self.start()

    def objects(self) -> list[KubernetesObject]:
        """Return all objects. Raises: ClusterError: the watch is interrupted, so the objects are unknown."""
        if self._error:
            raise ClusterError(f"watch of the API server interrupted: {self._error}")
        with self._lock:
            return [parsed for _, parsed in self._objects.values()]

    def get(self, name: str) -> KubernetesObject | None:
        """Return the last known version of an object."""
        with self._lock:
            cached = self._objects.get(name)
        return cached[1] if cached else None

    def put(self, response: Any) -> None:
        """Store an object from the response to a request, before the watch reports it."""
        self._store(client.ApiClient().sanitize_for_serialization(response))

    def remove(self, name: str) -> None:
        """Remove an object, before the watch reports its deletion."""
        with self._lock:
            self._objects.pop(name, None)

    def run(self) -> None:
        """Follow the API server forever; the thread's main function."""
        backoff, attempt = wait_random_exponential(multiplier=0.5, max=30), 0
        while True:
            began = time.monotonic()
            try:
                for _ in self._follow():
                    self._error = ""
                    metrics.WATCHED.labels(self._kind).set_to_current_time()
            except Exception as error:  # without this thread the fleet would follow a picture that never changes
                if getattr(error, "status", None) != 410:  # of a resource version that has expired, which a list renews
                    self._error = short_message(error)
                    metrics.WATCH_INTERRUPTIONS.labels(self._kind).inc()
                    foreseen = isinstance(error, (ApiException, urllib3.exceptions.HTTPError, OSError, ValueError))
                    log.warning("watch interrupted", kind=self._kind, error=self._error, exc_info=not foreseen)
            attempt = 1 if time.monotonic() - began >= _LASTING else attempt + 1
            time.sleep(backoff(_Attempt(attempt)))  # type: ignore[arg-type]

    def _follow(self) -> Iterator[None]:
        """List once, then watch until the watch ends; yields after the list and after each event."""
        listed = client.ApiClient().sanitize_for_serialization(self._list(**self._scope, _request_timeout=(TIMEOUT, _READ_TIMEOUT)))
        names = {item["metadata"]["name"] for item in listed["items"]}
        for item in listed["items"]:
            self._store(item)
        with self._lock:
            self._objects = {name: cached for name, cached in self._objects.items() if name in names}
        yield
        options = {"resource_version": listed["metadata"]["resourceVersion"], "allow_watch_bookmarks": True}
        timeouts = {"timeout_seconds": _RESYNC, "_request_timeout": (TIMEOUT, _READ_TIMEOUT)}
        for event in watch.Watch().stream(self._list, **self._scope, **options, **timeouts):
            if event["type"] == "DELETED":
                self._store(event["raw_object"])  # for `on_change`: the final state
                self.remove(event["raw_object"]["metadata"]["name"])
            elif event["type"] != "BOOKMARK":
                self._store(event["raw_object"])
            yield

    def _store(self, item: dict[str, Any]) -> None:
        name, version = item["metadata"]["name"], int(item["metadata"]["resourceVersion"])
        parsed = self._parse(item)
        with self._lock:
            cached = self._objects.get(name)
            if cached and cached[1].uid == parsed.uid and cached[0] >= version:
                return
            self._objects[name] = version, parsed
        if self._on_change:
            self._on_change(cached[1] if cached and cached[1].uid == parsed.uid else None, parsed)


def short_message(error: Exception) -> str:
    """Summarize an error of the Kubernetes client in one line."""
    if isinstance(error, ApiException):
        message = error.body or ""
        with suppress(ValueError, KeyError, TypeError):
            message = json.loads(message)["message"]
        return f"{error.status} {error.reason}: {' '.join(str(message).split())[:300]}"
    return str(error) or type(error).__name__


@dataclass
class _Attempt:
    """The part of tenacity's retry state that its wait strategies read."""

    attempt_number: int
