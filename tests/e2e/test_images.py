"""Imports of all modules in the images; run by `make e2e`."""

import json
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.e2e.deployment import CONTROL, PROJECT, WORKER, build_images, docker, prepare_images, python_image

# Prints the failed imports: the missing package, or the error, by module.
IMPORT = """
import importlib, json, sys
failures = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        failures[name] = error.name
    except Exception as error:
        failures[name] = repr(error)
print(json.dumps(failures))
"""
# Leaves an orphan that ends, as models do that fork, and prints whether it is still there as a zombie after five seconds.
ORPHAN = """
import os, pathlib, time
reader, writer = os.pipe()
if (child := os.fork()) == 0:
    if (orphan := os.fork()) == 0:
        time.sleep(0.2)
    else:
        os.write(writer, str(orphan).encode())
    os._exit(0)
os.waitpid(child, 0)
orphan = pathlib.Path("/proc", os.read(reader, 9).decode())
end = time.monotonic() + 5
while orphan.exists() and time.monotonic() < end:
    time.sleep(0.05)
print("zombie" if orphan.exists() else "reaped")
"""
# A process and its child print which of them receives SIGTERM. The process then ends, when a signal to its child would have arrived.
SIGNALS = """
import os, signal, time
name = "child" if os.fork() == 0 else "parent"
def receive(*_):
    os.write(1, f"SIGTERM to {name}\\n".encode())
    time.sleep(0.5)
    os._exit(7)
signal.signal(signal.SIGTERM, receive)
os.write(1, b"ready\\n")  # at once, unlike print
time.sleep(100)
"""


@pytest.fixture(scope="module", autouse=True)
def images() -> None:
    prepare_images()
    build_images()


def modules(*packages: str) -> list[str]:
    """Return the names of all modules of packages in this checkout, except the test suites, which need pytest."""
    paths = (path for package in packages for path in (PROJECT / package).rglob("*.py"))
    names = (_module(path.relative_to(PROJECT)) for path in paths)
    return sorted(name for name in names if not name.startswith("memtail.testing"))


def import_failures(image: str, names: Iterable[str]) -> dict[str, str]:
    """Return the modules that cannot be imported in an image, with the missing package or the error."""
    failures: dict[str, str] = json.loads(docker("run", "--rm", image, "python", "-c", IMPORT, *names))
    return failures


def test_the_control_image_imports_all_modules_that_need_no_torch() -> None:
    services = (f"services/{name}" for name in ("aggregator", "common", "dispatcher", "tools"))
    names = modules("memtail", *services)
    failures = import_failures(CONTROL, names)
    assert {name: cause for name, cause in failures.items() if cause != "torch"} == {}
    assert [name for name in failures if name.startswith("services.")] == []
    assert "memtail.trainers.images.shard" in failures
    assert len(failures) < len(names) / 2


def test_the_worker_image_imports_everything() -> None:
    names = [name for name in modules("memtail", "services") if not name.startswith("services.monitoring")]
    assert import_failures(WORKER, names) == {}


@pytest.mark.parametrize("image", [CONTROL, WORKER])
def test_requirements_are_installed_completely(image: str) -> None:
    assert "No broken requirements" in docker("run", "--rm", image, "pip", "check")


def test_orphans_of_models_are_reaped() -> None:
    assert docker("run", "--rm", WORKER, "python", "-c", ORPHAN) == "reaped\n"


def test_a_signal_reaches_only_the_worker_and_only_once() -> None:
    container = docker("run", "--detach", WORKER, "python", "-c", SIGNALS).strip()
    try:
        while docker("logs", container).count("ready") < 2:
            time.sleep(0.1)
        docker("kill", "--signal", "TERM", container)
        assert docker("wait", container) == "7\n"
        assert docker("logs", container).split("\n") == ["ready", "ready", "SIGTERM to parent", ""]
    finally:
        docker("rm", "--force", container)


def test_print_the_sizes_of_the_images() -> None:
    for image in (python_image(), CONTROL, WORKER):
        size = int(docker("image", "inspect", "--format", "{{.Size}}", image))
        assert size > 0
        print(f"\n{image}: {size / 1e6:.0f} MB", end="")


def _module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")
