"""The chart on a real API server with Pod Security and simulated nodes, on which containers do not execute."""

import copy
import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.dispatcher.worker_jobs import Demand, FleetSettings, build_job
from tests.kubernetes.chart import CHART, as_options, helm
from tests.kubernetes.conftest import Kubernetes, install_tools

RELEASE = "trial"
CHART_0_1_0 = Path(__file__).parents[1] / "fixtures" / "chart-0.1.0.tgz"
# The control plane has no volume provisioner: each namespace gets one volume in a separate storage class.
VOLUME = """
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {{name: {name}}}
provisioner: kubernetes.io/no-provisioner
---
apiVersion: v1
kind: PersistentVolume
metadata: {{name: {name}}}
spec:
  storageClassName: {name}
  capacity: {{storage: 50Gi}}
  accessModes: [ReadWriteOnce]
  hostPath: {{path: /nowhere}}
"""


@dataclass(frozen=True)
class Namespace:
    """A namespace with the Pod Security level "restricted"."""

    kubernetes: Kubernetes
    name: str

    def helm(self, *arguments: str, **values: Any) -> str:
        """Run helm in the namespace; fails on errors and warnings."""
        options = as_options({"minio.storageClass": self.name, **values}) if arguments[0] in ("install", "upgrade") else []
        done = helm(*arguments, *options, "--namespace", self.name, kubeconfig=self.kubernetes.kubeconfig)
        assert done.returncode == 0, done.stderr
        assert "warning" not in (done.stdout + done.stderr).lower(), done.stderr
        return done.stdout

    def get(self, kind: str) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = json.loads(self.kubernetes.kubectl("get", kind, "--namespace", self.name, "--output", "json"))[
            "items"
        ]
        return items

    def components(self) -> list[str]:
        """Return the components of all running pods."""
        pods = self.get("pods")
        return sorted(pod["metadata"]["labels"]["app.kubernetes.io/component"] for pod in pods if pod["status"].get("phase") == "Running")

    def contents(self) -> set[str]:
        """Return the names of all objects except events and pod metrics."""
        resources = self.kubernetes.kubectl("api-resources", "--namespaced", "--verbs=list", "--output=name").split()
        kinds = ",".join(kind for kind in resources if not kind.startswith(("events", "podmetrics", "pods.metrics")))
        return set(self.kubernetes.kubectl("get", kinds, "--namespace", self.name, "--output", "name", "--ignore-not-found").split())

    def may(self, account: str, action: str) -> bool:
        """Return whether a service account may do something, asked with its token."""
        kubeconfig = Path(self.kubernetes.kubeconfig).parent / f"{self.name}-{account}"
        if not kubeconfig.exists():
            self.kubernetes.kubeconfig_of(self.name, account, kubeconfig)
        command = ["kubectl", "--kubeconfig", str(kubeconfig), "auth", "can-i", *action.split()]
        answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
        assert answer
        assert answer[0] in ("yes", "no")
        return answer[0] == "yes"


@pytest.fixture
def namespace(kubernetes: Kubernetes) -> Iterator[Namespace]:
    install_tools("helm")
    if not json.loads(kubernetes.kubectl("get", "nodes", "--output", "json"))["items"]:
        kubernetes.nodes(2)
    name = kubernetes.namespace("chart")
    kubernetes.kubectl("apply", "--filename", "-", stdin=VOLUME.format(name=name))
    # a pod without a matching volume may not be retried for minutes
    kubernetes.kubectl("wait", "--for=jsonpath={.status.phase}=Available", f"persistentvolume/{name}", "--timeout=60s")
    yield Namespace(kubernetes, name)
    kubernetes.kubectl("delete", "namespace", name, "--wait=false")
    kubernetes.kubectl("delete", "persistentvolume,storageclass", name, "--wait=false")


def test_a_release_is_installed_upgraded_and_uninstalled_leaving_only_the_bucket(namespace: Namespace) -> None:
    before = namespace.contents()
    namespace.helm("install", RELEASE, str(CHART), "--wait", "--timeout", "2m")
    assert namespace.components() == ["aggregator", "dispatcher", "explorer", "minio", "redis"]
    [secret] = [each for each in namespace.get("secrets") if each["metadata"]["name"] == f"{RELEASE}-memtail"]
    pods = {pod["metadata"]["uid"] for pod in namespace.get("pods")}
    namespace.helm("upgrade", RELEASE, str(CHART), "--wait", "--timeout", "2m")
    assert {pod["metadata"]["uid"] for pod in namespace.get("pods")} == pods
    namespace.helm("upgrade", RELEASE, str(CHART), "--wait", "--timeout", "2m", **{"workers.max": 7})
    [kept] = [each for each in namespace.get("secrets") if each["metadata"]["name"] == f"{RELEASE}-memtail"]
    assert kept["data"] == secret["data"]
    assert len(set(secret["data"].values())) == len(secret["data"])
    namespace.kubernetes.wait(lambda: namespace.components() == ["aggregator", "dispatcher", "explorer", "minio", "redis"])
    renewed = [pod for pod in namespace.get("pods") if pod["metadata"]["uid"] not in pods]
    assert [pod["metadata"]["labels"]["app.kubernetes.io/component"] for pod in renewed] == ["dispatcher"]
    namespace.helm("uninstall", RELEASE, "--wait")
    namespace.kubernetes.wait(lambda: namespace.contents() - before == {f"persistentvolumeclaim/data-{RELEASE}-memtail-minio-0"})
    namespace.helm("install", RELEASE, str(CHART), "--wait", "--timeout", "2m")


def test_a_release_of_0_1_0_is_upgraded_and_keeps_its_values(namespace: Namespace) -> None:
    namespace.helm("install", RELEASE, str(CHART_0_1_0), **{"workers.max": 7})
    arguments = ("upgrade", RELEASE, str(CHART), "--namespace", namespace.name)
    refused = helm(*arguments, "--reuse-values", kubeconfig=namespace.kubernetes.kubeconfig)
    assert refused.returncode != 0
    assert "lack keys of this one: use --reset-then-reuse-values" in refused.stderr
    namespace.helm("upgrade", RELEASE, str(CHART), "--reset-then-reuse-values", "--wait", "--timeout", "2m")
    assert namespace.components() == ["aggregator", "dispatcher", "explorer", "minio", "redis"]
    [fleet] = [each for each in namespace.get("configmaps") if each["metadata"]["name"] == f"{RELEASE}-memtail-fleet"]
    assert yaml.safe_load(fleet["data"]["fleet.yaml"])["maxWorkers"] == 7
    strategies = {each["metadata"]["name"]: each["spec"]["strategy"] for each in namespace.get("deployments")}
    for component in ("dispatcher", "aggregator"):
        rolling = {"maxSurge": 0, "maxUnavailable": 1}
        assert strategies[f"{RELEASE}-memtail-{component}"] == {"type": "RollingUpdate", "rollingUpdate": rolling}


def test_the_dispatchers_jobs_are_admitted_run_and_are_deleted_with_the_release(namespace: Namespace, tmp_path: Path) -> None:
    namespace.helm("install", RELEASE, str(CHART), "--wait", "--timeout", "2m")
    [fleet] = [each for each in namespace.get("configmaps") if each["metadata"]["name"] == f"{RELEASE}-memtail-fleet"]
    (tmp_path / "fleet.yaml").write_text(fleet["data"]["fleet.yaml"])
    settings = FleetSettings.load(str(tmp_path / "fleet.yaml"))
    [deployment] = [each for each in namespace.get("deployments") if each["metadata"]["name"] == settings.owner]
    owner = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "name": settings.owner,
        "uid": deployment["metadata"]["uid"],
        "controller": True,
    }
    account = tmp_path / "dispatcher"
    namespace.kubernetes.kubeconfig_of(namespace.name, settings.owner, account)
    job = build_job(settings, Demand("digits", "running", 0, 9), 1, 2, owner)
    command = ["kubectl", "--kubeconfig", str(account), "create", "--filename", "-"]
    done = subprocess.run(command, input=yaml.safe_dump(job), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    namespace.kubernetes.wait(lambda: namespace.components().count("worker") == 2)
    namespace.helm("uninstall", RELEASE, "--wait")
    namespace.kubernetes.wait(lambda: not namespace.get("jobs") and not namespace.get("pods"))


def test_fixed_workers_and_other_stores_are_admitted_too(namespace: Namespace) -> None:
    values = {
        "redis.enabled": False,
        "externalRedis.existingSecret": "their-redis",
        "minio.enabled": False,
        "externalS3": {"bucket": "theirs", "existingSecret": "their-keys"},
        "workers.mode": "deployment",
        "workers.replicas": 3,
    }
    namespace.helm("install", RELEASE, str(CHART), "--wait", "--timeout", "2m", **values)
    assert namespace.components() == ["aggregator", "dispatcher", "explorer", "worker", "worker", "worker"]


def test_the_dispatcher_has_only_the_rights_it_needs(namespace: Namespace) -> None:
    namespace.helm("install", RELEASE, str(CHART))
    dispatcher = f"{RELEASE}-memtail-dispatcher"
    allowed = {
        *(f"{verb} jobs.batch" for verb in ("get", "list", "watch", "create", "patch", "delete")),
        *(f"{verb} pods" for verb in ("get", "list", "watch", "delete")),
        *(f"{verb} events" for verb in ("create", "patch")),
        f"get deployments.apps/{dispatcher}",
    }
    verbs = ("get", "list", "watch", "create", "update", "patch", "delete", "deletecollection")
    resources = (
        "jobs.batch",
        "pods",
        "pods --subresource=exec",
        "events",
        "deployments.apps",
        f"deployments.apps/{dispatcher}",
        "secrets",
        "configmaps",
        "serviceaccounts --subresource=token",
        "roles.rbac.authorization.k8s.io",
        "cronjobs.batch",
        "nodes",
    )
    questions = {f"{verb} {resource}" for verb in verbs for resource in resources}
    assert allowed < questions
    assert {question for question in questions if namespace.may(dispatcher, question)} == allowed
    assert not namespace.may(dispatcher, "list jobs.batch --namespace default")
    others = {question for question in allowed if namespace.may(f"{RELEASE}-memtail", question)}
    assert not others


@pytest.mark.parametrize(("exit_code", "word"), [("0", "Succeeded"), ("1", "Failed")])
def test_helm_test_reports_the_result_of_the_doctor(namespace: Namespace, exit_code: str, word: str) -> None:
    namespace.helm("install", RELEASE, str(CHART), "--wait", "--timeout", "2m")
    command = ["helm", "test", RELEASE, "--namespace", namespace.name, "--kubeconfig", namespace.kubernetes.kubeconfig, "--timeout", "1m"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as testing:
        namespace.kubernetes.wait(lambda: "test" in namespace.components())
        annotation = f"memtail-test/exit-code={exit_code}"
        namespace.kubernetes.kubectl("annotate", "pod", f"{RELEASE}-memtail-test", annotation, "--namespace", namespace.name)
        output = testing.communicate(timeout=60)[0]
    assert f"Phase:          {word}" in output, output
    assert testing.returncode == int(exit_code), output


# A release named like the chart, whose objects have no suffix, with external servers and Secrets of the user's.
_EXTERNAL = {
    "redis.enabled": False,
    "externalRedis.existingSecret": "theirs",
    "minio.enabled": False,
    "externalS3.bucket": "b",
    "externalS3.existingSecret": "theirs",
    "externalS3.componentSecrets": {"worker": "workers"},
    "workers.cache": {"type": "claim", "claim": "datasets"},
    "workers.extraEnv": [{"name": "TRACKER", "valueFrom": {"secretKeyRef": {"name": "tracker", "key": "word"}}}],
    "workers.extraEnvFrom": [{"secretRef": {"name": "proxy"}}],
    "workers.extraVolumes": [{"name": "more", "secret": {"secretName": "licence"}}],
}


@pytest.mark.parametrize(("release", "values"), [(RELEASE, {}), ("memtail", _EXTERNAL)], ids=["bundled", "external"])
def test_the_admission_policy_bounds_the_jobs_of_the_dispatcher(namespace: Namespace, tmp_path: Path, release: str, values: Any) -> None:
    namespace.helm("install", release, str(CHART), **values, **{"admissionPolicy.enabled": True})
    name = release if release == "memtail" else f"{release}-memtail"
    kubeconfig = namespace.kubernetes.kubeconfig_of(namespace.name, f"{name}-dispatcher", tmp_path / "kubeconfig")
    [fleet] = [each for each in namespace.get("configmaps") if each["metadata"]["name"].endswith("-fleet")]
    (tmp_path / "fleet.yaml").write_text(fleet["data"]["fleet.yaml"])
    job = build_job(FleetSettings.load(str(tmp_path / "fleet.yaml")), Demand("a", "running", 0, 1), 1, 1, {})
    del job["metadata"]["ownerReferences"]

    def create(changed: dict[str, Any]) -> str:
        command = ["kubectl", "--kubeconfig", str(kubeconfig), "create", "--dry-run=server", "--filename", "-"]
        return subprocess.run(command, input=json.dumps(changed), capture_output=True, text=True, check=False).stderr

    def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """Return the Job after a change of its pod template."""
        other: dict[str, Any] = copy.deepcopy(job)
        change(other["spec"]["template"])
        return other

    def mounting(volume: dict[str, Any]) -> dict[str, Any]:
        return changed(lambda template: template["spec"]["volumes"].append({"name": "other", **volume}))

    def with_variables(key: str, entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield Jobs with an entry of `env` or `envFrom` in the container, and in an init container."""
        yield changed(lambda template: template["spec"]["containers"][0].setdefault(key, []).append(entry))
        init = {"name": "init", "image": "a", "securityContext": job["spec"]["template"]["spec"]["containers"][0]["securityContext"]}
        yield changed(lambda template: template["spec"].update(initContainers=[{**init, key: [entry]}]))

    secret_key = {"name": "K", "valueFrom": {"secretKeyRef": {"name": name, "key": "s3-secret-key"}}}
    account = changed(lambda template: template["spec"].update(serviceAccountName=f"{name}-aggregator"))
    namespace.kubernetes.wait(lambda: "service account of workers" in create(account), 60)  # a policy takes effect after a moment
    no_account = changed(lambda template: template["spec"].pop("serviceAccountName"))
    assert "service account of workers" in create(no_account)
    component = {"app.kubernetes.io/component": "explorer"}
    assert "label of workers" in create(changed(lambda template: template["metadata"]["labels"].update(component)))
    for refused in (*with_variables("env", secret_key), *with_variables("envFrom", {"secretRef": {"name": name}})):
        assert "no keys of Secrets in variables" in create(refused)
    for volume in (
        {"secret": {"secretName": name}},
        {"projected": {"sources": [{"secret": {"name": name}}]}},
        {"projected": {"sources": [{"secret": {"name": name, "items": [{"key": "s3-secret-key", "path": "k"}]}}]}},
        {"persistentVolumeClaim": {"claimName": f"data-{name}-minio-0"}},
        {"csi": {"driver": "secrets-store.csi.k8s.io", "readOnly": True}},
    ):
        assert "workers mount no other" in create(mounting(volume)), volume
    assert create(job) == ""
    assert create(mounting({"emptyDir": {}})) == ""
    namespace.helm("uninstall", release)
