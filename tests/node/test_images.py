"""Images that workers cannot start from, and an image with training code of the user's own."""

import json
import shutil
import uuid
from collections import Counter
from pathlib import Path

import yaml

from memtail.execution.submit import submit
from memtail.spec import Experiment
from tests.e2e.deployment import PROJECT, WORKER, docker
from tests.kubernetes.chart import CHART
from tests.node.release import Release, Training, files, name_of


def test_an_image_that_cannot_be_pulled_gives_a_notice_and_is_used_once_available(
    release: Release, embedded: dict[str, bytes], tmp_path: Path
) -> None:
    image = f"memtail.local/worker:{uuid.uuid4().hex}"
    release.helm("upgrade", "--wait", "--timeout", "5m", workers__limits__images=[image])
    training = release.submit("late-image", image=image)
    release.until(lambda: any("Image" in line for line in training.progress.notice_lines))
    assert not training.workers()
    docker("tag", WORKER, image)
    try:
        release.node.give(image)
    finally:
        docker("rmi", image)
    training.assert_complete(embedded, tmp_path)


def test_a_wrong_image_is_corrected_by_an_upgrade(release: Release, embedded: dict[str, bytes], tmp_path: Path) -> None:
    # first, so that no worker waits while the services are replaced
    release.helm("upgrade", "--wait", "--timeout", "5m", image__worker__tag="none", image__pullPolicy="Never")
    training = release.submit("wrong-image")
    release.until(lambda: any("ErrImageNeverPull" in line for line in training.progress.notice_lines))
    assert not training.workers()
    release.helm("upgrade", "--wait", "--timeout", "5m")
    training.assert_complete(embedded, tmp_path)


def test_an_image_that_fails_at_once_leaves_few_pods_and_gives_a_notice(
    release: Release, embedded: dict[str, bytes], tmp_path: Path
) -> None:
    """An image without Python, in Jobs with more workers than failed pods are kept."""
    redis = {key: value for key, value in yaml.safe_load((CHART / "values.yaml").read_text())["redis"]["image"].items() if value}
    release.helm("upgrade", "--wait", "--timeout", "5m", image__worker=redis, workers__max=20)
    training = release.submit("failing-image", max=12)
    seen: set[str] = set()

    def failed() -> Counter[str]:
        """Return the number of failed pods by Job."""
        selector = f"app.kubernetes.io/component=worker,memtail/experiment={training.name}"
        pods = release.node.get("pods", "--namespace", release.namespace, "--selector", selector)["items"]
        ended = [pod for pod in pods if pod["status"].get("phase") == "Failed"]
        seen.update(map(name_of, ended))
        return Counter(pod["metadata"]["labels"]["batch.kubernetes.io/job-name"] for pod in ended)

    release.until(lambda: failed() and len(seen) > 12)  # the first were replaced
    release.until(lambda: max(failed().values(), default=0) <= 10, 30)
    assert any("failed: exit code 127" in line for line in training.progress.notice_lines)
    release.helm("upgrade", "--wait", "--timeout", "5m")
    training.assert_complete(embedded, tmp_path)


def test_an_image_of_the_experiments_brings_its_command(release: Release, tmp_path: Path) -> None:
    image, code = f"memtail.local/command:{uuid.uuid4().hex}", tmp_path / "code"
    shutil.copytree(PROJECT / "examples/command", code)
    spec = code / "neighbours.yaml"
    execution = {"trials_per_shard": 6, "device": "cpu", "workers": {"max": 2, "image": image}}
    spec.write_text(yaml.safe_dump(yaml.safe_load(spec.read_text()) | {"subsets": {"trials": 24}, "execution": execution}))
    (code / "Dockerfile").write_text(f"FROM {WORKER}\nCOPY neighbours.* /opt/code/\nENV MEMTAIL_CODE=/opt/code\n")
    docker("build", "--quiet", "--tag", image, str(code))
    try:
        release.node.give(image)
        release.helm("upgrade", "--wait", "--timeout", "5m", workers__limits__images=[image])
        store = release.store()
        submit(Experiment.load(spec), store)
        training = Training(release, "neighbours", store)
        training.finish()
        assert training.progress.failed_attempts == 0
        results = tmp_path / "results"
        results.mkdir()
        results.chmod(0o777)
        volume = f"{results}:/run/memtail"
        docker("run", "--rm", "--volume", volume, image, "memtail", "run", "/opt/code/neighbours.yaml", "--store", "/run/memtail/store")
    finally:
        docker("rmi", image)
    scores = results / "store/experiments/neighbours/scores"
    embedded = files(scores / json.loads((scores / "latest.json").read_text())["version"])
    published = training.scores(tmp_path / "published")
    assert published.keys() == embedded.keys()
    assert {name for name in published if published[name] != embedded[name]} <= {"summary.json"}
