"""Stand-ins for the containers of simulated pods: light workers that receive assignments, sleep, and commit."""

import contextlib
import json
import queue
import subprocess
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import redis
import urllib3
from kubernetes import client, config

from memtail.errors import StoreError
from memtail.storage import ObjectStore, keys
from services.common.broker import Assignment, Broker, decode_assignment
from services.common.settings import ServiceSettings
from services.common.surplus import Surplus
from services.dispatcher.cache_fills import CACHE_LABEL
from services.dispatcher.worker_jobs import EXPERIMENT_LABEL


class Pods:
    """Runs a light worker for each running pod, until the pod is deleted or the worker is idle.

    Args:
        kubeconfig: kubeconfig of an administrator.
        namespace: namespace of the pods.
        services: settings of the services.
        store: the bucket.
        seconds: duration of a shard.
        rest: idle time in seconds after which a worker ends.
        part: (i, k): runs only part i of k of the pods, to divide them among processes.
        body: returns the content of the trial batch of an assignment.

    Attributes:
        committed: number of commits by assignment id.
        peak: maximum number of workers at a time.
    """

    def __init__(
        self,
        kubeconfig: str,
        namespace: str,
        services: ServiceSettings,
        store: ObjectStore,
        seconds: float = 1.0,
        rest: float = 2.0,
        part: tuple[int, int] = (0, 1),
        body: Callable[[Assignment], bytes] = lambda _: b"",
    ) -> None:
        self._core = client.CoreV1Api(config.new_client_from_config(kubeconfig))
        self.namespace, self.services, self.store, self.seconds, self.rest, self.body = namespace, services, store, seconds, rest, body
        self._part = part
        self._workers: dict[str, _Worker] = {}
        self._over = threading.Event()
        self._ended: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._follow, self._end)]
        self.committed: Counter[str] = Counter()
        self.peak = 0

    def __enter__(self) -> "Pods":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        for worker in self._workers.values():
            worker.stop()

    def end(self, name: str) -> None:
        """Make a pod succeed, asynchronously."""
        self._ended.put(name)

    def _end(self) -> None:
        """End pods one after another, so that a thousand at once do not overload the API server."""
        patch = {"metadata": {"annotations": {"memtail-test/exit-code": "0"}}}
        while not self._over.is_set():
            try:
                name = self._ended.get(timeout=0.5)
            except queue.Empty:
                continue
            try:
                self._core.patch_namespaced_pod(name, self.namespace, patch, _request_timeout=10)
            except (client.ApiException, urllib3.exceptions.HTTPError):
                if name in self._workers:
                    self._ended.put(name)
                    self._over.wait(0.5)

    def _follow(self) -> None:
        while not self._over.is_set():
            try:
                listed = self._list()
                for name in self._workers.keys() - {item["metadata"]["name"] for item in listed["items"]}:
                    self._workers.pop(name).stop()
                for item in listed["items"]:
                    self._update(item)
                for event in self._watch(listed["metadata"]["resourceVersion"]):
                    self._update(event["object"], deleted=event["type"] == "DELETED")
            except (client.ApiException, urllib3.exceptions.HTTPError, KeyError, ValueError):
                self._over.wait(0.5)

    def _list(self, **options: Any) -> Any:
        """Return the list, or with `watch` the response to read lines from. Bypasses the client's models, which are slow."""
        selector: dict[str, Any] = {
            "label_selector": f"{EXPERIMENT_LABEL},!{CACHE_LABEL}",
            "_preload_content": False,
            "_request_timeout": 10,
        }
        response: Any = self._core.list_namespaced_pod(self.namespace, **selector, **options)
        return response if options else json.loads(response.data)

    def _watch(self, version: str) -> Iterator[dict[str, Any]]:
        rest = b""
        with self._list(watch=True, resource_version=version, timeout_seconds=5) as response:
            for data in response.stream(1 << 16):
                *lines, rest = (rest + data).split(b"\n")
                yield from map(json.loads, lines)
                if self._over.is_set():
                    return

    def _update(self, pod: dict[str, Any], deleted: bool = False) -> None:
        name = pod["metadata"]["name"]
        if zlib.crc32(name.encode()) % self._part[1] != self._part[0]:
            return
        running = pod["status"].get("phase") == "Running" and "deletionTimestamp" not in pod["metadata"] and not deleted
        if running and name not in self._workers:
            self._workers[name] = _Worker(name, pod["metadata"]["labels"][EXPERIMENT_LABEL], self)
            self.peak = max(self.peak, len(self._workers))
        elif not running and name in self._workers:
            self._workers.pop(name).stop()


class _Worker:
    def __init__(self, name: str, experiment: str, pods: Pods) -> None:
        self._name, self._pods = name, pods
        self._settings = replace(pods.services, experiment=experiment)
        self._stopped = threading.Event()
        threading.Thread(target=self._work, daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _work(self) -> None:
        broker = Broker(self._settings)
        surplus = Surplus(broker, 60)
        idle_since = time.monotonic()
        while not self._stopped.is_set() and time.monotonic() - idle_since < self._pods.rest:
            try:
                if surplus.leave(self._settings.experiment, self._name):
                    break
                message = broker.redis.rpop(f"{broker.prefix}shards.{self._settings.experiment}")
                if message is None:
                    self._stopped.wait(min(1.0, self._pods.rest / 10))
                    continue
                self._train(broker, decode_assignment(message))
                idle_since = time.monotonic()
            except (redis.RedisError, StoreError):
                self._stopped.wait(1)
        if not self._stopped.is_set():
            self._pods.end(self._name)

    def _train(self, broker: Broker, assignment: Assignment) -> None:
        key, holder = keys.trial_batch(assignment.experiment, assignment.first, assignment.last), f"{self._name}/1"
        if self._pods.store.exists(key) or not broker.acquire(assignment, holder):
            return
        end = time.monotonic() + self._pods.seconds
        while (left := end - time.monotonic()) > 0:
            if self._stopped.wait(min(left, self._settings.lease_seconds / 3)):
                return
            with contextlib.suppress(redis.RedisError):
                broker.renew(assignment, holder)
        if self._pods.store.put_if_absent(key, self._pods.body(assignment)):
            self._pods.committed[assignment.id] += 1
        broker.release(assignment, holder)


class FaultyApiServer:
    """Proxy of the API server that returns errors for some requests, or loses their responses.

    Attributes:
        answers: pending faults as (method, part of the path, status). With status 0 the request reaches the server, but the response
            is lost.
        lost: set when a response was lost.
    """

    def __init__(self, kubeconfig: str) -> None:
        view = subprocess.run(
            ["kubectl", "--kubeconfig", kubeconfig, "config", "view", "--output", "json"], capture_output=True, text=True, check=True
        )
        upstream = json.loads(view.stdout)["clusters"][0]["cluster"]["server"]
        http = urllib3.PoolManager(cert_reqs="CERT_NONE", retries=False, maxsize=20)
        self.answers: list[tuple[str, str, int]] = []
        self.lost = threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                answer = next((each for each in proxy.answers if each[0] == self.command and each[1] in self.path), None)
                if answer:
                    proxy.answers.remove(answer)
                    if answer[2]:
                        self.send_response(answer[2])
                        self.end_headers()
                        return
                headers = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")}
                response = http.request(self.command, upstream + self.path, body=body, headers=headers, preload_content=False)
                if answer:
                    proxy.lost.set()
                    time.sleep(60)
                    return
                self.send_response(response.status)
                for name in ("Content-Type", "Retry-After"):
                    if name in response.headers:
                        self.send_header(name, response.headers[name])
                self.end_headers()
                with contextlib.suppress(OSError, urllib3.exceptions.HTTPError):
                    while data := response.read1():
                        self.wfile.write(data)
                        self.wfile.flush()

            do_GET = do_POST = do_PATCH = do_DELETE = handle_any  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FaultyApiServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
