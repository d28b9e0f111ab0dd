"""Studies of an experiment in a bucket, whose models the services train."""

import json
import subprocess
import sys
from typing import Any

from memtail.execution.progress import progress_of
from memtail.experiment_store import ExperimentStore
from memtail.report.publish import latest_report
from memtail.studies.result import load_results
from tests.support.cluster import Cluster

REPEATS = "4"


def study(cluster: Cluster, *arguments: str) -> dict[str, Any]:
    """What `memtail study` answers a script on a machine that has the bucket and nothing else."""
    environment = {**cluster.environment, "MEMTAIL_CACHE": str(cluster.folder / "own cache")}
    command = [sys.executable, "-m", "memtail", "study", *arguments, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_studies_in_a_bucket_are_trained_by_the_services_though_a_worker_is_killed(cluster, declare, digits):
    execution = {"device": "cpu", "trials_per_shard": 16}
    experiment = declare(128, model={"name": "mlp", "hidden": [32]}, training={"epochs": 5}, execution=execution)
    experiment_store = cluster.submit(experiment, digits)
    for name in ("dispatcher", "aggregator"):
        cluster.start(name)
    worker = cluster.start("worker")
    cluster.until_published(experiment_store, 128)
    worker.stop()

    asked = (
        ("removal", "digits", "--theta", "0.25", "--repeats", REPEATS, "--submit"),
        ("removal", "digits", "--pairs", "--repeats", REPEATS, "--submit"),
        ("last-layer", "digits", "--submit"),
    )
    entered = [study(cluster, *arguments) for arguments in asked]
    assert [each["trained"] for each in entered] == [False] * 3
    assert [each["trials"] for each in entered] == [12, 12, 128]
    trained = [ExperimentStore(cluster.store, each["experiment"]) for each in entered]
    worker = cluster.start("worker")
    cluster.until(lambda: any(each.committed() for each in trained))
    worker.kill()
    cluster.start("worker")
    for each in trained:
        cluster.until(lambda name=each.name: progress_of(cluster.store, name).ending == "published")
    # the same commands again evaluate; near-duplicates are judged by the models of --pairs
    asked += (("duplicates", "digits", "--repeats", REPEATS), ("stability", "digits"))
    answers = [study(cluster, *arguments) for arguments in asked]

    assert [answer["study"] for answer in answers] == ["removal", "removal-pairs", "last-layer", "duplicates", "stability"]
    assert [answer["trials"] for answer in answers] == [12, 12, 256, 140, 128]
    assert entered[1]["experiment"] in answers[3]["experiments"]
    assert [result.to_json() for result in load_results(cluster.store, "digits")] == sorted(answers, key=lambda answer: answer["study"])
    # the experiment has a report; what its studies train needs none
    assert latest_report(cluster.store, "digits")
    assert not any(latest_report(cluster.store, each.name) for each in trained)
