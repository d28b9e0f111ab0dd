"""Shared fixtures (cache, small experiments, servers), markers, and the distribution of tests over the processes of pytest-xdist."""

import atexit
import gc
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from memtail import datasets
from memtail.datasets import ImageDataset
from memtail.spec import Experiment
from memtail.storage.local import LocalStore
from tests.support import inline

if TYPE_CHECKING:
    from tests.support.servers import MinioServer


# Importing creates much that stays: collections would walk over all of it again and again, as would those of pytest at its end. The end of
# the process frees it, because some libraries report what is left as a leak.
gc.disable()
atexit.register(gc.unfreeze)

# A background job of a shell ignores SIGINT. Processes started by tests would inherit that, but tests interrupt them by SIGINT.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Each process of pytest-xdist has about one core, which threads that wait in a loop would keep busy: torch gets one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_TESTS = Path(__file__).parent
_GROUP = re.compile(r"@[\w./-]+$")  # parameters of an id end with a bracket
# Tests that import torchvision and scipy, inside of functions, or compile kernels: that takes seconds in each process.
_IMPORTS = (
    "unit/datasets/test_datasets.py",
    "unit/datasets/test_image_tree.py",
    "unit/datasets/test_torchvision_datasets.py",
    "unit/estimators/",
    "unit/models/",
    "unit/trainers/images/",
)
_SERVERS = {"living": "cluster", "cluster": "cluster", "kubernetes": "kubernetes", "chromium": "browser"}


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by folder and required servers, and group tests that should run in one process of pytest-xdist.

    Tests of a file share fixtures and form a group; so do all tests that use the living cluster, and unit tests with slow imports. Other
    unit tests, and tests that start their own cluster, are distributed freely.
    """
    for item in items:
        path = item.path.relative_to(_TESTS)
        folder = path.parts[0]
        if folder in ("system", "kubernetes"):
            item.add_marker(folder)
        fixtures = getattr(item, "fixturenames", ())
        for fixture, marker in _SERVERS.items():
            if fixture in fixtures:
                item.add_marker(marker)
        if "living" in fixtures:
            item.add_marker(pytest.mark.xdist_group("living"))
        elif path.as_posix().startswith(_IMPORTS):
            item.add_marker(pytest.mark.xdist_group("imports"))
        elif folder != "unit" and "cluster" not in fixtures:
            item.add_marker(pytest.mark.xdist_group(str(path)))
    items.sort(key=lambda item: "living" not in getattr(item, "fixturenames", ()))  # the longest group first; the sort is stable


def pytest_collection_finish() -> None:
    """Exempt all modules and tests from garbage collection for good."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Report tests by their ids without the groups of pytest-xdist, so that `--last-failed` finds them."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        report.nodeid = _GROUP.sub("", report.nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let embedded runs train in the process of the tests, except in system tests."""
    inline.train_here(item.get_closest_marker("system") is None)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Use a new cache folder for this test session."""
    os.environ["MEMTAIL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ.pop("MEMTAIL_DATA", None)
    os.environ.pop("MEMTAIL_STORE", None)


@pytest.fixture(scope="session", autouse=True)
def one_decoder() -> Iterator[None]:
    """End the process that decodes images."""
    yield
    inline.end_decoder()


@pytest.fixture(autouse=True)
def own_logs() -> Iterator[None]:
    """Reset the log configuration of a command or a service after each test."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def declare() -> Callable[..., Experiment]:
    """Factory of experiments on digits; arguments replace defaults: `declare(trials=8, training={"epochs": 2})`."""

    def make(trials: int = 16, **parts: Any) -> Experiment:
        subsets = {"trials": trials, **parts.pop("subsets", {})}
        training = {"epochs": 2, **parts.pop("training", {})}
        spec = {"name": "digits", "dataset": {"name": "digits"}, "model": {"name": "mlp", "hidden": [16]}}
        return Experiment.parse({**spec, "training": training, "subsets": subsets, **parts})

    return make


@pytest.fixture(scope="session")
def digits(own_cache: None) -> ImageDataset:
    return datasets.as_images(datasets.prepare(Experiment.parse({"name": "digits", "dataset": {"name": "digits"}}).dataset))


@pytest.fixture
def no_images() -> Iterator[None]:
    """Keep no examples on a device, before and after."""
    from memtail.trainers.images.images import release_images  # imports torch

    release_images()
    yield
    release_images()


@pytest.fixture(scope="session")
def minio(tmp_path_factory: pytest.TempPathFactory) -> Iterator["MinioServer"]:
    """One server for all tests; each test creates its own buckets."""
    from tests.support.servers import MinioServer

    with MinioServer(tmp_path_factory.mktemp("minio")) as server:
        yield server


@pytest.fixture(scope="session")
def explored(tmp_path_factory: pytest.TempPathFactory, own_cache: None) -> LocalStore:
    """A store with experiments for the explorer; tests do not change it."""
    from tests.support.explored import fill

    store = LocalStore(tmp_path_factory.mktemp("explored"))
    fill(store, tmp_path_factory.mktemp("images"))
    return store
