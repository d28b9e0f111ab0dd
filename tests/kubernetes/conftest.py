"""Session-scoped Kubernetes control plane: API server, controllers, scheduler, and simulated nodes."""

import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.servers import TOOLS, free_port

SCRIPT = TOOLS / "kubernetes.sh"
CONTROL_PLANE = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kwok")


class Kubernetes:
    """A control plane with simulated nodes: pods become Running, but their containers do not execute."""

    def __init__(self, folder: Path) -> None:
        # the script uses this port and the next two
        self._environment = {**os.environ, "KUBERNETES_STATE": str(folder), "KUBERNETES_PORT": str(free_port())}
        self.kubeconfig = str(folder / "kubeconfig")

    def start(self) -> None:
        self._control("start")

    def stop(self) -> None:
        self._control("stop")

    def nodes(self, count: int, gpus: int = 0) -> None:
        """Add nodes."""
        self._control("nodes", str(count), str(gpus))

    def stop_apiserver(self) -> None:
        self._control("apiserver", "stop")

    def start_apiserver(self) -> None:
        self._control("apiserver", "start")

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """Run kubectl as administrator, and return its output."""
        command = ["kubectl", "--kubeconfig", self.kubeconfig, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, input=stdin, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def namespace(self, prefix: str, restricted: bool = True) -> str:
        """Create a namespace, by default with the Pod Security level "restricted"."""
        name = f"{prefix}-{uuid.uuid4().hex[:6]}"
        self.kubectl("create", "namespace", name)
        if restricted:
            levels = [f"pod-security.kubernetes.io/{mode}=restricted" for mode in ("enforce", "warn")]
            self.kubectl("label", "namespace", name, *levels)
        return name

    def wait(self, condition: Callable[[], bool], seconds: float = 180) -> None:
        """Wait until a condition is true."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.5)

    def token(self, namespace: str, account: str) -> str:
        """Create a token of a service account."""
        return self.kubectl("create", "token", account, "--namespace", namespace, "--duration", "1h").strip()

    def kubeconfig_of(self, namespace: str, account: str, path: Path, server: str | None = None) -> Path:
        """Write a kubeconfig with the rights of a service account; `server` may be a proxy in front of the API server."""
        address = server or self.kubectl("config", "view", "--minify", "--output", "jsonpath={.clusters[0].cluster.server}").strip()
        cluster = f'{{name: c, cluster: {{server: "{address}", insecure-skip-tls-verify: true}}}}'
        user = f"{{name: u, user: {{token: {self.token(namespace, account)}}}}}"
        path.write_text(
            f"apiVersion: v1\nkind: Config\nclusters: [{cluster}]\nusers: [{user}]\n"
            f"contexts: [{{name: x, context: {{cluster: c, user: u, namespace: {namespace}}}}}]\ncurrent-context: x\n"
        )
        path.chmod(0o600)
        return path

    def _control(self, *arguments: str) -> None:
        # to a file instead of a pipe, which the started daemons would keep open
        log = Path(self._environment["KUBERNETES_STATE"] + ".log")
        with log.open("ab") as output:
            done = subprocess.run(["bash", str(SCRIPT), *arguments], env=self._environment, stdout=output, stderr=output, check=False)
        assert done.returncode == 0, log.read_text()


def install_tools(*names: str) -> None:
    """Install missing tools; the first time takes many minutes."""
    if missing := [name for name in names if shutil.which(name) is None]:
        subprocess.run(["bash", str(TOOLS / "install.sh"), *missing], check=True)


@pytest.fixture(scope="session")
def kubernetes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubernetes]:
    install_tools(*CONTROL_PLANE)
    cluster = Kubernetes(tmp_path_factory.mktemp("kubernetes") / "state")
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
