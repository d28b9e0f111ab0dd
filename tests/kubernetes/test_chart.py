"""Manifests that the chart renders, without a cluster.

They are validated against Kubernetes' schemas of the oldest and the newest supported version. The custom resources (ScaledJob,
ServiceMonitor, PodMonitor, PrometheusRule) have no schema there; separate tests check them.
"""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import files
from pathlib import Path
from typing import Any

import pytest
import yaml

from memtail.spec import WorkersSpec
from services.dispatcher.cache_fills import build_fill
from services.dispatcher.worker_jobs import Demand, FleetSettings, build_job
from services.tools.rights import REDIS_RULES, RIGHTS, redis_users, user
from tests.kubernetes.chart import CHART, NAMESPACE, RELEASE, Rendered, as_options, helm, variables
from tests.kubernetes.conftest import install_tools
from tests.support.cluster import RedisServer

VERSIONS = ("1.33.0", "1.37.0")
WITHOUT_SCHEMA = {"ScaledJob", "ServiceMonitor", "PodMonitor", "PrometheusRule"}
EXTERNAL = {
    "redis.enabled": False,
    "externalRedis.existingSecret": "their-redis",
    "externalRedis.port": 6380,
    "minio.enabled": False,
    "externalS3.bucket": "theirs",
    "externalS3.prefix": "a/b",
    "externalS3.endpoint": "https://s3.example.com:8443",
    "externalS3.region": "north-1",
    "externalS3.addressing": "path",
    "externalS3.ca.configMap": "authority",
    "externalS3.existingSecret": "their-keys",
    "explorer.existingSecret": "look",
}
IDENTITY = {
    "redis.enabled": False,
    "externalRedis.url": "rediss://redis.example.com:6390/0",
    "minio.enabled": False,
    "externalS3.bucket": "theirs",
    "serviceAccount.annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/memtail"},
    "explorer.existingSecret": "look",
}
MONITORING = {
    "monitoring.serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "monitoring.podMonitor.enabled": True,
    "monitoring.prometheusRule.enabled": True,
    "monitoring.dashboards.enabled": True,
}
OF_A_POD = {
    "labels": {"team": "a"},
    "annotations": {"note": "b"},
    "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
    "extraEnvFrom": [{"configMapRef": {"name": "more"}}],
    "extraVolumes": [{"name": "more", "emptyDir": {}}],
    "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
    "nodeSelector": {"disk": "ssd"},
    "tolerations": [{"key": "spot", "operator": "Exists"}],
    "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": []}},
    "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}],
    "priorityClassName": "high",
    "runtimeClassName": "nvidia",
}
COMPONENTS = {
    "dispatcher": "dispatcher",
    "aggregator": "aggregator",
    "explorer": "explorer",
    "worker": "workers",
    "redis": "redis",
    "minio": "minio",
}
MATRIX: dict[str, dict[str, Any]] = {
    "defaults": {},
    "external": EXTERNAL,
    "identity": IDENTITY,
    "deployment": {"workers.mode": "deployment", "workers.replicas": 3},
    "no-rights": {"rbac.create": False, "admissionPolicy.enabled": True},
    "admission-policy": {"admissionPolicy.enabled": True},
    "keda": {"workers.mode": "keda"},
    "kueue": {"workers.queueName": "team-a"},
    "gpus": {"workers.gpus": 2, "workers.gpuResource": "nvidia.com/mig-1g.10gb", "workers.limits.gpuResources": ["nvidia.com/gpu"]},
    "monitoring": MONITORING,
    "host-cache": {"workers.cache": {"type": "hostPath", "path": "/data/memtail", "limit": 100}},
    "claimed-cache": {"workers.cache": {"type": "claim", "claim": "datasets", "limit": 0.5}},
    "unlimited-cache": {"workers.cache": {"type": "claim", "claim": "datasets"}},
    "filled-claim": {"workers.cache": {"type": "claim", "claim": "datasets", "limit": 80, "fill": True}, "workers.gpus": 1},
    "filled-hosts": {
        "workers.cache": {"type": "hostPath", "path": "/data/memtail", "fill": True},
        "workers.gpus": 1,
        "workers.nodeSelector": {"gpu": "yes"},
        "workers.tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    },
    "explorer": {
        "explorer.existingSecret": "look",
        "explorer.existingSecretKey": "word",
        "networkPolicy.explorerFrom": [{"namespaceSelector": {}}],
    },
    "no-policies": {"networkPolicy.enabled": False, "minio.storageClass": "fast"},
    "everything-of-a-pod": {f"{name}.{key}": value for name in COMPONENTS.values() for key, value in OF_A_POD.items()},
    "images": {
        "image.control": {"registry": "r.example.com", "tag": "2"},
        "image.worker": {"registry": "r.example.com", "digest": f"sha256:{'0' * 64}"},
        "image.pullSecrets": [{"name": "pull"}],
    },
}


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    install_tools("helm", "kubeconform")


@pytest.fixture(scope="module", params=MATRIX)
def rendered(request: pytest.FixtureRequest) -> Rendered:
    return Rendered(MATRIX[request.param])


@pytest.fixture(scope="module")
def schemas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kubernetes' schemas in kubeconform's layout, with references to local files instead of a web site."""
    folder = tmp_path_factory.mktemp("schemas")
    for packed in files("kubernetes-validate") or []:
        version = packed.parent.name
        if version in [f"v{each}-local-strict" for each in VERSIONS]:
            schema = json.loads(Path(str(packed.locate())).read_text().replace('"/api/_definitions.json', '"_definitions.json'))
            schema.pop("$id", None)
            (folder / version).mkdir(exist_ok=True)
            (folder / version / packed.name).write_text(json.dumps(schema))
    return folder


def conforms(text: str, schemas: Path, version: str) -> str:
    """Return kubeconform's errors; a kind without a schema is one, except for the custom resources."""
    location = f"{schemas}/{{{{.NormalizedKubernetesVersion}}}}-local{{{{.StrictSuffix}}}}/{{{{.ResourceKind}}}}{{{{.KindSuffix}}}}.json"
    options = ["-strict", "-kubernetes-version", version, "-schema-location", location, "-skip", ",".join(WITHOUT_SCHEMA)]
    done = subprocess.run(["kubeconform", *options], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (done.stdout + done.stderr == "")
    return done.stdout + done.stderr


def test_helm_lint_has_no_warnings():
    done = helm("lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout
    assert "[WARNING]" not in done.stdout, done.stdout


@pytest.mark.parametrize("version", VERSIONS)
def test_all_manifests_are_valid(rendered, schemas, version):
    assert conforms(rendered.text, schemas, version) == ""


def test_a_misspelt_key_is_not_valid(schemas):
    text = Rendered({}).text.replace("imagePullPolicy:", "imagePullPolicies:")
    assert "imagePullPolicies" in conforms(text, schemas, VERSIONS[-1])


def test_every_container_meets_the_level_restricted(rendered):
    pods = list(rendered.pods())
    assert {"dispatcher", "aggregator", "explorer", "worker", "test"} <= {component for component, _ in pods}
    for component, pod in pods:
        security = pod["securityContext"]
        assert (security["runAsNonRoot"], security["runAsUser"]) == (True, 1000)
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        for container in pod["containers"] + pod.get("initContainers", []):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            assert "memory" in container["resources"]["limits"]
            assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"]
            assert not any("secretKeyRef" in variable.get("valueFrom", {}) for variable in container.get("env", []))
        kinds = {kind for volume in pod["volumes"] for kind in volume if kind != "name"}
        assert kinds <= {"emptyDir", "projected", "secret", "configMap", "persistentVolumeClaim"} | (
            {"hostPath"} if component in ("worker", "cache") else set()
        )
        assert pod["automountServiceAccountToken"] is False
        with_token = [
            container["name"]
            for container in pod["containers"] + pod.get("initContainers", [])
            for mount in container["volumeMounts"]
            if mount["name"] == "account"
        ]
        assert with_token == (["dispatcher"] if component == "dispatcher" and "MEMTAIL_FLEET" in variables(pod) else [])


def test_names_labels_and_selectors_match(rendered):
    for each in rendered.objects:
        labels = each["metadata"]["labels"]
        assert (labels["app.kubernetes.io/name"], labels["app.kubernetes.io/instance"]) == ("memtail", RELEASE)
        if each["kind"] in ("Deployment", "StatefulSet"):
            assert each["spec"]["selector"]["matchLabels"].items() <= each["spec"]["template"]["metadata"]["labels"].items()
    components = [
        pod["metadata"]["labels"] for kind in ("Deployment", "StatefulSet") for pod in (e["spec"]["template"] for e in rendered.of(kind))
    ]
    for each in rendered.of("Service") + rendered.of("PodDisruptionBudget"):
        selector = each["spec"]["selector"].get("matchLabels", each["spec"]["selector"])
        shared = each["kind"] == "Service" and each["metadata"]["name"].endswith("-aggregator")
        assert sum(selector.items() <= labels.items() for labels in components) == (2 if shared else 1)
        assert each["kind"] == "Service" or each["spec"]["maxUnavailable"] == 1


def test_each_port_of_a_service_leads_to_one_component():
    """Also the Service that selects two pods: a port has no address in a pod without a port of its name."""
    chart = Rendered({})
    pods = [each["spec"]["template"] for kind in ("Deployment", "StatefulSet") for each in chart.of(kind)]
    led = {
        (service["metadata"]["name"].removeprefix(f"{RELEASE}-memtail-"), port["port"]): [
            pod["metadata"]["labels"]["app.kubernetes.io/component"]
            for pod in pods
            if service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
            and port["targetPort"] in [own["name"] for own in pod["spec"]["containers"][0]["ports"]]
        ]
        for service in chart.of("Service")
        for port in service["spec"]["ports"]
    }
    assert led == {
        ("dispatcher", 9100): ["dispatcher"],
        ("aggregator", 9100): ["aggregator"],
        ("aggregator", 8080): ["explorer"],
        ("explorer", 9100): ["explorer"],
        ("explorer", 8080): ["explorer"],
        ("redis", 6379): ["redis"],
        ("minio", 9000): ["minio"],
        ("minio", 9001): ["minio"],
    }


def test_an_upgrade_stops_an_aggregator_or_dispatcher_before_it_starts_the_next():
    strategies = {each["metadata"]["name"]: each["spec"].get("strategy") for each in Rendered({}).of("Deployment")}
    one_at_a_time = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}
    assert strategies == {
        f"{RELEASE}-memtail-dispatcher": one_at_a_time,
        f"{RELEASE}-memtail-aggregator": one_at_a_time,
        f"{RELEASE}-memtail-explorer": None,
    }


def test_a_long_release_name_is_shortened_to_valid_names():
    done = helm("template", "a" * 53, str(CHART))
    names = [each["metadata"]["name"] for each in yaml.safe_load_all(done.stdout) if each]
    assert max(map(len, names)) <= 63
    assert len(set(names)) > 10


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"workers.gpu": 1}, "'gpu' not allowed"),
        ({"worker": {}}, "'worker' not allowed"),
        ({"redis.image.tagg": "8"}, "'tagg' not allowed"),
        ({"monitoring.serviceMonitor.enable": True}, "'enable' not allowed"),
        ({"workers.limits.maxWorker": 1}, "'maxWorker' not allowed"),
        ({"workers.mode": "job"}, "/workers/mode"),
        ({"workers.cache.type": "pvc"}, "/workers/cache/type"),
        ({"workers.gpus": "1"}, "/workers/gpus"),
        ({"workers.limits.memory": "lots"}, "/workers/limits/memory"),
        ({"externalS3.endpoint": "s3.example.com"}, "/externalS3/endpoint"),
        ({"image.control.digest": "latest"}, "/image/control/digest"),
        ({"workers.cache.type": "claim"}, "set workers.cache.claim"),
        ({"redis.enabled": False}, "set externalRedis.url or externalRedis.existingSecret"),
        ({"externalRedis.url": "redis://r:6379/0"}, "set redis.enabled to false"),
        ({"minio.enabled": False}, "set externalS3.bucket"),
        ({"externalS3.bucket": "theirs"}, "set minio.enabled to false"),
        ({"serviceAccount.componentAnnotations": None}, "use --reset-then-reuse-values"),
    ],
)
def test_invalid_values_are_refused(values, message):
    done = helm("template", RELEASE, str(CHART), *as_options(values))
    assert done.returncode != 0
    assert message in done.stderr


def test_every_pod_value_affects_every_component():
    for component, pod in Rendered(MATRIX["everything-of-a-pod"]).pods():
        container = pod["containers"][0]
        for key in ("nodeSelector", "tolerations", "affinity", "topologySpreadConstraints", "priorityClassName", "runtimeClassName"):
            assert pod[key] == OF_A_POD[key], (component, key)
        assert OF_A_POD["extraVolumes"][0] in pod["volumes"]
        assert OF_A_POD["extraVolumeMounts"][0] in container["volumeMounts"]
        assert OF_A_POD["extraEnv"][0] in container["env"]
        assert container["envFrom"] == OF_A_POD["extraEnvFrom"]
    everything = Rendered(MATRIX["everything-of-a-pod"])
    metadata = [each["spec"]["template"]["metadata"] for kind in ("Deployment", "StatefulSet") for each in everything.of(kind)]
    for each in [*metadata, everything.worker()["metadata"]]:
        assert each["labels"]["team"] == "a"
        assert each["annotations"]["note"] == "b"


def test_the_fleets_settings_file_is_readable_and_yields_valid_jobs(rendered, schemas, tmp_path):
    if not any(each["metadata"]["name"].endswith("-fleet") for each in rendered.of("ConfigMap")):
        assert "MEMTAIL_FLEET" not in rendered.env("Deployment", "-dispatcher")
        assert not rendered.of("Role")
        return
    assert rendered.env("Deployment", "-dispatcher")["MEMTAIL_FLEET"] == "/etc/memtail/fleet/fleet.yaml"
    (tmp_path / "fleet.yaml").write_text(rendered.get("ConfigMap", "-fleet")["data"]["fleet.yaml"])
    settings = FleetSettings.load(str(tmp_path / "fleet.yaml"))
    assert (settings.namespace, settings.instance, settings.owner) == (NAMESPACE, RELEASE, f"{RELEASE}-memtail-dispatcher")
    owner = {"apiVersion": "apps/v1", "kind": "Deployment", "name": settings.owner, "uid": "1", "controller": True}
    requested = WorkersSpec.model_validate({"gpus": 4, "memory": "64Gi", "cpu": 8})
    for workers in (None, requested):
        job = build_job(settings, Demand("cifar.10", "running", 0, 100, workers), 1, 7, owner)
        assert job["metadata"]["labels"]["app.kubernetes.io/instance"] == RELEASE
        assert job["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/instance"] == RELEASE
        assert "completions" not in job["spec"]
        assert job["spec"]["backoffLimit"] == 2147483647
        container = job["spec"]["template"]["spec"]["containers"][0]
        assert {"name": "MEMTAIL_EXPERIMENT", "value": "cifar.10"} in container["env"]
        assert container["name"] == "worker"
        for version in VERSIONS:
            assert conforms(json.dumps(job), schemas, version) == ""
    limits = {name: str(amount) for name, amount in container["resources"]["limits"].items()}
    assert limits == {"memory": "64Gi", settings.limits.gpu_resources[0]: "4"}


def test_jobs_for_kueue_are_created_suspended(tmp_path):
    (tmp_path / "fleet.yaml").write_text(Rendered(MATRIX["kueue"]).get("ConfigMap", "-fleet")["data"]["fleet.yaml"])
    job = build_job(FleetSettings.load(str(tmp_path / "fleet.yaml")), Demand("a", "running", 0, 1), 1, 1, {})
    assert job["spec"]["suspend"] is True
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"


def test_workers_train_on_their_gpus_or_select_a_device():
    without, pod = Rendered({}), Rendered(MATRIX["gpus"])
    assert variables(without.worker()["spec"])["MEMTAIL_DEVICES"] == "auto"
    assert variables(pod.worker()["spec"])["MEMTAIL_DEVICES"] == "cuda:0,cuda:1"
    assert pod.worker()["spec"]["containers"][0]["resources"]["limits"] == {"memory": "4Gi", "nvidia.com/mig-1g.10gb": 2}
    assert pod.fleet()["limits"]["gpuResources"] == ["nvidia.com/mig-1g.10gb", "nvidia.com/gpu"]


def test_the_mode_determines_how_workers_are_started():
    assert [each["metadata"]["name"] for each in Rendered({}).of("Role")] == [f"{RELEASE}-memtail-dispatcher"]
    for values in (MATRIX["deployment"], MATRIX["no-rights"]):
        fixed = Rendered(values)
        assert not fixed.of("Role")
        assert not fixed.of("RoleBinding")
        assert "-fleet" not in fixed.text
        assert fixed.get("Deployment", "-worker")["spec"]["replicas"] == values.get("workers.replicas", 1)
        assert not {"MEMTAIL_EXPERIMENT", "MEMTAIL_REST_SECONDS"} & fixed.env("Deployment", "-worker").keys()
        assert fixed.worker()["spec"]["restartPolicy"] == "Always"
    by_hand = Rendered({"rbac.create": False, "workers.mode": "jobs"})
    assert by_hand.fleet()
    assert not by_hand.of("Role")


def test_keda_counts_shards_in_training_and_never_removes_a_running_worker():
    scaled = Rendered({"workers.mode": "keda", "workers.gpus": 2, "workers.max": 7}).get("ScaledJob", "-worker")["spec"]
    assert scaled["scalingStrategy"] == {"strategy": "default"}
    assert scaled["rollout"] == {"strategy": "gradual"}
    assert scaled["maxReplicaCount"] == 7
    [trigger] = scaled["triggers"]
    query = f'sum(memtail_shards_outstanding{{namespace="{NAMESPACE}",release="{RELEASE}"}})'
    assert trigger["type"] == "prometheus"
    assert trigger["metadata"]["query"] == query
    assert trigger["metadata"]["threshold"] == "2"
    job = scaled["jobTargetRef"]
    assert job["parallelism"] == 1
    assert "completions" not in job
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert float(variables(job["template"]["spec"])["MEMTAIL_REST_SECONDS"]) > 0


@pytest.mark.parametrize("version", VERSIONS)
def test_the_jobs_of_keda_are_valid(schemas, version):
    target = Rendered(MATRIX["keda"]).get("ScaledJob", "-worker")["spec"]["jobTargetRef"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, "spec": target}
    assert conforms(json.dumps(job), schemas, version) == ""


def test_the_cache_has_the_type_of_the_values():
    def cache(values):
        pod = Rendered(values).worker()["spec"]
        return next(volume for volume in pod["volumes"] if volume["name"] == "cache"), variables(pod).get("MEMTAIL_CACHE_LIMIT")

    assert cache({}) == ({"name": "cache", "emptyDir": {"sizeLimit": "10Gi"}}, "9.5")
    assert cache(MATRIX["host-cache"]) == ({"name": "cache", "hostPath": {"path": "/data/memtail", "type": "Directory"}}, "100")
    assert cache(MATRIX["claimed-cache"]) == ({"name": "cache", "persistentVolumeClaim": {"claimName": "datasets"}}, "0.5")
    assert cache(MATRIX["unlimited-cache"])[1] is None  # what the volume has room for


@pytest.mark.parametrize(
    ("size", "limit"), [("200Gi", 190), ("1Ti", 972.8), ("500M", 0.4424), ("1.5Gi", 1.425), ("2147483648", 1.9), ("20Ti", 19456)]
)
def test_the_limit_of_an_empty_dir_leaves_room_for_the_rest_of_the_cache(size, limit):
    pod = Rendered({"workers.cache.sizeLimit": size}).worker()["spec"]
    assert float(variables(pod)["MEMTAIL_CACHE_LIMIT"]) == pytest.approx(limit, rel=1e-3)
    assert pod["containers"][0]["resources"]["requests"]["ephemeral-storage"] == size


def test_a_cache_limit_above_the_size_of_the_empty_dir_is_refused():
    done = helm("template", RELEASE, str(CHART), *as_options({"workers.cache.sizeLimit": "1Gi", "workers.cache.limit": 1.5}))
    assert done.returncode
    assert "workers.cache.limit is 1.5 GiB, more than workers.cache.sizeLimit, 1Gi: lower the limit, or raise sizeLimit" in done.stderr
    allowed = Rendered({"workers.cache.sizeLimit": "1Gi", "workers.cache.limit": 1}).worker()["spec"]
    assert variables(allowed)["MEMTAIL_CACHE_LIMIT"] == "1"


def test_every_cache_in_an_empty_dir_has_a_size_that_is_requested_of_the_node(rendered):
    for component, pod in rendered.pods():
        cache = next((volume for volume in pod["volumes"] if volume["name"] == "cache"), {})
        requested = pod["containers"][0]["resources"]["requests"].get("ephemeral-storage")
        assert requested == cache.get("emptyDir", {}).get("sizeLimit"), component
        if component in ("aggregator", "explorer"):
            assert requested
            assert variables(pod)["MEMTAIL_CACHE_LIMIT"] == "3"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_job_without_gpus_fills_a_claimed_cache(schemas, version):
    rendered = Rendered(MATRIX["filled-claim"] | {"workers.nodeSelector": {"gpu": "yes"}})
    settings = FleetSettings.model_validate(rendered.fleet())
    job = build_fill(settings, "a.b", {"apiVersion": "apps/v1", "kind": "Deployment", "name": settings.owner, "uid": "u"})
    assert conforms(json.dumps(job), schemas, version) == ""
    pod, worker = job["spec"]["template"]["spec"], rendered.worker()["spec"]
    (container,) = pod["containers"]
    assert (container["command"], container["args"]) == (["memtail", "cache"], ["a.b"])
    assert "nvidia.com/gpu" not in json.dumps(job)
    assert "nodeSelector" not in pod
    assert [each for each in pod["volumes"] if each["name"] == "cache"] == [each for each in worker["volumes"] if each["name"] == "cache"]
    for name in ("MEMTAIL_CACHE", "MEMTAIL_CACHE_LIMIT", "MEMTAIL_STORE", "MEMTAIL_S3_ACCESS_KEY_FILE"):
        assert variables(pod)[name] == variables(worker)[name]
    assert pod["serviceAccountName"] == worker["serviceAccountName"]
    assert job["metadata"]["labels"]["memtail/experiment"] == job["spec"]["template"]["metadata"]["labels"]["memtail/experiment"] == "a.b"
    assert "fill" not in Rendered(MATRIX["claimed-cache"]).fleet()


def test_a_daemon_set_without_gpus_fills_the_caches_of_the_workers_nodes():
    rendered = Rendered(MATRIX["filled-hosts"])
    pod, worker = rendered.get("DaemonSet", "-cache")["spec"]["template"]["spec"], rendered.worker()["spec"]
    assert "memtail cache --all" in pod["containers"][0]["command"][-1]
    assert "nvidia.com/gpu" not in json.dumps(pod["containers"])
    for key in ("nodeSelector", "tolerations"):
        assert pod[key] == worker[key]
    assert [each for each in pod["volumes"] if each["name"] == "cache"] == [each for each in worker["volumes"] if each["name"] == "cache"]
    assert "fill" not in rendered.fleet()
    assert not Rendered(MATRIX["host-cache"]).of("DaemonSet")


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"workers.cache.fill": True}, "set workers.cache.type to claim or hostPath"),
        (MATRIX["filled-claim"] | {"workers.mode": "keda"}, "needs workers.mode jobs, not keda"),
    ],
)
def test_a_cache_that_cannot_be_filled_before_workers_start_is_refused(values, fault):
    done = helm("template", RELEASE, str(CHART), *as_options(values))
    assert done.returncode
    assert fault in done.stderr


def test_a_request_of_storage_in_the_values_takes_precedence():
    values = {"workers.resources.requests.ephemeral-storage": "1Gi", "explorer.cache.sizeLimit": "8Gi"}
    rendered = Rendered(values)
    assert rendered.worker()["spec"]["containers"][0]["resources"]["requests"]["ephemeral-storage"] == "1Gi"
    assert rendered.env("Deployment", "-explorer")["MEMTAIL_CACHE_LIMIT"] == "6"


def test_external_redis_and_s3_are_configured_by_the_values():
    other = Rendered(EXTERNAL)
    assert not other.of("StatefulSet")
    assert not other.of("Secret")
    env = other.env("Deployment", "-dispatcher")
    assert env["MEMTAIL_STORE"] == "s3://theirs/a/b"
    assert env["MEMTAIL_S3_ENDPOINT"] == "https://s3.example.com:8443"
    assert (env["MEMTAIL_S3_REGION"], env["MEMTAIL_S3_ADDRESSING"]) == ("north-1", "path")
    files = {name: path for name, path in env.items() if name.endswith("_FILE")}
    assert files == {
        "MEMTAIL_BROKER_FILE": "/run/memtail/broker",
        "MEMTAIL_S3_ACCESS_KEY_FILE": "/run/memtail/s3-access-key",
        "MEMTAIL_S3_SECRET_KEY_FILE": "/run/memtail/s3-secret-key",
        "MEMTAIL_S3_CA_FILE": "/run/memtail/ca.crt",
    }
    pod = other.get("Deployment", "-dispatcher")["spec"]["template"]["spec"]
    sources = next(volume for volume in pod["volumes"] if volume["name"] == "connections")["projected"]["sources"]
    paths = {f"/run/memtail/{item['path']}" for source in sources for part in source.values() for item in part["items"]}
    assert paths == set(files.values())
    assert "initContainers" not in pod
    assert [next(iter(source.values()))["name"] for source in sources] == ["their-redis", "their-keys", "authority"]


def test_the_doctor_of_helm_test_connects_to_the_external_servers(minio, tmp_path):
    redis, bucket = RedisServer(), minio.new_bucket()
    redis.start()
    keys = {"broker": redis.url, "access-key": minio.access_key, "secret-key": minio.secret_key}
    try:
        s3 = {"bucket": bucket, "endpoint": minio.endpoint, "existingSecret": "their-keys"}
        values = {name: value for name, value in EXTERNAL.items() if not name.startswith("externalS3")} | {"externalS3": s3}
        [pod] = [pod for component, pod in Rendered(values).pods() if component == "test"]
        for source in next(volume for volume in pod["volumes"] if volume["name"] == "connections")["projected"]["sources"]:
            for item in source["secret"]["items"]:
                (tmp_path / item["path"]).write_text(keys[item["key"]])
        env = {name: value.replace("/run/memtail", str(tmp_path)) for name, value in variables(pod).items()}
        command = [sys.executable, "-m", "memtail", "doctor", "--json"]
        done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    finally:
        redis.stop()
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert done.returncode == 0, checks
    assert {"store", "conditional write", "broker"} <= checks.keys(), checks


def secret_keys(pod: dict[str, Any], container: dict[str, Any]) -> set[str]:
    """Return what a container mounts of Secrets, as `SECRET/KEY`."""
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    volumes = [volume for volume in pod["volumes"] if volume["name"] in mounted]
    secrets = [source["secret"] for volume in volumes for source in volume.get("projected", {}).get("sources", []) if "secret" in source]
    secrets += [{**volume["secret"], "name": volume["secret"]["secretName"]} for volume in volumes if "secret" in volume]
    return {f"{secret['name']}/{item['key']}" for secret in secrets for item in secret["items"]}


def test_each_container_has_its_own_keys_and_no_others():
    chart = Rendered({})
    held = {component: secret_keys(pod, pod["containers"][0]) for component, pod in chart.pods()}
    own = {name: {f"s3-access-key-{name}", f"s3-secret-key-{name}"} for name in RIGHTS}
    expected = {
        "worker": own["worker"] | {"broker-worker"},
        "dispatcher": own["dispatcher"] | {"broker-dispatcher"},
        "test": own["dispatcher"] | {"broker-dispatcher"},
        "aggregator": own["aggregator"],
        "explorer": own["explorer"] | {"explorer-token"},
        "redis": {"redis.conf"},
        "minio": {"s3-access-key", "s3-secret-key"},
    }
    assert held == {name: {f"{RELEASE}-memtail/{key}" for key in keys} for name, keys in expected.items()}
    pod = chart.get("Deployment", "-dispatcher")["spec"]["template"]["spec"]
    [bucket] = pod["initContainers"]
    users = {f"{RELEASE}-memtail/s3-secret-key-{name}" for name in RIGHTS}
    assert secret_keys(pod, bucket) == users | {f"{RELEASE}-memtail/s3-{kind}-key" for kind in ("access", "secret")}
    secret = chart.get("Secret", "")["stringData"]
    assert {name: secret[f"s3-access-key-{name}"] for name in RIGHTS} == {name: user(name) for name in RIGHTS}
    password = {name: secret[f"redis-password-{name}"] for name in REDIS_RULES}
    assert secret["redis.conf"] == f"requirepass {secret['redis-password']}\n{redis_users(password)}"
    for name in REDIS_RULES:
        assert secret[f"broker-{name}"] == f"redis://{user(name)}:{password[name]}@{RELEASE}-memtail-redis:6379/0"
    passwords = [value for key, value in secret.items() if "password" in key or "secret" in key or "token" in key]
    assert len(set(passwords)) == len(passwords)


def test_components_may_have_secrets_of_their_own_for_external_servers():
    secrets = {
        "externalS3.componentSecrets": {"worker": "worker-keys", "explorer": "explorer-keys"},
        "externalRedis.componentSecrets": {"worker": "worker-redis"},
    }
    held = {component: secret_keys(pod, pod["containers"][0]) for component, pod in Rendered({**EXTERNAL, **secrets}).pods()}
    assert held["worker"] == {"worker-keys/access-key", "worker-keys/secret-key", "worker-redis/broker"}
    assert held["explorer"] == {"explorer-keys/access-key", "explorer-keys/secret-key", "look/token"}
    assert held["aggregator"] == {"their-keys/access-key", "their-keys/secret-key"}
    assert "their-redis/broker" in held["dispatcher"]
    mixed = Rendered({**IDENTITY, "externalS3.componentSecrets": {"worker": "worker-keys"}})
    identities = mixed.get("NetworkPolicy", "-to-identity")["spec"]["podSelector"]["matchExpressions"][0]["values"]
    assert identities == ["dispatcher", "aggregator", "explorer", "test"]


def test_aggregator_and_explorer_have_no_access_to_redis():
    for values in ({}, EXTERNAL, IDENTITY):
        chart = Rendered(values)
        for name in ("-aggregator", "-explorer"):
            assert "MEMTAIL_BROKER_FILE" not in chart.env("Deployment", name)
            assert '"broker"' not in json.dumps(chart.get("Deployment", name))


def test_only_the_clients_of_the_values_can_reach_the_explorer_which_has_a_token():
    trial, other = Rendered({}), Rendered(MATRIX["explorer"])
    assert not [each for each in trial.of("NetworkPolicy") if 8080 in ports(each, "ingress")]
    policy = other.get("NetworkPolicy", "-explorer")
    assert ports(policy, "ingress") == [8080]
    assert policy["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "explorer"
    sources = {}
    for name, chart in (("trial", trial), ("other", other)):
        env, pod = chart.env("Deployment", "-explorer"), chart.get("Deployment", "-explorer")["spec"]["template"]["spec"]
        assert env["MEMTAIL_EXPLORER_PORT"] == "8080"
        [mount] = [each["mountPath"] for each in pod["containers"][0]["volumeMounts"] if each["name"] == "explorer"]
        assert env["MEMTAIL_EXPLORER_TOKEN_FILE"] == f"{mount}/token"
        [sources[name]] = [each["secret"] for each in pod["volumes"] if each["name"] == "explorer"]
        for component in ("-dispatcher", "-aggregator"):
            assert "MEMTAIL_EXPLORER_PORT" not in chart.env("Deployment", component)
            assert "explorer-token" not in json.dumps(chart.get("Deployment", component))
    assert sources["other"] == {"secretName": "look", "defaultMode": 0o440, "items": [{"key": "word", "path": "token"}]}
    assert "explorer-token" not in other.get("Secret", "")["stringData"]
    assert sources["trial"]["secretName"] == f"{RELEASE}-memtail"
    [item] = sources["trial"]["items"]
    assert len(trial.get("Secret", "")["stringData"][item["key"]]) == 32


def test_pods_with_a_cloud_identity_have_no_keys():
    other = Rendered(IDENTITY)
    assert not [name for name in other.env("Deployment", "-dispatcher") if "KEY" in name]
    accounts = [each["metadata"] for each in other.of("ServiceAccount")]
    assert len(accounts) == 4
    assert all(each["annotations"] == IDENTITY["serviceAccount.annotations"] for each in accounts)
    own = {"serviceAccount.componentAnnotations": {"worker": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/worker"}}}
    roles = {each["metadata"]["name"]: each["metadata"]["annotations"] for each in Rendered({**IDENTITY, **own}).of("ServiceAccount")}
    assert roles == {
        f"{RELEASE}-memtail": own["serviceAccount.componentAnnotations"]["worker"],
        **{f"{RELEASE}-memtail-{name}": IDENTITY["serviceAccount.annotations"] for name in ("dispatcher", "aggregator", "explorer")},
    }
    [secret] = other.of("Secret")
    assert secret["stringData"] == {"broker": "rediss://redis.example.com:6390/0"}


def ports(policy: dict[str, Any], direction: str) -> list[int]:
    return [port["port"] for rule in policy["spec"].get(direction, []) for port in rule["ports"]]


def test_network_policies_allow_only_the_required_connections():
    trial, other, identity = Rendered({"networkPolicy.metricsFrom": [{"namespaceSelector": {}}]}), Rendered(EXTERNAL), Rendered(IDENTITY)
    for rendered in (trial, other, identity):
        deny = rendered.get("NetworkPolicy", "")["spec"]
        assert deny["policyTypes"] == ["Ingress", "Egress"]
        assert not {"ingress", "egress"} & deny.keys()
        assert "app.kubernetes.io/component" not in deny["podSelector"]["matchLabels"]
    assert trial.get("NetworkPolicy", "-metrics")["spec"]["ingress"] == [{"ports": [{"port": 9100}], "from": [{"namespaceSelector": {}}]}]
    assert ports(other.get("NetworkPolicy", "-to-redis"), "egress") == [6380]
    assert ports(other.get("NetworkPolicy", "-to-s3"), "egress") == [8443]
    assert ports(identity.get("NetworkPolicy", "-to-redis"), "egress") == [6390]
    assert ports(identity.get("NetworkPolicy", "-to-s3"), "egress") == [443]
    token_service, agent = identity.get("NetworkPolicy", "-to-identity")["spec"]["egress"]
    assert token_service == {"ports": [{"port": 443}]}
    assert agent["to"] == [{"ipBlock": {"cidr": "169.254.0.0/16", "except": ["169.254.169.254/32"]}}]
    assert "-to-identity" not in trial.text + other.text
    bounds = {
        "networkPolicy.s3To": [{"ipBlock": {"cidr": "192.0.2.0/24"}}],
        "networkPolicy.identityTo": [{"ipBlock": {"cidr": "192.0.2.7/32"}}],
    }
    bounded = Rendered({**IDENTITY, **bounds})
    for name, value in (("-to-s3", "s3To"), ("-to-identity", "identityTo")):
        assert bounded.get("NetworkPolicy", name)["spec"]["egress"][0]["to"] == bounds[f"networkPolicy.{value}"]
    assert not Rendered(MATRIX["no-policies"]).of("NetworkPolicy")
    for mode, there in (("jobs", 1), ("deployment", 0), ("keda", 0)):
        policies = Rendered({"workers.mode": mode}).of("NetworkPolicy")
        assert sum(each["metadata"]["name"].endswith("-to-api-server") for each in policies) == there


def reachable(rendered: Rendered, component: str, server: str) -> bool:
    """Return whether policies allow connections from a component to a server, on both ends."""

    def selects(selector: dict[str, Any], name: str) -> bool:
        values = [each["values"] for each in selector.get("matchExpressions", [])] or [
            [selector["matchLabels"].get("app.kubernetes.io/component", name)]
        ]
        return name in values[0]

    policies = [each["spec"] for each in rendered.of("NetworkPolicy")]
    out = any(
        selects(policy["podSelector"], component)
        and any(selects(peer["podSelector"], server) for peer in rule.get("to", []) if "podSelector" in peer)
        for policy in policies
        for rule in policy.get("egress", [])
    )
    into = any(
        selects(policy["podSelector"], server)
        and any(selects(peer["podSelector"], component) for peer in rule.get("from", []) if "podSelector" in peer)
        for policy in policies
        for rule in policy.get("ingress", [])
    )
    assert out == into
    return out


def test_network_policies_of_both_ends_match():
    trial = Rendered({})
    reached = {(client, server) for client in (*COMPONENTS, "test") for server in COMPONENTS if reachable(trial, client, server)}
    to_redis = {(client, "redis") for client in ("dispatcher", "worker", "test")}
    assert reached == to_redis | {(client, "minio") for client in ("dispatcher", "aggregator", "explorer", "worker", "test")}


def test_pods_restart_when_their_settings_or_passwords_change():
    def annotations(values):
        return Rendered(values).get("Deployment", "-dispatcher")["spec"]["template"]["metadata"]["annotations"]

    first, same, other = (annotations({**IDENTITY, "workers.max": most}) for most in (1, 1, 2))
    assert first == same
    assert first["checksum/fleet"] != other["checksum/fleet"]
    assert first["checksum/secret"] == other["checksum/secret"]
    assert annotations({**IDENTITY, "externalRedis.url": "redis://b:6379/0"})["checksum/secret"] != first["checksum/secret"]


def relabelings(found_by: str) -> list[dict[str, Any]]:
    labels = {"service": "component", "release": "instance"}
    return [
        {"sourceLabels": [f"__meta_kubernetes_{found_by}_label_app_kubernetes_io_{source}"], "targetLabel": label}
        for label, source in labels.items()
    ]


def test_scraped_series_have_the_labels_service_and_release():
    chart = Rendered(MONITORING)
    service, pods = chart.get("ServiceMonitor", ""), chart.get("PodMonitor", "-worker")
    assert service["metadata"]["labels"]["release"] == "prometheus"
    [endpoint], [pod_endpoint] = service["spec"]["endpoints"], pods["spec"]["podMetricsEndpoints"]
    assert endpoint == {"port": "metrics", "interval": "15s", "relabelings": relabelings("service")}
    assert pod_endpoint == {"port": "metrics", "interval": "15s", "relabelings": relabelings("pod")}
    assert service["spec"]["selector"]["matchExpressions"][0]["values"] == ["dispatcher", "aggregator", "explorer"]
    assert pods["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"] == "worker"
    assert not {"ServiceMonitor", "PodMonitor", "PrometheusRule"} & {each["kind"] for each in Rendered({}).objects}


@pytest.mark.parametrize("policy", [{"networkPolicy.metricsFrom": [{"namespaceSelector": {}}]}, {"networkPolicy.enabled": False}])
def test_the_s3_server_is_scraped_only_by_allowed_clients(policy):
    chart = Rendered({**MONITORING, **policy})
    monitor = chart.get("ServiceMonitor", "")["spec"]
    endpoint = {"port": "s3", "path": "/minio/v2/metrics/cluster", "interval": "15s", "relabelings": relabelings("service")}
    assert monitor["endpoints"][1:] == [endpoint]
    assert "minio" in monitor["selector"]["matchExpressions"][0]["values"]
    assert "s3" in [port["name"] for port in chart.get("Service", "-minio")["spec"]["ports"]]
    assert chart.env("StatefulSet", "-minio")["MINIO_PROMETHEUS_AUTH_TYPE"] == "public"
    for rendered in (chart, Rendered(policy)):
        rules = [
            rule for each in rendered.of("NetworkPolicy") if each["metadata"]["name"].endswith("-minio") for rule in each["spec"]["ingress"]
        ]
        opened = [{"ports": [{"port": 9000}], "from": [{"namespaceSelector": {}}]}] if rendered is chart and rules else []
        assert rules[1:] == opened


def test_the_prometheus_rule_has_the_rules_file_and_links_to_the_runbook():
    text = (CHART / "files/rules.yaml").read_text()
    assert Rendered(MONITORING).get("PrometheusRule", "")["spec"] == yaml.safe_load(text)
    elsewhere = "https://git.example.com/runbook.md"
    rules = Rendered({**MONITORING, "monitoring.prometheusRule.runbook": elsewhere}).get("PrometheusRule", "")["spec"]
    urls = [rule["annotations"]["runbook_url"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule]
    assert urls
    assert all(url.startswith(f"{elsewhere}#memtail") for url in urls)


def test_dashboards_are_included_unchanged(tmp_path):
    boards = {name: text for each in Rendered(MONITORING).of("ConfigMap") for name, text in each["data"].items() if name.endswith(".json")}
    assert boards == {path.name: path.read_text() for path in (CHART / "files/dashboards").iterdir()}
    assert all(len(text) < 1 << 20 for text in boards.values())  # the maximum size of a ConfigMap
    chart = Path(shutil.copytree(CHART, tmp_path / "memtail"))
    shutil.rmtree(chart / "files/dashboards", ignore_errors=True)
    without = Rendered(MONITORING, chart)
    assert not [each for each in without.of("ConfigMap") if "dashboard" in each["metadata"]["name"]]
    (chart / "files/dashboards").mkdir(parents=True)
    for name in ("one.json", "Two_2.json"):
        (chart / "files/dashboards" / name).write_text('{"title": "{{ instance }}"}\n')
    maps = [each for each in Rendered(MONITORING, chart).of("ConfigMap") if "dashboard" in each["metadata"]["name"]]
    assert [each["metadata"]["name"] for each in maps] == [f"{RELEASE}-memtail-dashboard-{name}" for name in ("two-2", "one")]
    assert all(each["metadata"]["labels"]["grafana_dashboard"] == "1" for each in maps)
    assert json.loads(maps[1]["data"]["one.json"]) == {"title": "{{ instance }}"}


def test_images_have_the_registry_tag_and_digest_of_the_values():
    chart = Rendered(MATRIX["images"])
    dispatcher, worker = chart.get("Deployment", "-dispatcher")["spec"]["template"]["spec"], chart.worker()["spec"]
    assert dispatcher["containers"][0]["image"] == "r.example.com/memtail-control:2"
    assert worker["containers"][0]["image"] == f"r.example.com/memtail-worker@sha256:{'0' * 64}"
    assert all(pod["imagePullSecrets"] == [{"name": "pull"}] for _, pod in chart.pods())
    assert Rendered({}).worker()["spec"]["containers"][0]["image"] == "memtail-worker:0.2.0"
