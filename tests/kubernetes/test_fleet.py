"""The fleet on a real API server with simulated nodes and pods: a real dispatcher with its service account's rights, Redis and a bucket."""

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
        release = Fleet(kubernetes, cluster, declare, digits)
        yield release
        kubernetes.kubectl("delete", "namespace", release.namespace, "--wait=false")


@pytest.fixture(scope="module", autouse=True)
def nodes(kubernetes: Kubernetes) -> None:
    install_tools("helm")
    kubernetes.nodes(25, 8)


def test_workers_start_with_the_work_and_end_with_it(fleet):
    fleet.dispatcher()
    with fleet.pods(seconds=5) as pods:
        began = time.monotonic()
        experiment_store = fleet.submit(400)
        fleet.cluster.until(lambda: pods.peak == 200, 120)
        print(f"\n200 workers after {time.monotonic() - began:.1f} s")
        fleet.cluster.until(lambda: fleet.done(experiment_store, 400), 300)
        print(f"all shards committed and no worker left after {time.monotonic() - began:.1f} s")
    assert set(pods.committed.values()) == {1}
    assert pods.peak == 200
    # the target was 300, of which the nodes had room for 200
    fleet.cluster.until(lambda: not fleet.notice())
    assert "WorkerUnschedulable" in fleet.kubernetes.kubectl("get", "events", "--namespace", fleet.namespace)


def test_unschedulable_workers_have_a_notice_and_are_removed_when_the_work_is_done(fleet):
    fleet.dispatcher()
    with fleet.pods():
        experiment_store = fleet.submit(20, max=10, gpus=4)
        fleet.submit(1, name="never", gpu_resource="nvidia.com/mig-1g.10gb")
        fleet.cluster.until(lambda: "cannot be scheduled" in fleet.notice("never"), 60)
        fleet.cluster.until(lambda: fleet.done(experiment_store, 20), 120)
        ExperimentStore(fleet.cluster.store, "never").set_control(Control("cancelled"))
        fleet.cluster.until(lambda: not fleet.names("pods", "--selector", "memtail/experiment=never"), 60)


def test_workers_that_cannot_start_are_replaced_after_the_settings_were_corrected(fleet):
    fleet.upgrade(workers__nodeSelector={"kubernetes.io/hostname": "none"})
    wrong = fleet.dispatcher()
    experiment_store = fleet.submit(6, max=2)
    fleet.cluster.until(lambda: "cannot be scheduled" in fleet.notice(), 60)
    stuck, _ = fleet.names("pods", "--selector", WORKERS)
    waiting = {"reason": "ErrImageNeverPull", "message": "not present with pull policy of Never"}
    fleet.set_status(
        stuck,
        containerStatuses=[
            {"name": "worker", "image": "", "imageID": "", "ready": False, "restartCount": 0} | {"state": {"waiting": waiting}}
        ],
    )
    fleet.cluster.until(lambda: "cannot start: ErrImageNeverPull, not present" in fleet.notice())
    assert "WorkerErrImageNeverPull" in fleet.kubernetes.kubectl("get", "events", "--namespace", fleet.namespace)
    wrong.stop()
    fleet.upgrade(workers__nodeSelector={"kubernetes.io/os": "linux"})
    with fleet.pods() as pods:
        fleet.dispatcher()
        fleet.cluster.until(lambda: fleet.done(experiment_store, 6), 60)
    assert set(pods.committed.values()) == {1}
    assert stuck not in fleet.names("pods")


@pytest.mark.slow
def test_workers_start_when_the_shared_cache_has_been_filled(fleet):
    def fills(kind="pods", *options):
        return fleet.names(kind, "--selector", "memtail/cache", *options)

    def running():
        return fills("pods", "--field-selector", "status.phase=Running")

    fleet.claim("datasets")
    fleet.upgrade(workers__cache={"type": "claim", "claim": "datasets", "fill": True})
    fleet.dispatcher()
    experiment_store = fleet.submit(4, max=2)
    fleet.cluster.until(lambda: fleet.notice().startswith("the cache is being filled: workers start when it has the dataset"))
    fleet.cluster.until(running, 60)
    (first,) = running()
    fleet.end(first, 2)
    fleet.cluster.until(lambda: "the cache cannot be filled, and workers wait for it: failed: exit code 2" in fleet.notice(), 60)
    fleet.cluster.until(running, 60)  # again
    assert not fleet.names("jobs", "--selector", WORKERS)
    with fleet.pods() as pods:
        fleet.end(*running(), 0)
        fleet.cluster.until(lambda: fleet.done(experiment_store, 4), 60)
    assert set(pods.committed.values()) == {1}
    fleet.cluster.until(lambda: not fills("jobs"))


def test_running_workers_of_earlier_settings_finish_their_work(fleet):
    before = fleet.dispatcher()
    with fleet.pods(seconds=3) as pods:
        experiment_store = fleet.submit(8, max=2)
        fleet.cluster.until(lambda: pods.peak == 2, 60)
        before.stop()
        fleet.upgrade(workers__nodeSelector={"kubernetes.io/os": "linux"})
        fleet.dispatcher()
        fleet.cluster.until(lambda: fleet.done(experiment_store, 8), 60)
    assert set(pods.committed.values()) == {1}
    assert len(fleet.names("jobs", "--selector", WORKERS)) == 1


@pytest.mark.timeout(280)
@pytest.mark.slow
def test_pods_that_their_node_rejects_cause_no_storm_and_a_notice(fleet):
    fleet.dispatcher()
    experiment_store = fleet.submit(20, max=16)
    rejected = set()

    def reject():
        """Fail each pod as soon as it is bound, as a kubelet without a healthy device does."""
        for pod in fleet.running():
            rejected.add(pod)
            fleet.set_status(pod, phase="Failed", reason="UnexpectedAdmissionError", message="no healthy devices", containerStatuses=[])
        return "failed: UnexpectedAdmissionError, no healthy devices (" in fleet.notice() and len(rejected) >= 16

    fleet.cluster.until(reject, 90)
    fleet.cluster.until(lambda: reject() and len(fleet.names("pods", "--field-selector", "status.phase=Failed")) <= 10)
    began, before = time.monotonic(), len(rejected)
    while time.monotonic() - began < 15:
        reject()
    print(f"\n{before} pods, then {len(rejected) - before} in 15 s")
    assert len(rejected) - before <= 16  # one round
    assert len(fleet.names("jobs", "--selector", WORKERS)) <= 2
    assert not experiment_store.attempts()
    with fleet.pods() as pods:
        recovered = fleet.cluster.until(lambda: pods.peak == 16, 90)
        print(f"recovered after {recovered:.0f} s")
        fleet.cluster.until(lambda: fleet.done(experiment_store, 20), 90)
    assert set(pods.committed.values()) == {1}


def test_a_request_beyond_the_limits_is_refused_with_a_notice(fleet):
    fleet.dispatcher()
    fleet.submit(2, gpus=5)
    fleet.cluster.until(lambda: fleet.notice() == "execution.workers: gpus is 5, at most 4 is allowed")
    assert not fleet.names("jobs")


def test_a_job_that_the_api_server_refuses_has_a_notice_and_does_not_stop_others(fleet):
    fleet.upgrade(workers__limits__nodeSelectors={"zone": ["not valid!"]})
    fleet.submit(2, name="a", node_selector={"zone": "not valid!"})
    fleet.dispatcher()
    with fleet.pods():
        other = fleet.submit(2, name="b")
        fleet.cluster.until(lambda: fleet.done(other, 2), 60)
    assert "workers cannot be changed: cannot create Job memtail-a-" in fleet.notice("a")
    assert "422" in fleet.notice("a")
    assert 'Invalid value: "not valid!"' in fleet.notice("a")


def test_evicted_and_failed_workers_are_replaced_with_a_notice(fleet):
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
    # the worker that was killed, not the one that was evicted
    [shard] = experiment_store.attempts()
    [failure] = experiment_store.failures(shard)
    assert failure.origin.host == failed.removeprefix("pod/")
    assert failure.origin.node.startswith("node-")
    events = fleet.kubernetes.kubectl("get", "events", "--namespace", fleet.namespace)
    assert "WorkerDisrupted" in events
    assert "WorkerFailed" in events


@pytest.mark.slow
def test_a_shard_whose_container_is_killed_three_times_is_given_up(fleet):
    fleet.dispatcher()
    with fleet.pods(seconds=600):
        experiment_store = fleet.submit(1)
        killed = set()

        def kill_next():
            for pod in set(fleet.running()) - killed if fleet.cluster.broker().leased() else ():
                killed.add(pod)
                fleet.kubernetes.kubectl("annotate", pod, "--namespace", fleet.namespace, "memtail-test/exit-code=137")
            return experiment_store.attempts().total() == 3

        print(f"\ngiven up after {fleet.cluster.until(kill_next, 240, 0.5):.0f} s")
        fleet.cluster.until(lambda: not fleet.running() and not fleet.names("jobs", "--field-selector", "status.successful=0"))
    assert len(killed) == 3


def test_a_lost_node_costs_its_workers_and_nothing_else(fleet):
    fleet.dispatcher()
    with fleet.pods(seconds=4) as pods:
        experiment_store = fleet.submit(60, max=16)
        fleet.cluster.until(lambda: len(fleet.running()) == 16, 60)
        name = fleet.kubernetes.kubectl("get", fleet.running()[0], "--namespace", fleet.namespace, "--output", "jsonpath={.spec.nodeName}")
        fleet.kubernetes.kubectl("delete", "node", name)
        fleet.cluster.until(lambda: len(experiment_store.committed()) == 60, 180)
    assert set(pods.committed.values()) == {1}
    fleet.kubernetes.nodes(1, 8)


@pytest.mark.slow
def test_an_experiment_gets_its_share_of_a_full_fleet_when_shards_of_another_end(fleet):
    fleet.upgrade(workers__max=4)
    fleet.dispatcher()
    with fleet.pods(seconds=4) as pods:
        first = fleet.submit(24, name="a")
        fleet.cluster.until(lambda: len(fleet.running("a")) == 4, 60)
        second = fleet.submit(8, name="b")
        fleet.cluster.until(lambda: "waits for workers: other experiments have all 4" in fleet.notice("b"))
        print(f"\nshared after {fleet.cluster.until(lambda: len(fleet.running('b')) == 2, 60):.0f} s")
        assert len(fleet.running("a")) == 2
        fleet.cluster.until(lambda: fleet.done(first, 24) and fleet.done(second, 8), 120)
    assert set(pods.committed.values()) == {1}
    assert pods.peak == 4


def test_idle_workers_end_at_once_if_another_experiment_waits(fleet):
    fleet.upgrade(workers__max=2)
    fleet.dispatcher()
    with fleet.pods(rest=600) as pods:
        first = fleet.submit(2, name="a")
        fleet.cluster.until(lambda: len(first.committed()) == 2, 60)
        assert len(fleet.running()) == 2
        second = fleet.submit(2, name="b")
        fleet.cluster.until(lambda: len(second.committed()) == 2, 60)
    assert pods.peak == 2


def test_a_temporarily_unreadable_experiment_keeps_its_workers(fleet):
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


def test_errors_and_an_outage_of_the_api_server_are_survived(fleet):
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
    assert pods.peak == 5


def test_a_job_whose_dispatcher_was_killed_before_the_response_is_adopted_by_the_next(fleet):
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
    assert len(fleet.names("jobs", "--selector", WORKERS)) == 1
    assert pods.peak == 4
    cancelled = fleet.submit(8, name="b")
    fleet.cluster.until(lambda: fleet.names("jobs", "--selector", "memtail/experiment=b"), 60)
    cancelled.set_control(Control("cancelled"))
    fleet.cluster.until(lambda: not fleet.names("jobs", "--selector", "memtail/experiment=b"), 60)
    assert "job.batch/stranger" in fleet.names("jobs")


SECURITY = "{allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}, runAsNonRoot: true, seccompProfile: {type: RuntimeDefault}}"
STRANGER = f"""
apiVersion: batch/v1
kind: Job
metadata: {{name: stranger, labels: {{memtail/experiment: a}}}}
spec: {{template: {{spec: {{restartPolicy: Never, containers: [{{name: worker, image: other, securityContext: {SECURITY}}}]}}}}}}
"""
