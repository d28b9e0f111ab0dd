"""Fixtures of the service's tests."""

from collections.abc import Callable, Iterator

import pytest

from memtail.execution.embedded import run
from memtail.scores.publish import latest_version
from memtail.spec import Experiment
from memtail.storage import keys
from memtail.storage.local import LocalStore
from tests.integration.conftest import minio  # noqa: F401 - a fixture
from tests.integration.servers import MinioServer
from tests.services.cluster import Cluster

TRIALS, PER_SHARD = 24, 4


@pytest.fixture
def experiment(declare: Callable[..., Experiment]) -> Experiment:
    return declare(TRIALS, training={"epochs": 4}, execution={"trials_per_shard": PER_SHARD, "device": "cpu"})


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Experiment], dict[str, bytes]]:
    """The score files of an undisturbed embedded run."""
    made: dict[str, dict[str, bytes]] = {}

    def scores(experiment: Experiment) -> dict[str, bytes]:
        text = experiment.model_dump_json()
        if text not in made:
            store = LocalStore(tmp_path_factory.mktemp("expected"))
            run(experiment, store.root)
            pointer = latest_version(store, experiment.name)
            assert pointer is not None
            made[text] = {file: store.get(keys.scores(experiment.name, pointer.version) + file) for file in pointer.files}
        return made[text]

    return scores


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory, minio: MinioServer) -> Iterator[Cluster]:  # noqa: F811
    with Cluster(tmp_path_factory.mktemp("cluster"), minio) as started:
        yield started
