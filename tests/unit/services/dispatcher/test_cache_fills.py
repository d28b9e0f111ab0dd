"""Jobs that fill the cache, on a cluster in memory (see tests/kubernetes)."""

import pytest

from services.dispatcher.cache_fills import CACHE_LABEL, CacheFills
from services.dispatcher.kubernetes_objects import Job, Pod, parse_pod
from services.dispatcher.watch_cache import RefusedError
from services.dispatcher.worker_jobs import EXPERIMENT_LABEL, NUMBER_LABEL, Demand, FleetSettings
from tests.unit.services.dispatcher.test_fleet import SETTINGS

FILL = {
    "metadata": {"labels": {"app.kubernetes.io/instance": "memtail"}},
    "spec": {"template": {"metadata": {"labels": {}}, "spec": {"containers": [{"name": "fill", "image": "memtail-control:1"}]}}},
}
BEING_FILLED = "the cache is being filled: workers start when it has the dataset"


class FakeCluster:
    """Holds Jobs by their names."""

    def __init__(self):
        self.jobs, self.manifests = {}, {}

    def owner(self, name):
        return {"name": name}

    def create_job(self, job):
        metadata = job["metadata"]
        self.jobs[metadata["name"]] = Job(metadata["name"], "u", metadata["labels"], 1, 0, False)
        self.manifests[metadata["name"]] = job

    def delete_job(self, name):
        del self.jobs[name]

    def end(self, succeeded):
        """Let the only Job end."""
        ((name, job),) = self.jobs.items()
        self.jobs[name] = Job(name, job.uid, job.labels, 1, int(succeeded), True)


@pytest.fixture
def cluster():
    return FakeCluster()


@pytest.fixture
def reconcile(cluster):
    def run(*demands, fill=FILL, pods=()):
        fills = CacheFills(FleetSettings.model_validate({**SETTINGS, "fill": fill}), cluster)
        return fills.reconcile(demands, list(cluster.jobs.values()), pods)

    return run


def demand(name="a", outstanding=10, state="running"):
    return Demand(name, state, 0, outstanding)


def test_workers_wait_for_a_job_per_experiment_that_lasts_as_long_as_the_work(reconcile, cluster):
    assert reconcile(demand(), demand("b", 0), demand("c", state="paused")) == {"a": BEING_FILLED}
    (job,) = cluster.manifests.values()
    assert job["spec"]["template"]["spec"]["containers"][0]["args"] == ["a"]
    assert job["spec"]["template"]["metadata"]["labels"] == {EXPERIMENT_LABEL: "a", CACHE_LABEL: "fill"}
    assert int(job["metadata"]["labels"][NUMBER_LABEL]) == 0  # which a dispatcher of an earlier version reads
    assert reconcile(demand()) == {"a": BEING_FILLED}
    cluster.end(succeeded=True)
    assert reconcile(demand()) == {}
    assert len(cluster.jobs) == 1
    assert reconcile(demand(outstanding=0)) == {}
    assert not cluster.jobs


def test_a_failed_job_and_one_of_other_settings_are_made_again_but_not_one_that_succeeded(reconcile, cluster):
    corrected = {**FILL, "spec": {"template": {"metadata": {"labels": {}}, "spec": {"containers": [{"name": "fill", "image": "right"}]}}}}

    def image():
        (name,) = cluster.jobs
        return cluster.manifests[name]["spec"]["template"]["spec"]["containers"][0]["image"]

    reconcile(demand())
    cluster.end(succeeded=False)
    assert reconcile(demand()) == {"a": BEING_FILLED}
    assert not next(iter(cluster.jobs.values())).ended
    assert reconcile(demand(), fill=corrected) == {"a": BEING_FILLED}
    assert image() == "right"
    cluster.end(succeeded=True)
    assert reconcile(demand()) == {}
    assert image() == "right"


def test_a_job_that_the_api_server_refuses_has_a_notice_and_does_not_stop_others(reconcile, cluster, monkeypatch):
    create = cluster.create_job

    def create_unless_a(job):
        if job["metadata"]["labels"][EXPERIMENT_LABEL] == "a":
            raise RefusedError("exceeded quota")
        create(job)

    monkeypatch.setattr(cluster, "create_job", create_unless_a)
    lines = reconcile(demand("a"), demand("b"))
    assert lines == {"a": "the cache cannot be filled, and workers wait for it: exceeded quota", "b": BEING_FILLED}
    assert len(cluster.jobs) == 1


def test_without_a_template_nothing_waits_and_jobs_of_earlier_settings_are_deleted(reconcile, cluster):
    reconcile(demand())
    assert reconcile(demand(), fill=None) == {}
    assert not cluster.jobs


def test_the_last_problem_is_named_while_no_pod_runs(reconcile):
    labels = {EXPERIMENT_LABEL: "a", CACHE_LABEL: "fill"}
    pods = [Pod(name, name, "j", labels, "Failed", f"failed: {name}", "Failed", ended=name) for name in ("2", "1")]
    assert reconcile(demand(), pods=pods) == {"a": "the cache cannot be filled, and workers wait for it: failed: 2"}
    running = Pod("3", "3", "j", labels, "Running", "", "")
    assert reconcile(demand(), pods=[*pods, running]) == {"a": BEING_FILLED}


def test_the_last_line_of_a_failed_container_is_its_problem():
    terminated = {"exitCode": 1, "reason": "Error", "message": "a: 2 GB of 9 GB\nmemtail: a: dataset 1a2b has 9 bytes\n"}
    status = {"phase": "Failed", "containerStatuses": [{"state": {"terminated": terminated}}]}
    pod = parse_pod({"metadata": {"name": "p", "uid": "u"}, "spec": {}, "status": status})
    assert pod.problem == "failed: exit code 1, Error, memtail: a: dataset 1a2b has 9 bytes"
