"""Number of workers and manifests of their Jobs, without a cluster (see tests/kubernetes)."""

import copy
from dataclasses import replace

import pytest

from memtail.experiment_store import ExperimentStore
from memtail.spec import WorkersSpec
from services.dispatcher.fleet import Fleet
from services.dispatcher.kubernetes_objects import Job, Pod, parse_job
from services.dispatcher.shares import surplus_workers, target_workers
from services.dispatcher.stalls import Stalls
from services.dispatcher.watch_cache import ClusterError, RefusedError
from services.dispatcher.worker_jobs import Demand, FleetSettings, build_job, shards_per_worker, template_hash
from services.dispatcher.worker_sets import Changes, WorkerSet, failed_beyond, outdated, scale, worker_sets
from tests.support.restricted import RestrictedStore

OWNER = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "memtail-dispatcher", "uid": "u"}
SETTINGS = {
    "namespace": "research",
    "owner": "memtail-dispatcher",
    "instance": "memtail",
    "maxWorkers": 100,
    "queueName": "",
    "limits": {
        "maxWorkers": 50,
        "gpus": 4,
        "memory": "64Gi",
        "cpu": "16",
        "images": ["other:1"],
        "nodeSelectors": {"gpu": ["h100"]},
        "gpuResources": ["nvidia.com/gpu", "nvidia.com/mig-1g.10gb"],
        "priorityClasses": ["low"],
        "tolerationKeys": ["spot"],
    },
    "job": {
        "metadata": {"labels": {"app.kubernetes.io/instance": "memtail"}},
        "spec": {
            "template": {
                "metadata": {"labels": {"app.kubernetes.io/component": "worker"}},
                "spec": {
                    "nodeSelector": {"zone": "a"},
                    "containers": [
                        {
                            "name": "worker",
                            "image": "memtail-worker:1",
                            "env": [{"name": "MEMTAIL_DEVICES", "value": "cuda:0"}],
                            "resources": {"requests": {"cpu": "1", "memory": "4Gi"}, "limits": {"memory": "8Gi", "nvidia.com/gpu": 1}},
                        }
                    ],
                },
            }
        },
    },
}


def fleet(**changes):
    return FleetSettings.model_validate({**SETTINGS, **changes})


def demand(name="a", outstanding=10, priority=0, state="running", **workers):
    return Demand(name, state, priority, outstanding, WorkersSpec(**workers) if workers else None)


def sets(*workers_and_running, name="a", winding_down=False):
    return [
        WorkerSet(f"{name}-{number}", name, number, pair[0], pair[1], winding_down) for number, pair in enumerate(workers_and_running, 1)
    ]


def test_as_many_workers_as_outstanding_shards_up_to_the_maxima():
    assert target_workers([demand(outstanding=7)], {}, 100, {}) == {"a": 7}
    assert target_workers([demand(outstanding=700)], {}, 100, {}) == {"a": 100}
    assert target_workers([demand(outstanding=700, max=30)], {}, 100, {}) == {"a": 30}
    assert target_workers([demand(outstanding=7)], {}, 100, {"a": 4}) == {"a": 2}
    assert target_workers([demand(state="paused"), demand("b", state="cancelled")], {}, 100, {}) == {"a": 0, "b": 0}


def test_higher_priorities_are_served_first_but_take_no_running_workers():
    demands = [demand("low", 80), demand("high", 80, priority=1)]
    assert target_workers(demands, {}, 100, {}) == {"high": 80, "low": 20}
    assert target_workers(demands, {"low": 60}, 100, {}) == {"high": 40, "low": 60}
    assert target_workers([demand("low", 80, state="paused"), demand("high", 80, priority=1)], {"low": 60}, 100, {}) == {
        "high": 40,
        "low": 0,
    }


def test_free_workers_are_shared_by_experiments_of_equal_priority():
    assert target_workers([demand("a", 100_000), demand("b", 50)], {}, 100, {}) == {"a": 50, "b": 50}
    assert target_workers([demand("a", 100_000), demand("b", 20)], {}, 100, {}) == {"a": 80, "b": 20}
    assert target_workers([demand("a", 100_000), demand("b", 500)], {"a": 70}, 100, {}) == {"a": 70, "b": 30}
    assert target_workers([demand("a", 9), demand("b", 9), demand("c", 9)], {}, 10, {}) == {"a": 4, "b": 3, "c": 3}


def test_workers_beyond_a_share_end_where_others_lack_workers():
    both = [demand("a", 100), demand("b", 100)]
    assert surplus_workers(both, {"a": 100}, 100, {}, ()) == {"a": 50}
    assert surplus_workers(both, {"a": 90}, 100, {}, ()) == {"a": 40}
    assert surplus_workers(both, {"a": 60, "b": 20}, 100, {}, ()) == {"a": 10}
    assert surplus_workers([demand("a", 100), demand("b", 7)], {"a": 100}, 100, {}, ()) == {"a": 7}
    assert surplus_workers([*both, demand("c", 100)], {"a": 80, "b": 20}, 100, {}, ()) == {"a": 46}


def test_no_worker_ends_for_others_that_lack_none_or_cannot_start():
    both = [demand("a", 100), demand("b", 100)]
    assert surplus_workers(both, {"a": 50, "b": 50}, 100, {}, ()) == {}
    assert surplus_workers(both, {"a": 50}, 100, {}, ()) == {}
    assert surplus_workers(both, {"a": 51, "b": 49}, 100, {}, ()) == {}
    assert surplus_workers(both, {"a": 100}, 100, {}, {"b"}) == {}
    assert surplus_workers([demand("a", 100), demand("b", 100, state="paused")], {"a": 100}, 100, {}, ()) == {}
    assert surplus_workers([demand("a", 0)], {"a": 100}, 100, {}, ()) == {}


def test_idle_workers_and_those_of_lower_priority_end_first():
    assert surplus_workers([demand("idle", 0), demand("b", 100)], {"idle": 4}, 4, {}, ()) == {"idle": 4}
    assert surplus_workers([demand("low", 100), demand("high", 30, priority=1)], {"low": 100}, 100, {}, ()) == {"low": 30}
    assert surplus_workers([demand("a", 100)], {"a": 100}, 60, {}, ()) == {"a": 40}


def test_missing_workers_are_created_as_one_job():
    assert scale({"a": 5}, [], [], {}, elastic=True) == Changes(create={"a": 5})
    assert scale({"a": 5}, sets((3, 2)), [], {}, elastic=True) == Changes(create={"a": 2})
    assert scale({"a": 5}, sets((3, 2), (2, 0)), [], {}, elastic=True) == Changes()


def test_running_workers_are_never_removed():
    assert scale({"a": 0}, sets((3, 3), (2, 2)), [], {}, elastic=True) == Changes()
    assert scale({"a": 1}, sets((3, 2), (4, 0)), [], {}, elastic=True) == Changes(delete=["a-2"], shrink={"a-1": 2})
    assert scale({"a": 6}, sets((3, 2), (4, 0)), [], {}, elastic=True) == Changes(shrink={"a-2": 3})
    assert scale({"a": 6}, sets((3, 2), (4, 0)), [], {}, elastic=False) == Changes()
    assert scale({"a": 0}, sets((3, 1), winding_down=True), [], {}, elastic=True) == Changes()


def test_outdated_workers_that_do_not_run_are_replaced():
    def changes(workers, running, elastic=True, **current):
        old = [replace(sets((workers, running))[0], template="old")]
        return scale({"a": 3}, old, [], outdated(old, current), elastic=elastic)

    assert changes(3, 0, a="new") == changes(3, 0, a="new", elastic=False) == Changes(create={"a": 3}, delete=["a-1"])
    assert changes(3, 2, a="new") == Changes(create={"a": 1}, shrink={"a-1": 2})
    assert changes(3, 2, a="new", elastic=False) == Changes()
    assert changes(3, 3, a="new") == changes(3, 0, a="old") == changes(3, 0, b="new") == Changes()


def test_workers_that_the_job_controller_does_not_replace_are_replaced_after_pauses_that_grow():
    now = 0.0
    stalls = Stalls(lambda: now)

    def replaced_after():
        """Advance the clock until the workers of a new stalled Job are replaced; returns the seconds."""
        nonlocal now
        began, job = now, WorkerSet(f"a-{now}", "a", 1, 20, 0, stalled=20)
        while not (replaced := stalls.overdue([job])):
            now += 1
        assert replaced == {job.name: 20}
        assert not stalls.overdue([])
        return now - began

    assert [replaced_after() for _ in range(7)] == [15, 30, 60, 120, 240, 300, 300]
    now += 601
    assert replaced_after() == 15


def test_pods_that_failed_and_were_not_replaced_are_stalled():
    labels = {"memtail/experiment": "a", "memtail/number": "1"}
    job = Job("a-1", "uid", labels, parallelism=3, succeeded=0, ended=False)

    def stalled(*phases):
        [worker_set] = worker_sets([job], [Pod(str(number), "uid", "a-1", labels, phase, "", "") for number, phase in enumerate(phases)])
        return worker_set.stalled

    assert stalled() == 0
    assert stalled("Running", "Failed") == 2
    assert stalled("Failed", "Failed", "Failed") == 3
    assert stalled("Running", "Pending", "Running", "Failed") == 0
    assert stalled("Running", "Succeeded", "Failed") == 0


def test_a_job_that_kueue_suspended_again_keeps_its_place_in_the_queue():
    labels = {"memtail/experiment": "a", "memtail/number": "1"}
    metadata = {"name": "a-1", "uid": "uid", "labels": labels}
    failed = Pod("a-1-x", "uid", "a-1", labels, "Failed", "", "")
    now = 0.0
    stalls = Stalls(lambda: now)

    def changes(seconds, **spec):
        nonlocal now
        now = seconds
        existing = worker_sets([parse_job({"metadata": metadata, "spec": {"parallelism": 4, **spec}})], [failed])
        return scale({"a": 4}, existing, [], stalls.overdue(existing), elastic=False)

    assert changes(0, suspend=True) == changes(16, suspend=True) == changes(999, suspend=True) == Changes()
    assert changes(1000, suspend=False) == changes(1014, suspend=False) == Changes()
    assert changes(1016, suspend=False) == Changes(create={"a": 4}, delete=["a-1"])


def test_the_hash_of_a_template_follows_its_settings():
    def of(requested=None, name="a", **changes):
        return template_hash(fleet(**changes), Demand(name, "running", 0, 10, requested))

    job = copy.deepcopy(SETTINGS["job"])
    job["spec"]["template"]["spec"]["containers"][0]["image"] = "memtail-worker:2"
    others = [
        of(job=job),
        of(queueName="team"),
        of(name="b"),
        of(WorkersSpec(memory="32Gi")),
        of(WorkersSpec(node_selector={"gpu": "h100"})),
        of(WorkersSpec(tolerations=[{"key": "spot"}])),
    ]
    assert len({of(), *others}) == 7
    assert of() == of(WorkersSpec(max=7), maxWorkers=3)
    numbered = [build_job(fleet(), demand(), number, 7, OWNER)["metadata"]["labels"]["memtail/template"] for number in (1, 2)]
    assert numbered == [of(), of()]


def test_a_job_whose_status_lags_behind_its_pods_is_left_to_end():
    labels = {"memtail/experiment": "a", "memtail/number": "1"}
    job = Job("a-1", "uid", labels, parallelism=4, succeeded=0, ended=False)

    def pods(*phases):
        return [Pod(f"a-1-{number}", "uid", "a-1", labels, phase, "", "") for number, phase in enumerate(phases)]

    assert worker_sets([job], pods("Running", "Pending")) == [WorkerSet("a-1", "a", 1, 4, 1)]
    ending = worker_sets([job], pods("Running", "Succeeded", "Succeeded", "Succeeded"))
    assert ending == [WorkerSet("a-1", "a", 1, 1, 1, winding_down=True)]
    for phases in (["Succeeded"] * 4, ["Running"] + ["Succeeded"] * 3):
        assert scale({"a": 0}, worker_sets([job], pods(*phases)), [], {}, elastic=True) == Changes()


def test_the_last_failed_pods_of_each_job_are_kept():
    pods = [Pod(f"{job}-{n}", "uid", job, {}, "Failed", "", "", ended=f"2026-01-01T00:00:{n:02}Z") for job in "ab" for n in (2, 0, 1)]
    running = [Pod("a-9", "uid", "a", {}, "Running", "", "")] * 5
    assert failed_beyond(pods + running, 2) == ["a-0", "b-0"]
    assert failed_beyond(pods + running, 3) == []


def test_workers_of_cancelled_experiments_are_removed_at_once_and_those_of_missing_ones_are_not():
    assert scale({"a": 0}, sets((3, 3)), ["a"], {}, elastic=True) == Changes(delete=["a-1"])
    assert scale({"b": 1}, sets((3, 3)), [], {}, elastic=True) == Changes(create={"b": 1})


class Cluster:
    """An API server without Jobs that answers some requests with an error."""

    def __init__(self):
        self.errors, self.created, self.deleted, self.requests = {}, [], [], 0

    def jobs(self):
        return []

    pods = jobs

    def owner(self, name):
        return OWNER

    def create_job(self, job):
        self.requests += 1
        name = job["metadata"]["labels"]["memtail/experiment"]
        if name in self.errors:
            raise self.errors[name]
        self.created.append(name)

    def delete_job(self, name):
        if name in self.errors:
            raise self.errors[name]
        self.deleted.append(name)


class Surplus:
    """Keeps the offers."""

    def leaving(self):
        return set()

    def offer(self, numbers):
        self.offered = numbers


def test_a_refused_job_is_shown_by_its_experiment_and_does_not_stop_others(tmp_path):
    store, cluster = RestrictedStore(tmp_path, "dispatcher"), Cluster()
    scaled = Fleet(fleet(), cluster, store, Surplus())
    cluster.errors["b"] = RefusedError("cannot create Job memtail-b-1: 422 Unprocessable Entity: tolerations[0].operator: Invalid value")
    scaled.reconcile([demand(name) for name in "abc"], set())
    assert cluster.created == ["a", "c"]
    notices = {name: ExperimentStore(store, name).notices()["fleet"].lines for name in "abc"}
    assert notices["b"] == ("workers: 0 running, 0 pending, target 10", f"workers cannot be changed: {cluster.errors['b']}")
    assert notices["a"] == notices["c"] == notices["b"][:1]
    cluster.errors.clear()
    scaled.reconcile([demand("b")], set())
    assert ExperimentStore(store, "b").notices()["fleet"].lines == notices["b"][:1]


def test_an_api_server_that_does_not_answer_ends_the_pass_at_the_first_job(tmp_path):
    cluster = Cluster()
    cluster.errors = dict.fromkeys("abc", ClusterError("cannot create Job: timeout"))
    Fleet(fleet(), cluster, RestrictedStore(tmp_path, "dispatcher"), Surplus()).reconcile([demand(name) for name in "abc"], set())
    assert cluster.requests == 1


def test_no_workers_end_for_an_experiment_whose_job_is_refused(tmp_path):
    cluster, surplus = Cluster(), Surplus()
    cluster.errors["b"] = RefusedError("cannot create Job")
    labels = {"memtail/experiment": "a", "memtail/number": "1"}
    cluster.jobs = lambda: [Job("a-1", "uid", labels, parallelism=4, succeeded=0, ended=False)]
    cluster.pods = lambda: [Pod(f"a-{number}", "uid", "a-1", labels, "Running", "", "") for number in range(4)]
    Fleet(fleet(maxWorkers=5), cluster, RestrictedStore(tmp_path, "dispatcher"), surplus).reconcile([demand("a"), demand("b")], set())
    assert surplus.offered == {}
    cluster.errors.clear()
    Fleet(fleet(maxWorkers=5), cluster, RestrictedStore(tmp_path, "dispatcher"), surplus).reconcile([demand("a"), demand("b")], set())
    assert surplus.offered == {"a": 1}


def test_a_refused_deletion_does_not_stop_other_changes(tmp_path):
    cluster, store = Cluster(), RestrictedStore(tmp_path, "dispatcher")
    cluster.errors["a-1"] = RefusedError("cannot delete Job a-1: 403 Forbidden")
    labels = [{"memtail/experiment": name, "memtail/number": "1"} for name in "ab"]
    cluster.jobs = lambda: [Job(f"{each['memtail/experiment']}-1", "uid", each, parallelism=4, succeeded=0, ended=False) for each in labels]
    Fleet(fleet(), cluster, store, Surplus()).reconcile([demand(name, state="cancelled") for name in "ab"], set())
    assert cluster.deleted == ["b-1"]
    assert ExperimentStore(store, "a").notices()["fleet"].lines[-1] == "workers cannot be changed: cannot delete Job a-1: 403 Forbidden"


def test_a_job_is_named_by_its_experiment_and_number_and_owned():
    name = "an_experiment.with-a-very-long-name-that-goes-on-and-on"
    job = build_job(fleet(), demand(name), 3, 7, OWNER)
    assert job["metadata"]["name"].startswith("memtail-an-experiment-with-a-ver-")
    assert job["metadata"]["name"].endswith("-3")
    assert len(job["metadata"]["name"]) <= 60
    assert job["metadata"]["ownerReferences"] == [OWNER]
    assert job["metadata"]["labels"] == {
        "app.kubernetes.io/instance": "memtail",
        "memtail/experiment": name,
        "memtail/number": "3",
        "memtail/template": template_hash(fleet(), demand(name)),
    }
    assert job["spec"]["parallelism"] == 7
    assert "completions" not in job["spec"]
    assert "suspend" not in job["spec"]
    pod = job["spec"]["template"]
    assert pod["metadata"]["labels"]["memtail/experiment"] == name
    assert {"name": "MEMTAIL_EXPERIMENT", "value": name} in pod["spec"]["containers"][0]["env"]
    assert job["metadata"]["name"] != build_job(fleet(), demand(name.replace("_", "-")), 3, 7, OWNER)["metadata"]["name"]
    assert "memtail/experiment" not in SETTINGS["job"]["spec"]["template"]["metadata"]["labels"]


def test_kueue_admits_suspended_jobs_partially():
    job = build_job(fleet(queueName="team"), demand(), 1, 7, OWNER)
    assert job["spec"]["suspend"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert job["metadata"]["annotations"] == {"kueue.x-k8s.io/job-min-parallelism": "1"}


def test_a_job_has_the_requested_resources():
    requested = {"gpus": 2, "memory": "32Gi", "image": "other:1", "node_selector": {"gpu": "h100"}, "priority_class": "low"}
    job = build_job(fleet(), demand(**requested, tolerations=[{"key": "spot"}]), 1, 1, OWNER)
    pod = job["spec"]["template"]["spec"]
    worker = pod["containers"][0]
    assert worker["resources"] == {
        "requests": {"cpu": "1", "memory": "32Gi"},
        "limits": {"memory": "32Gi", "nvidia.com/gpu": "2"},
    }
    assert {"name": "MEMTAIL_DEVICES", "value": "cuda:0,cuda:1"} in worker["env"]
    assert worker["image"] == "other:1"
    assert pod["nodeSelector"] == {"zone": "a", "gpu": "h100"}
    assert pod["priorityClassName"] == "low"
    assert pod["tolerations"] == [{"key": "spot", "operator": "Exists"}]


@pytest.mark.parametrize(
    ("requested", "limits", "devices"),
    [
        ({"gpus": 0}, {"memory": "8Gi"}, "cpu"),
        ({"gpu_resource": "nvidia.com/mig-1g.10gb"}, {"memory": "8Gi", "nvidia.com/mig-1g.10gb": "1"}, "cuda:0"),
        ({"cpu": 4}, {"memory": "8Gi", "nvidia.com/gpu": "1"}, "cuda:0"),
    ],
)
def test_requested_gpus_replace_the_default_ones(requested, limits, devices):
    worker = build_job(fleet(), demand(**requested), 1, 1, OWNER)["spec"]["template"]["spec"]["containers"][0]
    assert worker["resources"]["limits"] == limits
    assert {"name": "MEMTAIL_DEVICES", "value": devices} in worker["env"]


def test_a_worker_trains_a_shard_on_each_of_its_devices():
    assert shards_per_worker(fleet(), None) == 1
    assert shards_per_worker(fleet(), WorkersSpec(gpus=4)) == 4
    assert shards_per_worker(fleet(), WorkersSpec(gpus=0)) == 1


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ({"max": 51}, "max is 51, at most 50 is allowed"),
        ({"gpus": 5}, "gpus is 5, at most 4 is allowed"),
        ({"memory": "65Gi"}, "memory is 65Gi, at most 64Gi is allowed"),
        ({"cpu": "16500m"}, "cpu is 16500m, at most 16 is allowed"),
        ({"image": "evil"}, "image is evil, allowed: other:1"),
        ({"gpu_resource": "amd.com/gpu"}, "gpu_resource is amd.com/gpu, allowed: nvidia.com/gpu, nvidia.com/mig-1g.10gb"),
        ({"priority_class": "high"}, "priority_class is high, allowed: low"),
        ({"node_selector": {"gpu": "a100"}}, "node_selector gpu is a100, allowed: h100"),
        ({"node_selector": {"disk": "ssd"}}, "node_selector disk is ssd, allowed: none"),
        ({"tolerations": [{"key": "x"}]}, "tolerations name x, allowed: spot"),
    ],
)
def test_a_request_beyond_the_limits_is_refused_with_a_message(requested, message):
    assert fleet().limits.violation(WorkersSpec(**requested)) == message
    assert fleet().limits.violation(WorkersSpec(max=50, gpus=4, memory="64Gi", cpu="16", image="other:1")) is None
