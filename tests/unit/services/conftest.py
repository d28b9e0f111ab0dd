"""Fixtures of tests of services without servers."""

import pytest

from memtail.execution.declare import declare as declare_record
from memtail.experiment_store import ExperimentStore
from memtail.storage.local import LocalStore


@pytest.fixture
def experiment_store(declare, digits, tmp_path):
    """An experiment of six shards in a folder."""
    experiment = declare(24, execution={"trials_per_shard": 4, "device": "cpu"}, subsets={"design": "balanced"})
    made = ExperimentStore(LocalStore(tmp_path), experiment.name)
    made.register(declare_record(experiment, digits, 4))
    return made
