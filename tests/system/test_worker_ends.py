"""Ends of a worker: when others lack workers, and when it is stopped after its broker is gone."""

import pytest

from services.common.broker import Assignment, Broker
from services.common.surplus import Surplus
from tests.support.cluster import Cluster
from tests.support.experiments import PER_SHARD, gated
from tests.support.faulty_models import Gate

# Bound in seconds, well below the 60 s of grace that the chart gives.
SOON = 30


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "gate"


@pytest.fixture
def gate(folder):
    return Gate(folder)


@pytest.fixture
def cluster(tmp_path_factory, own_minio, folder):
    with Cluster(tmp_path_factory.mktemp("cluster"), own_minio, GATE_FOLDER=str(folder)) as started:
        yield started


@pytest.fixture
def broker(cluster):
    return Broker(cluster.settings(experiment="ending"))


@pytest.fixture
def worker(cluster, broker, declare, digits):
    """A worker of one experiment, whose three shards are queued."""
    experiment = gated(declare, name="ending")
    fingerprint = cluster.submit(experiment, digits).read_record().fingerprint
    spans = [(first, first + PER_SHARD - 1) for first in range(0, 3 * PER_SHARD, PER_SHARD)]
    broker.send([Assignment(experiment="ending", fingerprint=fingerprint, first=first, last=last) for first, last in spans])
    return cluster.start("worker", MEMTAIL_EXPERIMENT="ending", MEMTAIL_REST_SECONDS="600")


def test_a_surplus_worker_ends_after_its_shard(cluster, broker, worker, gate):
    surplus = Surplus(broker, 60)
    cluster.until(lambda: gate.waiting == 1)
    surplus.offer({"ending": 1})
    gate.open()
    assert worker.process.wait(60) == 0
    assert len(surplus.leaving()) == 1
    assert broker.waiting() == 2
    assert not broker.leased()


def test_an_idle_surplus_worker_ends_at_once(cluster, broker, worker, gate):
    gate.open()
    cluster.until(lambda: not broker.waiting() and not broker.leased())
    Surplus(broker, 60).offer({"ending": 1})
    assert worker.process.wait(10) == 0


@pytest.mark.slow
def test_a_worker_whose_broker_and_store_are_gone_ends_soon_after_it_is_told_to(cluster, worker, gate, own_minio):
    cluster.until(lambda: gate.waiting == 1)
    cluster.redis.kill()
    own_minio.stop()
    worker.process.terminate()
    gate.open()
    worker.process.wait(SOON)
