"""Services on datasets without a test set, or without labels: the bits of an embedded run."""

import pytest

from memtail.execution.submit import submit
from memtail.experiment_store import ExperimentStore
from memtail.report.pointer import latest_report
from tests.support.incomplete import images_without_test_set, texts_without_labels

TRIALS = 32


@pytest.mark.slow
@pytest.mark.parametrize(
    "declare",
    [
        lambda folder: images_without_test_set(folder, TRIALS),
        lambda folder: texts_without_labels(folder, TRIALS, 20),
        lambda folder: texts_without_labels(folder, TRIALS, 0, name="neither"),
    ],
    ids=["no test set", "no labels", "neither"],
)
def test_services_publish_the_bits_of_an_embedded_run(living, expected, tmp_path, declare):
    experiment = declare(tmp_path)
    scores = expected(experiment)
    submit(experiment, living.store)
    experiment_store = ExperimentStore(living.store, experiment.name)
    living.until_published(experiment_store, TRIALS)
    assert living.scores(experiment.name) == scores
    assert not experiment_store.attempts()
    living.until(lambda: latest_report(living.store, experiment.name) is not None)
