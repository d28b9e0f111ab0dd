"""Real servers for tests, each with a free port and its own folder."""

import contextlib
import os
import random
import secrets
import shutil
import socket
import socketserver
import subprocess
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
import urllib3

from memtail.settings import S3Settings
from memtail.storage.s3 import S3Store

_PROJECT = Path(__file__).parents[2]
#: Scripts that install servers.
TOOLS = _PROJECT.parent / "shared" / "tools"
_INSTALL = TOOLS / "install.sh"
REGION = "north-1"


def server_binary(name: str) -> str:
    """Return the path of a server's program; install it first if it is missing and an installation script exists (takes minutes)."""
    if shutil.which(name) is None and _INSTALL.exists():
        subprocess.run(["nice", "-n", "19", str(_INSTALL), name], check=False)
    found = shutil.which(name)
    if found is None:
        pytest.fail(f"this test needs the program {name}, which is not on PATH: install it", pytrace=False)
    return found


def debian_program(name: str) -> str:
    """Return the path of a program; install the Debian package of its name first if it is missing and this process is root."""
    if shutil.which(name) is None and shutil.which("apt-get") and os.geteuid() == 0:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "-y", "--no-install-recommends", name]):
            subprocess.run(["apt-get", "-qq", *command], env=environment, capture_output=True, check=False)
    return shutil.which(name) or pytest.fail(f"this test needs the program {name}, which is not on PATH: install it", pytrace=False)


def free_port() -> int:
    """Return a free port below the ephemeral ports, any of which a connection may take before the caller listens on it."""
    while True:
        port = random.randrange(10_000, 30_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


class MinioServer:
    """A MinIO server on the loopback interface, with random credentials; with TLS if `certificates` holds public.crt and private.key."""

    def __init__(self, folder: Path, certificates: Path | None = None) -> None:
        self._folder, self._certificates = folder, certificates
        self.port = free_port()
        self.endpoint = f"{'https' if certificates else 'http'}://127.0.0.1:{self.port}"
        self.access_key, self.secret_key = secrets.token_hex(10), secrets.token_hex(20)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "MinioServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        environment = {
            "HOME": str(self._folder),
            "PATH": os.environ["PATH"],
            "MINIO_ROOT_USER": self.access_key,
            "MINIO_ROOT_PASSWORD": self.secret_key,
            "MINIO_DOMAIN": "localhost",
            "MINIO_SITE_REGION": REGION,
            "MINIO_BROWSER": "off",
            "MINIO_PROMETHEUS_AUTH_TYPE": "public",
            "MINIO_UPDATE": "off",
        }
        command = [server_binary("minio"), "server", str(self._folder / "data"), "--address", f"127.0.0.1:{self.port}"]
        if self._certificates:
            command += ["--certs-dir", str(self._certificates)]
        log = self._folder / "minio.log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        http = urllib3.PoolManager(cert_reqs="CERT_NONE", retries=False)
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(urllib3.exceptions.HTTPError), _quiet():
                if http.request("GET", f"{self.endpoint}/minio/health/cluster", timeout=5).status == 200:
                    return
            assert self._process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

    def settings(self, **changes: Any) -> S3Settings:
        return S3Settings(**{"endpoint": self.endpoint, "access_key": self.access_key, "secret_key": self.secret_key, **changes})

    def environment(self) -> dict[str, str]:
        """Return this process's environment with the address and the key of the server."""
        return {
            **os.environ,
            "MEMTAIL_S3_ENDPOINT": self.endpoint,
            "MEMTAIL_S3_ACCESS_KEY": self.access_key,
            "MEMTAIL_S3_SECRET_KEY": self.secret_key,
        }

    def add_user(self, name: str, secret_key: str) -> None:
        """Add a user who may read and write every bucket, or replace the secret of a user."""
        host = self.endpoint.replace("://", f"://{self.access_key}:{self.secret_key}@")
        environment = {**os.environ, "MC_HOST_server": host, "MC_CONFIG_DIR": str(self._folder / "mc")}
        for command in (["user", "add", "server", name, secret_key], ["policy", "attach", "server", "readwrite", "--user", name]):
            mc = subprocess.run([server_binary("mc"), "admin", *command], env=environment, capture_output=True, text=True, check=False)
            assert mc.returncode == 0 or "already in effect" in mc.stderr + mc.stdout, mc.stderr + mc.stdout

    def new_bucket(self) -> str:
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        ca = self._certificates and self._certificates / "ca.pem"
        S3Store(name, settings=self.settings(ca_file=ca, region=REGION)).make_bucket()
        return name


@contextlib.contextmanager
def _quiet():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", urllib3.exceptions.InsecureRequestWarning)
        yield


class LossyProxy:
    """Forwards TCP connections to a server, and cuts some of them during the response.

    `cuts` lists pending cuts as (start of the request, bytes): the response to the next such request is cut after that number of bytes.
    While `silent`, connections stay open and are accepted, but nothing is forwarded in either direction.
    """

    def __init__(self, server: MinioServer) -> None:
        self.cuts: list[tuple[bytes, int]] = []
        self.silent = False
        self.requests: list[bytes] = []
        proxy = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with socket.create_connection(("127.0.0.1", server.port)) as upstream:
                    threading.Thread(target=self.forward, args=(upstream,), daemon=True).start()
                    with contextlib.suppress(OSError):
                        self.back(upstream)
                    for end in (self.request, upstream):
                        with contextlib.suppress(OSError):
                            end.shutdown(socket.SHUT_RDWR)

            def forward(self, upstream: socket.socket) -> None:
                with contextlib.suppress(OSError):
                    while data := self.request.recv(1 << 16):
                        head = data.partition(b"\r\n")[0]
                        if head.endswith(b" HTTP/1.1"):
                            proxy.requests.append(head)
                            self.cut = next((cut for cut in proxy.cuts if head.startswith(cut[0])), None)
                        if not proxy.silent:
                            upstream.sendall(data)
                    upstream.shutdown(socket.SHUT_WR)

            def back(self, upstream: socket.socket) -> None:
                passed = 0
                while data := upstream.recv(1 << 16):
                    cut = self.cut
                    if cut is not None and passed + len(data) > cut[1]:
                        proxy.cuts.remove(cut)
                        self.request.sendall(data[: cut[1] - passed])
                        return
                    passed = passed + len(data) if cut else 0
                    if not proxy.silent:
                        self.request.sendall(data)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True

        self._server = Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "LossyProxy":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
