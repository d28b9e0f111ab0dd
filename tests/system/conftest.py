"""Fixtures of tests of whole processes: clusters, per test or per session, small experiments, and expected scores."""

import itertools
import json
from collections.abc import Callable, Iterator

import pytest

from memtail.execution.embedded import run
from memtail.scores.pointer import latest_version
from memtail.spec import Experiment
from memtail.storage import keys
from memtail.storage.local import LocalStore
from tests.support import inline
from tests.support.cluster import Cluster, LivingCluster, RedisServer
from tests.support.experiments import PER_SHARD, TRIALS, Declare, gated
from tests.support.servers import MinioServer

_numbers = itertools.count()


@pytest.fixture
def experiment(declare: Declare) -> Experiment:
    """A small experiment with a name that is unique in this process."""
    execution = {"trials_per_shard": PER_SHARD, "device": "cpu"}
    return declare(TRIALS, name=f"small-{next(_numbers)}", training={"epochs": 4}, execution=execution)


@pytest.fixture
def slow(declare: Declare) -> Experiment:
    """An experiment whose shards wait for the gate of a `living` cluster, so that a fault occurs during training."""
    return gated(declare, name=f"slow-{next(_numbers)}")


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Experiment], dict[str, bytes]]:
    """Score files of an undisturbed embedded run, trained once for all experiments that differ only in name."""
    made: dict[str, dict[str, bytes]] = {}

    def scores(experiment: Experiment) -> dict[str, bytes]:
        nameless = experiment.model_copy(update={"name": "expected"})
        text = nameless.model_dump_json()
        if text not in made:
            store = LocalStore(tmp_path_factory.mktemp("expected"))
            with inline.training():
                run(nameless, store.root)
            pointer = latest_version(store, "expected")
            assert pointer is not None
            made[text] = {file: store.get(keys.scores("expected", pointer.version) + file) for file in pointer.files}
        summary = made[text]["summary.json"].replace(b'"expected"', json.dumps(experiment.name).encode())
        return {**made[text], "summary.json": summary}

    return scores


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """A Redis server without services, for the tests of a file."""
    started = RedisServer()
    started.start()
    yield started
    started.stop()


@pytest.fixture
def own_minio(tmp_path_factory):
    with MinioServer(tmp_path_factory.mktemp("minio")) as server:
        yield server


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory, minio: MinioServer) -> Iterator[Cluster]:
    """A bucket and a broker for one test, without services."""
    with Cluster(tmp_path_factory.mktemp("cluster"), minio) as started:
        yield started


@pytest.fixture(scope="session")
def session_cluster(tmp_path_factory: pytest.TempPathFactory, minio: MinioServer) -> Iterator[LivingCluster]:
    """See `living`."""
    with LivingCluster(tmp_path_factory.mktemp("living"), minio) as started:
        yield started


@pytest.fixture
def living(session_cluster: LivingCluster) -> LivingCluster:
    """The running cluster that tests of a session share; idle and with a closed gate when a test begins."""
    session_cluster.restore()
    return session_cluster
