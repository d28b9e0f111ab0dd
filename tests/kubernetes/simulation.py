"""What stands for the containers of pods that nobody runs: light workers that take assignments, sleep, and commit."""

import contextlib
import json
import subprocess
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import redis
import urllib3
from kubernetes import client, config

from memtail.errors import StoreError
from memtail.storage import keys
from services.broker import Assignment, Broker, _assignment
from services.dispatcher.worker_jobs import EXPERIMENT_LABEL
from services.settings import ServiceSettings
from tests.services.cluster import Cluster


class Pods:
    """Runs a light worker for each pod that is Running, until the pod is gone or the worker finds nothing to do.

    Args:
        kubeconfig: of an administrator.
        namespace: of the pods.
        cluster: the broker and the bucket.
        seconds: that a shard takes.
        rest: seconds of nothing to do after which a worker ends.
    """

    def __init__(self, kubeconfig: str, namespace: str, cluster: Cluster, seconds: float = 1.0, rest: float = 2.0) -> None:
        self._core = client.CoreV1Api(config.new_client_from_config(kubeconfig))
        self._namespace, self._cluster, self._seconds, self._rest = namespace, cluster, seconds, rest
        self._workers: dict[str, _Worker] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self.committed: Counter[str] = Counter()
        self.most = 0

    def __enter__(self) -> "Pods":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for worker in self._workers.values():
            worker.stop()

    def _follow(self) -> None:
        while not self._over.wait(0.3):
            try:
                pods = self._core.list_namespaced_pod(self._namespace, label_selector=EXPERIMENT_LABEL, _request_timeout=10).items
            except (client.ApiException, urllib3.exceptions.HTTPError):
                continue
            running = {pod.metadata.name: pod for pod in pods if pod.status.phase == "Running" and not pod.metadata.deletion_timestamp}
            self.most = max(self.most, len(running))
            for name in self._workers.keys() - running.keys():
                self._workers.pop(name).stop()
            for name in running.keys() - self._workers.keys():
                self._workers[name] = _Worker(name, running[name].metadata.labels[EXPERIMENT_LABEL], self)
            for name, worker in self._workers.items():
                if worker.done:
                    with contextlib.suppress(client.ApiException, urllib3.exceptions.HTTPError):
                        patch = {"metadata": {"annotations": {"memtail-test/exit-code": "0"}}}
                        self._core.patch_namespaced_pod(name, self._namespace, patch, _request_timeout=10)


class _Worker:
    def __init__(self, name: str, experiment: str, pods: Pods) -> None:
        self._name, self._pods = name, pods
        self._settings = ServiceSettings(store="-", broker=pods._cluster.redis.url, experiment=experiment, lease_seconds=30)
        self._stopped = threading.Event()
        self.done = False
        threading.Thread(target=self._work, daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _work(self) -> None:
        broker, store = Broker(self._settings), self._pods._cluster.store
        idle_since = time.monotonic()
        while not self._stopped.is_set():
            try:
                message = broker.redis.rpop(f"memtail:shards.{self._settings.experiment}")
                if message is None:
                    if time.monotonic() - idle_since > self._pods._rest:
                        self.done = True
                        return
                    self._stopped.wait(0.2)
                    continue
                self._train(broker, _assignment(message), store)
                idle_since = time.monotonic()
            except (redis.RedisError, StoreError):
                self._stopped.wait(1)

    def _train(self, broker: Broker, assignment: Assignment, store: Any) -> None:
        key = keys.trial_batch(assignment.experiment, assignment.first, assignment.last)
        if store.exists(key) or not broker.acquire(assignment, self._name):
            return
        if not self._stopped.wait(self._pods._seconds) and store.put_if_absent(key, b""):
            self._pods.committed[assignment.id] += 1
        broker.release(assignment, self._name)


class FaultyApiServer:
    """Passes requests on to the API server, and answers some of them itself, or not at all.

    `answers` holds what is still to be answered so: (method, part of the path, status). With a status of 0 the request reaches the server,
    and `lost` is set instead of an answer.
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
