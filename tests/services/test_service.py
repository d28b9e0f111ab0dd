"""The service from submission to scores, undisturbed."""

from tests.services.conftest import TRIALS


def test_the_service_publishes_the_bits_of_an_embedded_run(cluster, experiment, digits, expected):
    archive = cluster.submit(experiment, digits)
    for name in ("dispatcher", "worker", "worker", "aggregator"):
        cluster.start(name)
    cluster.until_published(archive, TRIALS)
    assert cluster.scores(experiment.name) == expected(experiment)
    assert not archive.attempts() and not list(archive.store.list("experiments/digits/checkpoints/"))
