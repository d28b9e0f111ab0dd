"""The frequency of the aggregator's publications, by a clock that the test sets."""

import types

import numpy as np
import pytest

from memtail.datasets.staged_dataset import stage
from memtail.execution.embedded import declare as declared
from memtail.experiment_store import ExperimentStore
from memtail.scores.pointer import latest_version
from memtail.storage.local import LocalStore
from memtail.trials import Provenance, TrialBatch, TrialMetrics, pack
from services.aggregator import aggregator as module
from services.aggregator.aggregator import Aggregator
from services.common.settings import ServiceSettings


def test_publishing_takes_a_tenth_of_the_time_at_most_but_the_last_version_comes_at_once(declare, digits, tmp_path, monkeypatch):
    now = 0.0

    def publish(*arguments):
        nonlocal now
        now += 100.0
        return module_publish(*arguments)

    module_publish = module.publish
    monkeypatch.setattr(module, "publish", publish)
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: now))
    store = LocalStore(tmp_path)
    stage(digits, store)
    experiment_store = ExperimentStore(store, "digits")
    record = declared(declare(40, execution={"trials_per_shard": 8, "device": "cpu"}), digits)
    experiment_store.register(record)
    aggregator = Aggregator(store, ServiceSettings(publish_trials=1, publish_seconds=1))
    rng = np.random.default_rng(0)

    def published_after(first, seconds):
        """Return the trials in the scores after eight more are committed and this time has passed."""
        nonlocal now
        trials = np.arange(first, first + 8, dtype=np.int32)
        bits = [pack(rng.random((8, size)) < 0.5) for size in (record.n_train, record.n_train, record.n_test)]
        metrics = [TrialMetrics(int(trial), False, 0.1, 1.0, 0.5, 0.75) for trial in trials]
        provenance = Provenance(record.fingerprint)
        experiment_store.commit(TrialBatch(trials, *bits, record.n_train, record.n_test, metrics, provenance), record.fingerprint)
        now += seconds
        aggregator.catch_up()
        return latest_version(store, "digits").summary.trials

    assert published_after(0, 0) == 8
    assert published_after(8, 890) == 8
    assert published_after(16, 10) == 24
    assert published_after(24, 10) == 24
    assert published_after(32, 10) == 40


@pytest.fixture(autouse=True)
def _no_series():
    yield
    module.experiment_series(0).keep_only(())
