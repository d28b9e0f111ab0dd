"""`docker compose up` under a separate project name, and queries of the running system."""

import contextlib
import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from memtail.settings import S3Settings
from memtail.storage.s3 import S3Store

PROJECT = Path(__file__).parents[2]
_TOOLS = PROJECT.parent / "shared" / "tools"
CONTROL, WORKER = "memtail-control", "memtail-worker"
# Omitted if its image is not available.
OPTIONAL = "grafana"


class Deployment:
    """A running system, isolated by its project name: containers, volumes and network.

    Args:
        spec: file of the experiment to train.
        out: folder that the command line writes to.
        workers: number of workers.
        code: folder of training code.
        memory: limit of a worker's.
    """

    def __init__(self, spec: Path, out: Path, workers: int, code: Path, memory: str) -> None:
        self.project, self._workers = f"memtail-e2e-{os.getpid()}", workers
        user = os.getuid() or 1000
        os.chown(out, user, -1)
        settings = {
            "MEMTAIL_SPEC": str(spec),
            "MEMTAIL_OUT": str(out),
            "MEMTAIL_USER": f"{user}:{os.getgid() or 1000}",
            "CODE_FOLDER": str(code),
            "MEMTAIL_WORKER_MEMORY": memory,
        }
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MEMTAIL_", "COMPOSE_"))}
        self._environment = {**inherited, **settings}

    def up(self) -> None:
        names = [name for name, service in composed()["services"].items() if "profiles" not in service]
        if not _available(OPTIONAL):
            names.remove(OPTIONAL)
        self.compose("up", "--detach", "--scale", f"worker={self._workers}", *names, capture=False)

    def replace_workers(self, image: str) -> None:
        """Replace the workers by some of another image."""
        self._environment["WORKER_IMAGE"] = image
        self.compose("up", "--detach", "--no-build", "--no-deps", "--scale", f"worker={self._workers}", "worker", capture=False)

    def down(self) -> None:
        """Remove all containers, volumes and networks, but not the images."""
        with contextlib.suppress(subprocess.CalledProcessError):
            self.compose("--profile", "*", "down", "--volumes", "--remove-orphans", "--timeout", "5", capture=False)

    def compose(self, *arguments: str, capture: bool = True) -> str:
        files = ["--file", str(PROJECT / "docker-compose.yml"), "--file", str(PROJECT / "tests/e2e/compose.yml")]
        command = ["docker", "compose", "--project-name", self.project, *files, *arguments]
        done = subprocess.run(
            command, env=self._environment, cwd=PROJECT, check=True, text=True, stdout=subprocess.PIPE if capture else None
        )
        return done.stdout or ""

    def containers(self, service: str | None = None) -> list[dict[str, Any]]:
        """Return Docker's description of the containers, including those that have ended."""
        label = f"label=com.docker.compose.project={self.project}"
        ids = docker("ps", "--all", "--quiet", "--filter", label).split()
        found = json.loads(docker("inspect", *ids)) if ids else []
        return [each for each in found if service in (None, service_of(each))]

    def address(self, service: str, port: int) -> str:
        return f"http://{self.compose('port', service, str(port)).strip()}"

    def passwords(self) -> dict[str, str]:
        """Return all passwords by purpose."""
        shown = self.compose(
            "run", "--rm", "--no-deps", "passwords", "python", "-m", "services.tools.make_passwords", "/run/memtail", "--show"
        )
        return {meaning.strip(): password for password, _, meaning in (line.partition(" ") for line in shown.splitlines())}

    def store(self) -> S3Store:
        """Open the bucket through its published port."""
        keys = self.passwords()
        access = next(password for meaning, password in keys.items() if meaning.startswith("access key"))
        secret = next(password for meaning, password in keys.items() if meaning.startswith("secret key"))
        return S3Store("memtail", settings=S3Settings(endpoint=self.address("minio", 9000), access_key=access, secret_key=secret))

    def until(self, what: Callable[[], Any], seconds: float) -> None:
        """Wait until a condition is true."""
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, self.compose("logs", "--tail", "40")
            time.sleep(0.1)


def composed() -> Any:
    """Parse docker-compose.yml."""
    return yaml.safe_load((PROJECT / "docker-compose.yml").read_text())


def prepare_images() -> None:
    """Start a container engine and prepare images of other projects by a script, if this machine has one."""
    script = _TOOLS / "local-images.sh"
    if script.exists():
        subprocess.run([_TOOLS / "install.sh", "prometheus", "minio", "mc"], check=True)
        subprocess.run([script, "--engine", python_image(), *(_image(name) for name in _foreign() if name != OPTIONAL)], check=True)


def build_images() -> float:
    """Build our images; returns the seconds it took."""
    began = time.monotonic()
    command = ["docker", "compose", "--file", str(PROJECT / "docker-compose.yml"), "build", "--quiet", "dispatcher", "worker"]
    subprocess.run(command, check=True)
    return time.monotonic() - began


def python_image() -> str:
    """Return the base image."""
    found = re.search(r"^ARG PYTHON_IMAGE=(\S+)", (PROJECT / "Dockerfile").read_text(), re.MULTILINE)
    assert found
    return found[1]


def docker(*arguments: str) -> str:
    return subprocess.run(["docker", *arguments], check=True, capture_output=True, text=True).stdout


def service_of(container: dict[str, Any]) -> str:
    return str(container["Config"]["Labels"]["com.docker.compose.service"])


def _foreign() -> list[str]:
    """Return the services that use images of other projects."""
    return [name for name, service in composed()["services"].items() if "build" not in service]


def _image(service: str) -> str:
    return re.sub(r"^\$\{\w+:-(.+)\}$", r"\1", composed()["services"][service]["image"])


def _available(service: str) -> bool:
    commands = (["image", "inspect", _image(service)], ["pull", "--quiet", _image(service)])
    return any(subprocess.run(["docker", *command], capture_output=True, check=False).returncode == 0 for command in commands)
