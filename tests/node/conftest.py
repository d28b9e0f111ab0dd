"""Session-scoped node, and a release that all tests share."""

import json
from collections.abc import Iterator

import pytest
import yaml

from tests.e2e.deployment import CONTROL, WORKER, build_images, docker, prepare_images
from tests.kubernetes.chart import CHART
from tests.kubernetes.conftest import install_tools
from tests.node.release import VERSION, RealNode, Release, declaration, files


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealNode]:
    """A node with all images."""
    install_tools("helm")
    prepare_images()
    print(f"\nimages built in {build_images():.0f} s")
    for image in (CONTROL, WORKER):
        docker("tag", image, f"{image}:{VERSION}")
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    others = [f"{values[server]['image']['repository']}:{values[server]['image']['tag']}" for server in ("redis", "minio")]
    node = RealNode(tmp_path_factory.mktemp("node") / "state")
    try:
        node.start()
        node.give(f"{CONTROL}:{VERSION}", f"{WORKER}:{VERSION}", *others)
        yield node
    finally:
        node.stop()


@pytest.fixture(scope="session")
def release(node: RealNode) -> Release:
    release = Release(node, node.namespace("memtail"))
    release.helm("install", "--wait", "--timeout", "5m")
    return release


@pytest.fixture(scope="session")
def embedded(node: RealNode, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Score files of an embedded run in the worker image."""
    folder = tmp_path_factory.mktemp("embedded")
    folder.chmod(0o777)
    (folder / "spec.yaml").write_text(yaml.safe_dump(declaration("untroubled")))
    docker(
        "run",
        "--rm",
        "--volume",
        f"{folder}:/run/memtail",
        WORKER,
        "memtail",
        "run",
        "/run/memtail/spec.yaml",
        "--store",
        "/run/memtail/store",
    )
    scores = folder / "store/experiments/untroubled/scores"
    return files(scores / json.loads((scores / "latest.json").read_text())["version"])
