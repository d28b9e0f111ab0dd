"""Renders the chart, and looks up objects in the manifests."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parents[2] / "helm" / "memtail"
RELEASE, NAMESPACE = "trial", "research"


def helm(*arguments: str, kubeconfig: str = "") -> "subprocess.CompletedProcess[str]":
    """Run helm."""
    options = ["--kubeconfig", kubeconfig] if kubeconfig else []
    return subprocess.run(["helm", *arguments, *options], capture_output=True, text=True, check=False)


def as_options(values: dict[str, Any]) -> list[str]:
    """Convert values (`{"workers.gpus": 1}`) to options of helm."""
    return [option for name, value in values.items() for option in ("--set-json", f"{name}={json.dumps(value)}")]


class Rendered:
    """Manifests rendered with some values."""

    def __init__(self, values: dict[str, Any], chart: Path = CHART) -> None:
        done = helm("template", RELEASE, str(chart), "--namespace", NAMESPACE, *as_options(values))
        assert done.returncode == 0, done.stderr
        self.text = done.stdout
        self.objects: list[dict[str, Any]] = [each for each in yaml.safe_load_all(self.text) if each]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [each for each in self.objects if each["kind"] == kind]

    def get(self, kind: str, name: str) -> dict[str, Any]:
        """Return an object by its name, without the release's prefix."""
        return next(each for each in self.of(kind) if each["metadata"]["name"] == f"{RELEASE}-memtail{name}")

    def env(self, kind: str, name: str) -> dict[str, str]:
        """Return the environment variables of the first container of an object."""
        return variables(self.get(kind, name)["spec"]["template"]["spec"])

    def fleet(self) -> dict[str, Any]:
        """Return the settings file of the fleet."""
        parsed: dict[str, Any] = yaml.safe_load(self.get("ConfigMap", "-fleet")["data"]["fleet.yaml"])
        return parsed

    def worker(self) -> dict[str, Any]:
        """Return the pod template of a worker, in any mode."""
        for kind, path in (("ConfigMap", []), ("Deployment", ["template"]), ("ScaledJob", ["jobTargetRef", "template"])):
            for each in self.of(kind):
                if kind == "ConfigMap" and "fleet.yaml" in each["data"]:
                    pod: dict[str, Any] = self.fleet()["job"]["spec"]["template"]
                    return pod
                if kind != "ConfigMap" and each["metadata"]["name"].endswith("-worker"):
                    pod = each["spec"]
                    for key in path:
                        pod = pod[key]
                    return pod
        raise AssertionError("no object starts workers")

    def pods(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Iterate over (component, spec) of all pods, including workers'."""
        for each in self.objects:
            if each["kind"] == "Pod":
                yield each["metadata"]["labels"]["app.kubernetes.io/component"], each["spec"]
            elif each["kind"] in ("Deployment", "StatefulSet", "DaemonSet"):
                pod = each["spec"]["template"]
                yield pod["metadata"]["labels"]["app.kubernetes.io/component"], pod["spec"]
        if not any(each["metadata"]["name"].endswith("-worker") for each in self.of("Deployment")):
            yield "worker", self.worker()["spec"]


def variables(pod: dict[str, Any]) -> dict[str, str]:
    """Return the environment variables of a pod's first container."""
    return {each["name"]: each.get("value", "") for each in pod["containers"][0].get("env", [])}
