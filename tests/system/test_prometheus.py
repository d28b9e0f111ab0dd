"""Prometheus with the configuration of compose: configuration, rules, and scraping of real services."""

import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests.support.cluster import PROJECT, Cluster
from tests.support.prometheus import PrometheusServer
from tests.support.servers import MinioServer, server_binary


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Configuration file, in a folder with the files that compose mounts beside it."""
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


def test_alerts_fire_exactly_as_their_test_cases_say() -> None:
    promtool("test", "rules", PROJECT / "tests/support/alerts.yaml")


def test_real_services_are_scraped_under_their_names_and_all_rules_are_evaluated(
    cluster: Cluster, minio: MinioServer, tmp_path: Path
) -> None:
    services = [cluster.start(name) for name in ("dispatcher", "aggregator", "worker")]
    with PrometheusServer(tmp_path, services, minio) as prometheus:

        def targets(query: str) -> set[tuple[str, str]]:
            return {(each["metric"]["release"], each["metric"]["service"]) for each in prometheus.at(time.time(), query)}

        names = {("memtail", name) for name in ("dispatcher", "aggregator", "worker", "minio")}
        cluster.until(lambda: targets('up{release!=""} == 1') == names)
        looping = {("memtail", "dispatcher"), ("memtail", "aggregator")}
        cluster.until(lambda: targets('memtail_pass_seconds_bucket{le="+Inf"}') >= looping)  # classic histogram
        cluster.until(lambda: targets("histogram_count(memtail_pass_seconds)") >= looping)  # native histogram
        cluster.until(lambda: {rule["health"] for group in prometheus.get("rules")["groups"] for rule in group["rules"]} == {"ok"})
