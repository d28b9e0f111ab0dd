"""Imports of all modules in the images; run by `make e2e`."""

import json
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


def test_print_the_sizes_of_the_images() -> None:
    for image in (python_image(), CONTROL, WORKER):
        size = int(docker("image", "inspect", "--format", "{{.Size}}", image))
        assert size > 0
        print(f"\n{image}: {size / 1e6:.0f} MB", end="")


def _module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")
