"""Shared by all tests: a cache, small experiments, servers, and which tests share a process of pytest-xdist."""

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


# A shell that runs the tests in the background ignores SIGINT, and so would every process that a test starts and then interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_TESTS = Path(__file__).parent
_SERVERS = {"living": "cluster", "cluster": "cluster", "kubernetes": "kubernetes", "chromium": "browser"}


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their folder and by what they need, and group those that one process of pytest-xdist had better run.

    Tests of a file share fixtures, so they stay together, and so do all that use the living cluster; unit tests, and those that start a
    cluster for themselves, run wherever there is room.
    """
    for item in items:
        folder = item.path.relative_to(_TESTS).parts[0]
        if folder in ("system", "kubernetes"):
            item.add_marker(folder)
        fixtures = getattr(item, "fixturenames", ())
        for fixture, marker in _SERVERS.items():
            if fixture in fixtures:
                item.add_marker(marker)
        if "living" in fixtures:
            item.add_marker(pytest.mark.xdist_group("living"))
        elif folder != "unit" and "cluster" not in fixtures:
            item.add_marker(pytest.mark.xdist_group(str(item.path.relative_to(_TESTS))))
    items.sort(key=lambda item: "living" not in getattr(item, "fixturenames", ()))  # the longest group first; stable otherwise


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Runs train in the process of the tests, but where whole processes are the subject."""
    inline.train_here(item.get_closest_marker("system") is None)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prepared datasets go to a folder made for this run of the tests."""
    import os

    os.environ["MEMTAIL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ.pop("MEMTAIL_DATA", None)
    os.environ.pop("MEMTAIL_STORE", None)


@pytest.fixture(autouse=True)
def own_logs() -> Iterator[None]:
    """How a command or a service sets up its logs is not for the next test."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def declare() -> Callable[..., Experiment]:
    """Makes experiments on digits from what differs: `declare(trials=8, training={"epochs": 2})`."""

    def make(trials: int = 16, **parts: Any) -> Experiment:
        subsets = {"trials": trials, **parts.pop("subsets", {})}
        training = {"epochs": 2, **parts.pop("training", {})}
        spec = {"name": "digits", "dataset": {"name": "digits"}, "model": {"name": "mlp", "hidden": [16]}}
        return Experiment.parse({**spec, "training": training, "subsets": subsets, **parts})

    return make


@pytest.fixture(scope="session")
def digits(own_cache: None) -> ImageDataset:
    return datasets.prepare(Experiment.parse({"name": "digits", "dataset": {"name": "digits"}}).dataset)


@pytest.fixture(scope="session")
def minio(tmp_path_factory: pytest.TempPathFactory) -> Iterator["MinioServer"]:
    """One server for all tests; each makes buckets of its own."""
    from tests.support.servers import MinioServer

    with MinioServer(tmp_path_factory.mktemp("minio")) as server:
        yield server


@pytest.fixture(scope="session")
def explored(tmp_path_factory: pytest.TempPathFactory, own_cache: None) -> LocalStore:
    """A store with experiments to look at, which no test changes."""
    from tests.support.explored import fill

    store = LocalStore(tmp_path_factory.mktemp("explored"))
    fill(store, tmp_path_factory.mktemp("images"))
    return store
