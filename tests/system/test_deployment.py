"""What a deployment on one machine needs beside the services: passwords, a bucket, and signs of life."""

import json
import os
import runpy
import stat
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from memtail.storage.s3 import S3Store
from services.tools import healthcheck as healthy
from services.tools import make_passwords as passwords
from tests.support.cluster import PROJECT, LivingCluster
from tests.support.servers import REGION, MinioServer


def mounted(service: dict[str, Any]) -> dict[str, Path]:
    """The files and folders of this project that a service of docker-compose.yml sees, by their paths in its container."""
    entries = [entry.split(":") for entry in service["volumes"] if entry.startswith("./")]
    assert all(mode == "ro" for *_, mode in entries)
    return {target: PROJECT / source for source, target, _ in entries}


def test_prometheus_and_grafana_find_in_their_containers_what_they_are_told_to_read() -> None:
    services = yaml.safe_load((PROJECT / "docker-compose.yml").read_text())["services"]
    prometheus, grafana = mounted(services["prometheus"]), mounted(services["grafana"])
    config = yaml.safe_load(prometheus["/etc/prometheus/prometheus.yml"].read_text())
    for file in config["rule_files"]:
        assert yaml.safe_load(prometheus[f"/etc/prometheus/{file}"].read_text())["groups"]

    provisioning = "/etc/grafana/provisioning"
    (source,) = yaml.safe_load(grafana[f"{provisioning}/datasources/memtail.yml"].read_text())["datasources"]
    assert source["type"] == "prometheus"
    assert source["url"] == "http://prometheus:9090"
    assert source["isDefault"]
    (provider,) = yaml.safe_load(grafana[f"{provisioning}/dashboards/memtail.yml"].read_text())["providers"]
    dashboards = grafana[provider["options"]["path"]]
    titles = {f"{provider['options']['path']}/{path.name}": json.loads(path.read_text())["title"] for path in dashboards.iterdir()}
    assert titles[services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]] == "memtail: Experiment"
    assert len(titles) == 3
    for path in (*prometheus.values(), *grafana.values(), *dashboards.iterdir()):
        wanted = 0o005 if path.is_dir() else 0o004  # their users are none of this machine's
        assert path.stat().st_mode & wanted == wanted, path


def test_passwords_are_made_once_and_only_their_group_may_read_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    passwords.make(tmp_path)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    passwords.make(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == made
    assert len({made[name] for name in passwords.PASSWORDS}) == len(passwords.PASSWORDS)
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o440 for path in tmp_path.iterdir())
    assert made["redis"] in made["redis.conf"]
    assert made["redis"] in made["broker"]
    passwords.show(tmp_path)
    assert made["grafana"] in capsys.readouterr().out


def test_a_password_whose_file_is_removed_is_made_anew(tmp_path: Path) -> None:
    passwords.make(tmp_path)
    before = (tmp_path / "redis").read_text()
    (tmp_path / "redis").unlink()
    passwords.make(tmp_path)
    assert (tmp_path / "redis").read_text() != before
    assert before not in (tmp_path / "broker").read_text() + (tmp_path / "redis.conf").read_text()


def test_a_bucket_is_made_unless_it_is_there(minio: MinioServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in minio.environment().items():
        monkeypatch.setenv(name, value)
    for module, hook in ((sys, "excepthook"), (sys, "unraisablehook"), (threading, "excepthook")):
        monkeypatch.setattr(module, hook, getattr(module, hook))  # which a service takes for itself
    monkeypatch.setenv("MEMTAIL_STORE", "s3://made-by-test/prefix")
    monkeypatch.setenv("MEMTAIL_S3_REGION", REGION)
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("services.tools.make_bucket", run_name="__main__")
        assert not ended.value.code
    S3Store("made-by-test", settings=minio.settings()).verify_contract()


def test_a_heartbeat_file_is_healthy_while_it_is_young(tmp_path: Path) -> None:
    file = tmp_path / "heartbeat"
    assert "heartbeat" in (healthy.main(str(file)) or "")
    file.touch()
    assert healthy.main(str(file)) is None
    long_ago = time.time() - 2 * healthy.PATIENCE
    os.utime(file, (long_ago, long_ago))
    assert "no beat" in (healthy.main(str(file)) or "")


def test_a_service_is_healthy_while_it_says_so(living: LivingCluster) -> None:
    (dispatcher,) = living.kinds("dispatcher")
    url = f"http://127.0.0.1:{dispatcher.port}/healthz"
    living.until(lambda: healthy.main(url) is None)
    dispatcher.kill()
    assert url in (healthy.main(url) or "")


def test_a_worker_beats_before_and_after_redis_goes_away(living: LivingCluster, tmp_path: Path) -> None:
    file = tmp_path / "heartbeat"
    worker = living.start("worker", MEMTAIL_HEARTBEAT_FILE=str(file))
    for happens in (lambda: None, living.redis.kill, living.redis.start):
        happens()
        file.unlink(missing_ok=True)
        living.until(file.exists)
    assert worker.process.poll() is None
