"""Deployment tools: passwords, creation of the bucket, health checks; and the files that compose mounts."""

import json
import os
import runpy
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from memtail.storage.s3 import S3Store
from services.tools import healthcheck, make_passwords
from tests.support.cluster import PROJECT, LivingCluster
from tests.support.servers import REGION, MinioServer


def mounted(service: dict[str, Any]) -> dict[str, Path]:
    """Files and folders of the project that docker-compose.yml mounts into a service, by their paths in its container."""
    entries = [entry.split(":") for entry in service["volumes"] if entry.startswith("./")]
    assert all(mode == "ro" for *_, mode in entries)
    return {target: PROJECT / source for source, target, _ in entries}


def test_the_configurations_of_prometheus_and_grafana_name_mounted_files() -> None:
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
        readable = 0o005 if path.is_dir() else 0o004  # for the images' users, which do not exist on this machine
        assert path.stat().st_mode & readable == readable, path


def test_passwords_are_generated_once_and_readable_only_by_owner_and_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, services = tmp_path / "all", tmp_path / "services"
    folder.mkdir()
    make_passwords.make(folder, services)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    contents = {path: path.read_text() for path in files}
    make_passwords.make(folder, services)
    assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == contents
    generated = {path.name: contents[path] for path in folder.iterdir()}
    assert len(set(generated.values())) == len(generated)
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o440 for path in files)
    make_passwords.show(folder)
    assert generated["grafana"] in capsys.readouterr().out


def test_a_password_is_regenerated_after_its_file_is_deleted(tmp_path: Path) -> None:
    make_passwords.make(tmp_path, tmp_path / "services")
    before = (tmp_path / "redis-worker").read_text()
    (tmp_path / "redis-worker").unlink()
    make_passwords.make(tmp_path, tmp_path / "services")
    after = (tmp_path / "redis-worker").read_text()
    assert after != before
    for file in ("worker/broker", "redis/redis.conf"):
        text = (tmp_path / "services" / file).read_text()
        assert after in text
        assert before not in text


def test_the_call_of_0_1_0_makes_the_files_that_its_services_read(tmp_path: Path) -> None:
    def call(module: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([sys.executable, "-m", module, *arguments], cwd=PROJECT, capture_output=True, text=True, check=False)

    assert call("services.passwords", str(tmp_path)).returncode == 0
    password = (tmp_path / "redis").read_text()
    assert f"requirepass {password}\n" in (tmp_path / "redis.conf").read_text()
    assert (tmp_path / "broker").read_text() == f"redis://:{password}@redis:6379/0"
    assert call("services.passwords", str(tmp_path)).returncode == 0
    assert (tmp_path / "redis").read_text() == password
    assert password in call("services.passwords", str(tmp_path), "--show").stdout
    for arguments in ((), (str(tmp_path),)):
        refused = call("services.tools.make_passwords", *arguments)
        assert (refused.returncode, refused.stderr) == (2, "usage: python -m services.tools.make_passwords FOLDER SERVICES|--show\n")
    assert call("services.passwords").stderr.startswith("usage: ")


def test_no_other_service_of_compose_loads_what_workers_or_the_explorer_cached() -> None:
    """Compiled code is loaded from the cache, so a shared one would carry code into a component with other rights."""
    composed = yaml.safe_load((PROJECT / "docker-compose.yml").read_text())["services"]
    caches = {
        name: {entry.split(":")[0] for entry in service.get("volumes", []) if isinstance(entry, str) and ":/var/cache/memtail" in entry}
        for name, service in composed.items()
    }
    for groups in ({"explorer"}, {"worker", "worker-gpu"}):
        others = set().union(*(cache for name, cache in caches.items() if name not in groups))
        assert all(caches[name] and not caches[name] & others for name in groups), groups


def test_compose_mounts_training_code_read_only_where_it_is_searched() -> None:
    composed = yaml.safe_load((PROJECT / "docker-compose.yml").read_text())["services"]
    mounts = {
        name: entry
        for name, service in composed.items()
        for entry in service.get("volumes", [])
        if isinstance(entry, dict) and "CODE_FOLDER" in entry["source"]
    }
    assert mounts.keys() == {"worker", "worker-gpu", "submit", "study"}
    for name, mount in mounts.items():
        assert mount["read_only"], name
        assert composed[name]["environment"]["MEMTAIL_CODE"] == mount["target"], name
        assert composed[name]["image"] == "${WORKER_IMAGE:-memtail-worker}", name


def test_a_service_has_the_passwords_that_it_needs_and_no_others(tmp_path: Path) -> None:
    make_passwords.make(tmp_path, tmp_path / "services")
    password = {path.read_text(): path.name for path in tmp_path.iterdir() if path.is_file()}
    held: dict[str, set[str]] = {}
    for path in (tmp_path / "services").glob("*/*"):
        text = path.read_text()
        held.setdefault(path.parent.name, set()).update(name for secret, name in password.items() if secret in text)
    assert held == {
        "worker": {"s3-secret-key-worker", "redis-worker"},
        "dispatcher": {"s3-secret-key-dispatcher", "redis-dispatcher"},
        "aggregator": {"s3-secret-key-aggregator"},
        "explorer": {"s3-secret-key-explorer", "explorer"},
        "client": {"s3-secret-key-client", "redis-dispatcher"},
        "minio": {"s3-access-key", "s3-secret-key"},
        "redis": {"redis", "redis-worker", "redis-dispatcher"},
        "grafana": {"grafana"},
    }
    composed = yaml.safe_load((PROJECT / "docker-compose.yml").read_text())["services"]
    volumes = {name: [entry for entry in service.get("volumes", []) if isinstance(entry, str)] for name, service in composed.items()}
    whole = {name for name, entries in volumes.items() if any(entry.startswith("passwords:") for entry in entries)}
    assert whole == {"passwords", "bucket"}
    mounted_by = {name: [entry.split(":")[0] for entry in entries if entry.startswith("keys-")] for name, entries in volumes.items()}
    clients = {name: ["keys-client"] for name in ("submit", "study", "cli")}
    own = {name: [f"keys-{name}"] for name in held if name != "client"}
    assert {name: found for name, found in mounted_by.items() if found and name != "passwords"} == {
        **own,
        **clients,
        "worker-gpu": ["keys-worker"],
    }
    assert sorted(mounted_by["passwords"]) == sorted(f"keys-{name}" for name in held)


def test_the_bucket_is_created_unless_it_exists(minio: MinioServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in minio.environment().items():
        monkeypatch.setenv(name, value)
    for module, hook in ((sys, "excepthook"), (sys, "unraisablehook"), (threading, "excepthook")):
        monkeypatch.setattr(module, hook, getattr(module, hook))  # restored after the test: services replace them
    monkeypatch.setenv("MEMTAIL_STORE", "s3://made-by-test/prefix")
    monkeypatch.setenv("MEMTAIL_S3_REGION", REGION)
    monkeypatch.setattr(sys, "argv", ["make_bucket"])
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("services.tools.make_bucket", run_name="__main__")
        assert not ended.value.code
    S3Store("made-by-test", settings=minio.settings()).verify_contract()


def test_a_heartbeat_file_is_healthy_while_it_is_recent(tmp_path: Path) -> None:
    file = tmp_path / "heartbeat"
    assert "heartbeat" in (healthcheck.main(str(file)) or "")
    file.touch()
    assert healthcheck.main(str(file)) is None
    long_ago = time.time() - 2 * healthcheck.HEARTBEAT_TIMEOUT
    os.utime(file, (long_ago, long_ago))
    assert "last heartbeat 1" in (healthcheck.main(str(file)) or "")


def test_a_service_is_healthy_while_its_health_check_succeeds(living: LivingCluster) -> None:
    (dispatcher,) = living.kinds("dispatcher")
    url = f"http://127.0.0.1:{dispatcher.port}/healthz"
    living.until(lambda: healthcheck.main(url) is None)
    dispatcher.kill()
    assert url in (healthcheck.main(url) or "")


def test_a_worker_sends_heartbeats_also_during_an_outage_of_redis(living: LivingCluster, tmp_path: Path) -> None:
    file = tmp_path / "heartbeat"
    worker = living.start("worker", MEMTAIL_HEARTBEAT_FILE=str(file))
    for happens in (lambda: None, living.redis.kill, living.redis.start):
        happens()
        file.unlink(missing_ok=True)
        living.until(file.exists)
    assert worker.process.poll() is None
