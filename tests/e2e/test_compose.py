"""`docker compose up`, from a build to scores: run by `make e2e`."""

import html
import io
import json
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import yaml

from memtail.execution.embedded import run
from memtail.execution.progress import progress_of
from memtail.experiment_store import ExperimentStore
from memtail.scores.pointer import latest_version
from memtail.spec import Experiment
from memtail.storage import ObjectStore, keys
from memtail.storage.local import LocalStore
from tests.e2e.deployment import PROJECT, Deployment, build_images, docker, prepare_images, service_of

TRIALS, PER_SHARD, WORKERS = 600, 10, 2
# Packages whose versions determine the bits of the scores.
DECIDING = ["torch", "numba", "pyarrow", "scikit-learn"]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """examples/digits.yaml, with fewer trials."""
    declared = yaml.safe_load((PROJECT / "examples/digits.yaml").read_text())
    declared["subsets"]["trials"] = TRIALS
    declared["execution"] = {"trials_per_shard": PER_SHARD, "device": "cpu"}
    path = tmp_path_factory.mktemp("spec") / "digits.yaml"
    path.write_text(yaml.safe_dump(declared))
    path.parent.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example of a command, with fewer trials, in a folder below that of the training code; and a function that leaks memory."""
    folder = tmp_path_factory.mktemp("code")
    shutil.copytree(PROJECT / "examples/command", folder / "command")
    path = folder / "command/neighbours.yaml"
    declared = yaml.safe_load(path.read_text()) | {"subsets": {"trials": 24}, "execution": {"trials_per_shard": 6, "device": "cpu"}}
    path.write_text(yaml.safe_dump(declared))
    shutil.copy(PROJECT / "tests/support/hostile_trainer.py", folder)
    leaking = {"function": "hostile_trainer:train", "options": {"acts": {"7": "leak"}}}
    (folder / "leak.yaml").write_text(yaml.safe_dump({**declared, "name": "leak", "trainer": leaking}))
    folder.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def deployment(spec: Path, out: Path, code: Path) -> Iterator[Deployment]:
    """A system that trained all trials although one of its workers was killed."""
    prepare_images()
    deployment = Deployment(spec, out, WORKERS, code, memory="2g")
    print(f"\nimages built in {build_images():.0f} s")
    try:
        began = time.monotonic()
        deployment.up()
        store = deployment.store()
        experiment_store = ExperimentStore(store, "digits")

        def published() -> int:
            pointer = latest_version(store, "digits")
            return pointer.summary.trials if pointer else 0

        deployment.until(lambda: any(experiment_store.committed()), 600)
        docker("kill", deployment.containers("worker")[0]["Id"])
        print(f"first shard {time.monotonic() - began:.0f} s after docker compose up")
        assert len(list(experiment_store.committed())) < TRIALS / PER_SHARD, (
            "all shards were committed before the worker was killed: declare more trials"
        )
        deployment.until(published, 600)
        print(f"first scores {time.monotonic() - began:.0f} s after docker compose up")
        deployment.until(lambda: published() == TRIALS, 600)
        print(f"all {TRIALS} trials published {time.monotonic() - began:.0f} s after docker compose up")
        yield deployment
    finally:
        deployment.down()


def test_every_trial_is_committed_once_without_a_failure(deployment: Deployment) -> None:
    experiment_store = ExperimentStore(deployment.store(), "digits")
    trials = [trial for shard in experiment_store.committed() for trial in shard.trials]
    assert sorted(trials) == list(range(TRIALS))
    assert not list(experiment_store.failures())


def test_fetched_scores_equal_those_of_an_embedded_run(deployment: Deployment, spec: Path, out: Path, tmp_path: Path) -> None:
    deployment.compose("run", "--rm", "cli", "scores", "digits", "--fetch", "/out")
    run(Experiment.load(spec), tmp_path)
    pointer = latest_version(LocalStore(tmp_path), "digits")
    assert pointer
    expected = tmp_path / "experiments/digits/scores" / pointer.version / "memorization.parquet"
    fetched = out / "memorization.parquet"
    code = f"from importlib.metadata import version; print(*map(version, {DECIDING}))"
    same = docker("run", "--rm", "memtail-worker", "python", "-c", code).split() == [version(name) for name in DECIDING]
    if same:
        assert fetched.read_bytes() == expected.read_bytes()
    else:  # another version of torch may round differently, which changes a few outcomes
        here, there = (pyarrow.parquet.read_table(path).to_pydict() for path in (expected, fetched))
        assert here["k_in"] == there["k_in"]
        assert here["k_out"] == there["k_out"]
        assert np.abs(np.subtract(here["mem"], there["mem"])).mean() < 0.01
    print(f"\nmemorization.parquet compared {'to the bit' if same else 'within tolerance, since versions differ'}")


def test_the_explorer_shows_scores_and_images(deployment: Deployment) -> None:
    # the first request may end before the scores are read
    deployment.until(lambda: b"Reading the scores" not in _explored(deployment, ""), 60)
    assert b"1,438 training examples" in _explored(deployment, "")
    assert _explored(deployment, "/images/test/0.png").startswith(b"\x89PNG")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(deployment.address("explorer", 8080))


def test_a_study_is_trained_by_the_workers_and_shown_in_the_explorer(deployment: Deployment) -> None:
    def study(*arguments: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(deployment.compose("run", "--rm", "study", *arguments, "--json"))
        return answer

    removal = ("removal", "digits", "--theta", "0.25", "--repeats", "2", "--submit")
    submitted, store = study(*removal), deployment.store()
    assert submitted["trained"] is False
    deployment.until(lambda: progress_of(store, submitted["experiment"]).ending == "published", 600)
    results = [study(*removal), study("stability", "digits")]
    assert [result["trials"] for result in results] == [6, TRIALS]

    def page() -> str:
        return html.unescape(_explored(deployment, "/studies").decode())

    deployment.until(lambda: all(result["title"] in page() for result in results), 60)


def test_a_command_of_the_user_trains_in_the_workers_as_in_an_embedded_run(
    deployment: Deployment, code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = _submit(deployment, "/code/command/neighbours.yaml")
    deployment.until(lambda: progress_of(store, "neighbours").ending == "published", 300)
    assert progress_of(store, "neighbours").failed_attempts == 0
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))  # of the command's Python
    run(Experiment.load(code / "command/neighbours.yaml"), tmp_path)
    assert _memorization(store, "neighbours") == _memorization(LocalStore(tmp_path), "neighbours")


def test_user_code_that_uses_up_the_memory_of_its_container_costs_its_shard_and_no_worker(deployment: Deployment) -> None:
    workers = [each["Id"] for each in deployment.containers("worker") if each["State"]["Running"]]
    store = _submit(deployment, "/code/leak.yaml")
    deployment.until(lambda: progress_of(store, "leak").ending, 300)
    assert [shard.first for shard in progress_of(store, "leak").committed] == [0, 12, 18]
    failures = list(ExperimentStore(store, "leak").failures())
    assert [failure.shard.first for failure in failures] == [6] * 3
    assert {failure.error for failure in failures} == {"the trainer process was ended by SIGKILL: out of memory, or killed"}
    assert [each["Id"] for each in deployment.containers("worker") if each["State"]["Running"]] == workers


def test_all_containers_are_healthy_except_the_killed_worker(deployment: Deployment) -> None:
    deployment.until(lambda: "starting" not in _health(deployment), 120)
    health = _health(deployment)
    assert set(health) == {"healthy"}
    assert len(health) >= 5
    ended = {service_of(each): each["State"]["ExitCode"] for each in deployment.containers() if each["State"]["Status"] == "exited"}
    assert ended == {"passwords": 0, "bucket": 0, "submit": 0, "worker": 137}


def test_containers_run_without_root_on_a_read_only_file_system(deployment: Deployment) -> None:
    for container in deployment.containers():
        host, name = container["HostConfig"], container["Name"]
        assert container["Config"]["User"].partition(":")[0] not in ("", "0", "root"), name
        if container["State"]["Running"]:
            status = Path(f"/proc/{container['State']['Pid']}/status").read_text()
            assert "\nUid:\t0\t" not in status, name
            assert "\nCapEff:\t0000000000000000\n" in status, name
        assert host["ReadonlyRootfs"], name
        assert host["CapDrop"] == ["ALL"], name
        assert "no-new-privileges:true" in host["SecurityOpt"], name


def test_ports_are_published_on_the_loopback_interface_only(deployment: Deployment) -> None:
    bindings = [each for container in deployment.containers() for each in (container["HostConfig"]["PortBindings"] or {}).values()]
    assert bindings
    assert {binding["HostIp"] for each in bindings for binding in each} == {"127.0.0.1"}


def test_no_password_is_in_logs_or_in_the_description_of_containers(deployment: Deployment) -> None:
    seen = deployment.compose("--profile", "*", "logs") + json.dumps(deployment.containers())
    assert "published" in seen
    for meaning, password in deployment.passwords().items():
        assert password not in seen, meaning


def test_prometheus_scrapes_all_services_and_has_the_rules(deployment: Deployment) -> None:
    address = deployment.address("prometheus", 9090)

    def up() -> set[str]:
        with urllib.request.urlopen(f"{address}/api/v1/targets", timeout=10) as answer:
            targets = json.load(answer)["data"]["activeTargets"]
        return {target["labels"].get("service") for target in targets if target["health"] == "up"}

    deployment.until(lambda: {"dispatcher", "aggregator", "explorer", "worker", "minio"} <= up(), 60)
    with urllib.request.urlopen(f"{address}/api/v1/rules", timeout=10) as answer:
        assert json.load(answer)["data"]["groups"]


def test_an_image_built_on_the_workers_brings_code_and_packages(deployment: Deployment, tmp_path: Path) -> None:
    """Last, since it replaces the workers."""
    folder, image = tmp_path / "image", f"{deployment.project}-worker"
    shutil.copytree(PROJECT / "tests/fixtures/worker-image", folder)
    guide = (PROJECT / "docs/guides/worker-code.md").read_text()
    (folder / "Dockerfile").write_text(guide.partition("```dockerfile\n")[2].partition("```")[0])
    docker("build", "--quiet", "--tag", image, str(folder))
    try:
        deployment.replace_workers(image)
        store = _submit(deployment, "/opt/code/experiment.yaml")
        deployment.until(lambda: progress_of(store, "centroids").ending == "published", 300)
        assert progress_of(store, "centroids").failed_attempts == 0
    finally:
        deployment.compose("rm", "--stop", "--force", "worker", capture=False)
        docker("rmi", image)


def _submit(deployment: Deployment, path: str) -> ObjectStore:
    """Submit an experiment file of the container; returns the store."""
    deployment.compose("run", "--rm", "--no-deps", "submit", "memtail", "submit", path)
    return deployment.store()


def _memorization(store: ObjectStore, name: str) -> dict[str, list[Any]]:
    """Return the published table of an experiment."""
    pointer = latest_version(store, name)
    assert pointer
    data = store.get(keys.scores(name, pointer.version) + "memorization.parquet")
    table: dict[str, list[Any]] = pyarrow.parquet.read_table(io.BytesIO(data)).to_pydict()
    return table


def _explored(deployment: Deployment, path: str) -> bytes:
    """Return a page of the explorer about the experiment."""
    address = f"{deployment.address('explorer', 8080)}/experiments/digits{path}"
    request = urllib.request.Request(address, headers={"Authorization": f"Bearer {deployment.passwords()['token of the explorer']}"})
    with urllib.request.urlopen(request) as answer:
        content: bytes = answer.read()
        return content


def _health(deployment: Deployment) -> list[str]:
    """Return the health of all running containers with a health check."""
    running = (each["State"] for each in deployment.containers() if each["State"]["Running"])
    return [state["Health"]["Status"] for state in running if "Health" in state]
