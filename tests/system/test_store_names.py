"""Services that reach one S3 server under different names."""


def test_a_worker_that_names_the_server_otherwise_gets_work(cluster, experiment, digits, expected):
    """It starts before the dispatcher, which makes the identity of the store, by which they meet in Redis."""
    worker = cluster.start("worker", MEMTAIL_S3_ENDPOINT=cluster.minio.endpoint.replace("127.0.0.1", "localhost"))
    cluster.until(lambda: "waiting for the dispatcher" in worker.log.read_text())
    for name in ("dispatcher", "aggregator"):
        cluster.start(name)
    experiment_store = cluster.submit(experiment, digits)
    cluster.until_published(experiment_store, experiment.subsets.trials)
    assert cluster.scores(experiment.name) == expected(experiment)
