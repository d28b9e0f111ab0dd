"""Drill with services: a bucket is backed up in the middle of a run and restored elsewhere, and new services finish the experiment."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from memtail.experiment_store import ExperimentStore
from memtail.storage import keys
from memtail.storage.identity import read_identity
from tests.support.cluster import PROJECT, Cluster
from tests.support.experiments import PER_SHARD, SHARDS, TRIALS, gated
from tests.support.faulty_models import Gate
from tests.support.servers import MinioServer, server_binary

SERVICES = ("dispatcher", "worker", "aggregator")


def mirror(source: str, target: str, folder: Path, *servers: tuple[str, MinioServer], options: list[str]) -> None:
    hosts = {f"MC_HOST_{name}": each.endpoint.replace("://", f"://{each.access_key}:{each.secret_key}@") for name, each in servers}
    environment = {"HOME": str(folder), "MC_CONFIG_DIR": str(folder / "mc"), **hosts}
    subprocess.run([server_binary("mc"), "mirror", *options, source, target], env=environment, capture_output=True, check=True)


def documented_options() -> list[str]:
    command = re.search(r"^mc mirror (--exclude .*) memtail/BUCKET", (PROJECT / "docs/operations/backup.md").read_text(), re.MULTILINE)
    assert command
    return shlex.split(command[1])


@pytest.mark.slow
def test_services_finish_an_experiment_that_was_half_trained_when_it_was_backed_up(
    cluster, own_minio, declare, digits, expected, tmp_path, tmp_path_factory
):
    gate, experiment = Gate(tmp_path / "gate"), gated(declare, name="restored")
    waits = {"GATE_FOLDER": str(tmp_path / "gate")}
    before = cluster.submit(experiment, digits)
    for name in SERVICES:
        cluster.start(name, **waits)
    gate.admit(SHARDS // 2)
    cluster.until(lambda: len(before.committed()) == SHARDS // 2)
    cluster.until_published(before, PER_SHARD)

    mirror(f"memtail/{cluster.bucket}", str(tmp_path / "backup"), tmp_path, ("memtail", cluster.minio), options=documented_options())
    gate.admit(1)  # which is lost, since it is committed after the backup
    cluster.until(lambda: len(before.committed()) == SHARDS // 2 + 1)
    for service in cluster.services:
        service.kill()

    with Cluster(tmp_path_factory.mktemp("restored"), own_minio) as new:  # with an empty Redis
        mirror(str(tmp_path / "backup"), f"memtail/{new.bucket}", tmp_path, ("memtail", own_minio), options=[])
        after = ExperimentStore(new.store, experiment.name)
        assert len(after.committed()) == SHARDS // 2
        assert read_identity(new.store) is None
        assert not list(new.store.list(keys.all_scores(experiment.name)))
        gate.open()
        for name in SERVICES:
            new.start(name, **waits)
        new.until_published(after, TRIALS)
        new.until(lambda: after.finished(after.read_record()))
        assert new.scores(experiment.name) == expected(experiment)
        trained = [line for line in new.log_lines("worker", "shard ended", experiment.name) if '"outcome": "committed"' in line]
        assert len(trained) == SHARDS - SHARDS // 2
