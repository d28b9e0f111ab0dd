"""Renders the chart, and finds what is in it."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parents[2] / "helm" / "memtail"
RELEASE, NAMESPACE = "trial", "research"


def helm(*arguments: str, kubeconfig: str = "") -> "subprocess.CompletedProcess[str]":
    """What helm says."""
    options = ["--kubeconfig", kubeconfig] if kubeconfig else []
    return subprocess.run(["helm", *arguments, *options], capture_output=True, text=True, check=False)


def as_options(values: dict[str, Any]) -> list[str]:
    """Values (`{"workers.gpus": 1}`) as options of helm."""
    return [option for name, value in values.items() for option in ("--set-json", f"{name}={json.dumps(value)}")]


class Rendered:
    """The manifests that come of some values."""

    def __init__(self, values: dict[str, Any], chart: Path = CHART) -> None:
        done = helm("template", RELEASE, str(chart), "--namespace", NAMESPACE, *as_options(values))
        assert done.returncode == 0, done.stderr
        self.text = done.stdout
        self.objects: list[dict[str, Any]] = [each for each in yaml.safe_load_all(self.text) if each]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [each for each in self.objects if each["kind"] == kind]

    def get(self, kind: str, name: str) -> dict[str, Any]:
        """The object of a name, without the release's before it."""
        return next(each for each in self.of(kind) if each["metadata"]["name"] == f"{RELEASE}-memtail{name}")

    def env(self, kind: str, name: str) -> dict[str, str]:
        """The variables of its first container."""
        return variables(self.get(kind, name)["spec"]["template"]["spec"])

    def fleet(self) -> dict[str, Any]:
        """The file that the dispatcher makes workers from."""
        parsed: dict[str, Any] = yaml.safe_load(self.get("ConfigMap", "-fleet")["data"]["fleet.yaml"])
        return parsed

    def worker(self) -> dict[str, Any]:
        """A worker's pod, whoever makes it."""
        for kind, path in (("ConfigMap", []), ("Deployment", ["template"]), ("ScaledJob", ["jobTargetRef", "template"])):
            for found in self.of(kind):
                if kind == "ConfigMap" and "fleet.yaml" in found["data"]:
                    pod: dict[str, Any] = self.fleet()["job"]["spec"]["template"]
                    return pod
                if kind != "ConfigMap" and found["metadata"]["name"].endswith("-worker"):
                    pod = found["spec"]
                    for key in path:
                        pod = pod[key]
                    return pod
        raise AssertionError("nobody makes workers")

    def pods(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(component, spec) of all pods that come of it."""
        for each in self.objects:
            if each["kind"] == "Pod":
                yield each["metadata"]["labels"]["app.kubernetes.io/component"], each["spec"]
            elif each["kind"] in ("Deployment", "StatefulSet"):
                pod = each["spec"]["template"]
                yield pod["metadata"]["labels"]["app.kubernetes.io/component"], pod["spec"]
        if not any(each["metadata"]["name"].endswith("-worker") for each in self.of("Deployment")):
            yield "worker", self.worker()["spec"]


def variables(pod: dict[str, Any]) -> dict[str, str]:
    """The variables of a pod's first container."""
    return {each["name"]: each["value"] for each in pod["containers"][0].get("env", [])}
