"""Prometheus as compose starts it: its configuration, its rules, and what it finds at real services."""

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import urllib3
import yaml

from tests.integration.conftest import minio  # noqa: F401 - a fixture
from tests.integration.servers import MinioServer, free_port, server_binary
from tests.services.cluster import PROJECT, Cluster
from tests.services.conftest import cluster  # noqa: F401 - a fixture


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The configuration, in a folder with all that compose puts beside it."""
    for volume in yaml.safe_load((PROJECT / "docker-compose.yml").read_text())["services"]["prometheus"]["volumes"]:
        source, _, target = volume.partition(":")
        if target.startswith("/etc/prometheus/"):
            shutil.copy(PROJECT / source, tmp_path / Path(target.partition(":")[0]).name)
    return tmp_path / "prometheus.yml"


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run([server_binary("promtool"), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_configuration_is_valid(config: Path) -> None:
    promtool("check", "config", "--lint-fatal", config)


def test_each_alert_fires_when_it_is_to_and_at_no_other_time() -> None:
    promtool("test", "rules", PROJECT / "tests/monitoring/alerts.yaml")


@contextlib.contextmanager
def prometheus(config: Path, addresses: dict[str, str]) -> Iterator[Callable[..., Any]]:
    """A Prometheus that looks each second, at these addresses instead of compose's; gives what asks its API."""
    listen = f"127.0.0.1:{free_port()}"
    text = config.read_text()
    for place, value in {**addresses, "localhost:9090": listen, "15s": "1s"}.items():
        assert place in text
        text = text.replace(place, value)
    config.write_text(text)
    command = [server_binary("prometheus"), f"--config.file={config}", f"--storage.tsdb.path={config.parent / 'data'}"]
    http = urllib3.PoolManager(retries=urllib3.Retry(20, backoff_factor=0.1))
    with (config.parent / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={listen}"], stdout=log, stderr=log)
    try:
        yield lambda what, **fields: http.request("GET", f"http://{listen}/api/v1/{what}", fields=fields).json()["data"]
    finally:
        process.terminate()
        process.wait()


def test_real_services_are_found_under_their_names_and_all_rules_can_be_evaluated(
    cluster: Cluster,  # noqa: F811
    minio: MinioServer,  # noqa: F811
    config: Path,
) -> None:
    services = {name: cluster.start(name) for name in ("dispatcher", "aggregator")}
    addresses = {f"{name}:9100": f"127.0.0.1:{service.port}" for name, service in services.items()}
    with prometheus(config, {**addresses, "minio:9000": f"127.0.0.1:{minio.port}"}) as ask:

        def labels(query: str) -> list[dict[str, str]]:
            return [
                {name: value for name, value in each["metric"].items() if name in ("service", "release")}
                for each in ask("query", query=query)["result"]
            ]

        names = [{"service": name, "release": "memtail"} for name in ("aggregator", "dispatcher", "minio")]
        cluster.until(lambda: labels('sort_by_label(up{release!=""} == 1, "service")') == names)
        cluster.until(lambda: labels("release:memtail_store_free_per_size:ratio > 0") == [{"release": "memtail"}])
        of_aggregator = [{"service": "aggregator", "release": "memtail"}]
        assert labels('memtail_fold_seconds_bucket{le="+Inf"}') == labels("memtail_fold_seconds") == of_aggregator
        cluster.until(lambda: {rule["health"] for group in ask("rules")["groups"] for rule in group["rules"]} == {"ok"})
