"""Studies of an experiment in a bucket, whose models the services train."""

import json
from typing import Any

from memtail.execution.progress import progress_of
from memtail.experiment_store import ExperimentStore
from memtail.report.pointer import latest_report
from memtail.studies.result import load_results
from tests.support.cli import command
from tests.support.cluster import LivingCluster

REPEATS = "4"


def study(cluster: LivingCluster, *arguments: str) -> dict[str, Any]:
    """Run `memtail study --json` with a separate cache, so that only the bucket is shared; return the parsed output."""
    environment = {**cluster.environment, "MEMTAIL_CACHE": str(cluster.folder / "own cache")}
    done = command("study", *arguments, "--json", env=environment)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_services_train_studies_in_a_bucket_although_a_worker_is_killed(living, declare, digits):
    execution = {"device": "cpu", "trials_per_shard": 16}
    experiment = declare(128, model={"name": "mlp", "hidden": [32]}, training={"epochs": 5}, execution=execution)
    experiment_store = living.submit(experiment, digits)
    living.until_published(experiment_store, 128)
    living.end(*living.kinds("worker"))

    commands = (
        ("removal", "digits", "--theta", "0.25", "--repeats", REPEATS, "--submit"),
        ("removal", "digits", "--pairs", "--repeats", REPEATS, "--submit"),
        ("last-layer", "digits", "--submit"),
    )
    submitted = [study(living, *arguments) for arguments in commands]
    assert [each["trained"] for each in submitted] == [False] * 3
    assert [each["trials"] for each in submitted] == [12, 12, 128]
    trained = [ExperimentStore(living.store, each["experiment"]) for each in submitted]
    worker = living.start("worker")
    living.until(lambda: any(each.committed() for each in trained))
    worker.kill()
    living.start("worker")
    for each in trained:
        living.until(lambda name=each.name: progress_of(living.store, name).ending == "published")
    # the same commands evaluate the finished studies; `duplicates` uses the models of --pairs
    others = (("duplicates", "digits", "--repeats", REPEATS), ("stability", "digits"))
    answers = [study(living, *arguments) for arguments in (*commands, *others)]

    assert [answer["study"] for answer in answers] == ["removal", "removal-pairs", "last-layer", "duplicates", "stability"]
    assert [answer["trials"] for answer in answers] == [12, 12, 256, 140, 128]
    assert submitted[1]["experiment"] in answers[3]["experiments"]
    assert [result.to_json() for result in load_results(living.store, "digits")] == sorted(answers, key=lambda answer: answer["study"])
    # only the experiment itself has a report, not those that its studies train
    assert latest_report(living.store, "digits")
    assert not any(latest_report(living.store, each.name) for each in trained)
