"""The fleet on a real API server: simulated nodes and pods, a real dispatcher with the rights of its own account, real Redis and bucket."""

import json
import time
from collections.abc import Iterator

import pytest

from memtail.experiment_store import Control, ExperimentStore
from memtail.storage import keys
from tests.kubernetes.conftest import Kubernetes, install_tools
from tests.kubernetes.fleet import ACCOUNT, WORKERS, Fleet
from tests.kubernetes.simulation import FaultyApiServer
from tests.support.cluster import Cluster


@pytest.fixture
def fleet(kubernetes, tmp_path_factory, minio, declare, digits) -> Iterator[Fleet]:
    with Cluster(tmp_path_factory.mktemp("cluster"), minio, MEMTAIL_LEASE_SECONDS="30") as cluster:
        made = Fleet(kubernetes, cluster, declare, digits)
        yield made
        kubernetes.kubectl("delete", "namespace", made.namespace, "--wait=false")


@pytest.fixture(scope="module", autouse=True)
def nodes(kubernetes: Kubernetes) -> None:
    install_tools("helm")
    kubernetes.nodes(25, 8)


def test_workers_come_with_the_work_and_go_with_it(fleet):
    fleet.dispatcher()
    with fleet.pods(seconds=5) as pods:
        began = time.monotonic()
        experiment_store = fleet.submit(400)
        fleet.cluster.until(lambda: pods.most == 200, 120)
        print(f"\n200 workers after {time.monotonic() - began:.1f} s")
        fleet.cluster.until(lambda: fleet.done(experiment_store, 400), 300)
        print(f"all shards committed and no worker left after {time.monotonic() - began:.1f} s")
    assert set(pods.committed.values()) == {1}
    assert pods.most == 200
    # the 300 that were wanted and the 200 there was room for
    fleet.cluster.until(lambda: not fleet.notice())
    assert "WorkerUnschedulable" in fleet.kubernetes.kubectl("get", "events", "--namespace", fleet.namespace)


def test_workers_that_cannot_be_scheduled_are_told_of_and_taken_back_when_the_work_is_done(fleet):
    fleet.dispatcher()
    with fleet.pods():
        experiment_store = fleet.submit(20, max=10, gpus=4)
        fleet.submit(1, name="never", gpu_resource="nvidia.com/mig-1g.10gb")
        fleet.cluster.until(lambda: "cannot be scheduled" in fleet.notice("never"), 60)
        fleet.cluster.until(lambda: fleet.done(experiment_store, 20), 120)
        ExperimentStore(fleet.cluster.store, "never").set_control(Control("cancelled"))
        fleet.cluster.until(lambda: not fleet.found("pods", "--selector", "memtail/experiment=never"), 60)


def test_more_than_is_allowed_is_refused_with_a_notice(fleet):
    fleet.dispatcher()
    fleet.submit(2, gpus=5)
    fleet.cluster.until(lambda: fleet.notice() == "execution.workers: gpus is 5, at most 4 is allowed")
    assert not fleet.found("jobs")


def test_an_evicted_worker_and_one_that_fails_are_replaced_and_told_of(fleet):
    fleet.dispatcher()
    with fleet.pods(seconds=3) as pods:
        experiment_store = fleet.submit(12, max=3)
        fleet.cluster.until(lambda: len(fleet.running()) == 3, 60)
        evicted, failed, _ = fleet.running()
        eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": evicted.removeprefix("pod/")}}
        path = f"/api/v1/namespaces/{fleet.namespace}/pods/{evicted.removeprefix('pod/')}/eviction"
        fleet.kubernetes.kubectl("create", "--raw", path, "--filename", "-", stdin=json.dumps(eviction))
        fleet.kubernetes.kubectl("annotate", failed, "--namespace", fleet.namespace, "memtail-test/exit-code=137")
        fleet.cluster.until(lambda: "exit code 137" in fleet.notice(), 60)
        fleet.cluster.until(lambda: fleet.done(experiment_store, 12), 120)
    assert set(pods.committed.values()) == {1}
    events = fleet.kubernetes.kubectl("get", "events", "--namespace", fleet.namespace)
    assert "WorkerDisrupted" in events
    assert "WorkerFailed" in events


def test_a_killed_node_takes_its_workers_and_nothing_else(fleet):
    fleet.dispatcher()
    with fleet.pods(seconds=4) as pods:
        experiment_store = fleet.submit(60, max=16)
        fleet.cluster.until(lambda: len(fleet.running()) == 16, 60)
        name = fleet.kubernetes.kubectl("get", fleet.running()[0], "--namespace", fleet.namespace, "--output", "jsonpath={.spec.nodeName}")
        fleet.kubernetes.kubectl("delete", "node", name)
        fleet.cluster.until(lambda: len(experiment_store.committed()) == 60, 180)
    assert set(pods.committed.values()) == {1}
    fleet.kubernetes.nodes(1, 8)


def test_an_experiment_that_cannot_be_read_for_a_while_keeps_its_workers(fleet):
    dispatcher = fleet.dispatcher()
    with fleet.pods(seconds=2) as pods:
        experiment_store = fleet.submit(40, max=4)
        fleet.cluster.until(lambda: len(fleet.running()) == 4, 60)
        record, before = fleet.cluster.store.get(keys.experiment("a")), fleet.running()
        fleet.cluster.store.put(keys.experiment("a"), b"{")
        fleet.cluster.until(lambda: list(fleet.cluster.events(dispatcher, "experiment passed over")))
        time.sleep(2)
        assert fleet.running() == before
        fleet.cluster.store.put(keys.experiment("a"), record)
        fleet.cluster.until(lambda: fleet.done(experiment_store, 40), 180)
    assert set(pods.committed.values()) == {1}


def test_an_api_server_that_refuses_and_one_that_is_gone(fleet):
    with FaultyApiServer(fleet.kubernetes.kubeconfig) as proxy, fleet.pods() as pods:
        path = fleet.cluster.folder / "through-proxy"
        fleet.kubernetes.kubeconfig_of(fleet.namespace, ACCOUNT, path, proxy.address)
        proxy.answers += [
            ("GET", "/pods", 500),
            ("GET", "/jobs", 429),
            ("POST", "/jobs", 429),
            ("POST", "/jobs", 500),
            ("POST", "/jobs", 409),
        ]
        dispatcher = fleet.dispatcher(path)
        experiment_store = fleet.submit(100, max=5)
        fleet.cluster.until(lambda: len(experiment_store.committed()) >= 5, 120)
        assert not proxy.answers
        fleet.kubernetes.stop_apiserver()
        time.sleep(60)
        fleet.kubernetes.start_apiserver()
        fleet.cluster.until(lambda: fleet.done(experiment_store, 100), 240)
        assert set(pods.committed.values()) == {1}
        assert dispatcher.process.poll() is None
        assert "Traceback" not in dispatcher.log.read_text()
    assert pods.most == 5


def test_a_dispatcher_killed_between_making_a_job_and_knowing_it_leaves_one_that_the_next_adopts(fleet):
    with FaultyApiServer(fleet.kubernetes.kubeconfig) as proxy, fleet.pods() as pods:
        path = fleet.cluster.folder / "through-proxy"
        fleet.kubernetes.kubeconfig_of(fleet.namespace, ACCOUNT, path, proxy.address)
        proxy.answers.append(("POST", "/jobs", 0))
        first = fleet.dispatcher(path)
        experiment_store = fleet.submit(8, max=4)
        fleet.cluster.until(proxy.lost.is_set, 60)
        first.kill()
        fleet.kubernetes.kubectl("create", "--namespace", fleet.namespace, "--filename", "-", stdin=STRANGER)
        fleet.dispatcher()
        fleet.dispatcher()
        fleet.cluster.until(lambda: fleet.done(experiment_store, 8), 120)
    assert len(fleet.found("jobs", "--selector", WORKERS)) == 1
    assert pods.most == 4
    cancelled = fleet.submit(8, name="b")
    fleet.cluster.until(lambda: fleet.found("jobs", "--selector", "memtail/experiment=b"), 60)
    cancelled.set_control(Control("cancelled"))
    fleet.cluster.until(lambda: not fleet.found("jobs", "--selector", "memtail/experiment=b"), 60)
    assert "job.batch/stranger" in fleet.found("jobs")


SECURITY = "{allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}, runAsNonRoot: true, seccompProfile: {type: RuntimeDefault}}"
STRANGER = f"""
apiVersion: batch/v1
kind: Job
metadata: {{name: stranger, labels: {{memtail/experiment: a}}}}
spec: {{template: {{spec: {{restartPolicy: Never, containers: [{{name: worker, image: other, securityContext: {SECURITY}}}]}}}}}}
"""
