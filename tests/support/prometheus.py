"""A real Prometheus on the loopback interface that scrapes services every second."""

import contextlib
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import urllib3
import yaml

from tests.support.cluster import PROJECT, Service
from tests.support.servers import MinioServer, free_port, server_binary


class PrometheusServer:
    """Prometheus with services/monitoring/prometheus.yml, but local targets and intervals of one second."""

    def __init__(self, folder: Path, services: Iterable[Service], minio: MinioServer) -> None:
        self._folder, self._services, self._minio = folder, services, minio
        self._url = f"http://127.0.0.1:{free_port()}"
        self._http = urllib3.PoolManager(retries=False)

    def __enter__(self) -> "PrometheusServer":
        config = self._folder / "prometheus.yml"
        config.write_text(yaml.safe_dump(self._config()))
        command = [server_binary("prometheus"), f"--config.file={config}", f"--storage.tsdb.path={self._folder / 'data'}"]
        log = self._folder / "prometheus.log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*command, f"--web.listen-address={self._url.removeprefix('http://')}"], stdout=output, stderr=output
            )
        deadline = time.monotonic() + 60
        while not self._ready():
            assert self._process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = yaml.safe_load((PROJECT / "services/monitoring/prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(PROJECT / "helm/memtail/files/rules.yaml")]
        memtail, minio, _ = config["scrape_configs"]
        del memtail["dns_sd_configs"]
        memtail["static_configs"] = [
            {"targets": [f"127.0.0.1:{service.port}"], "labels": {"service": service.name}} for service in self._services
        ]
        minio["static_configs"][0]["targets"] = [f"127.0.0.1:{self._minio.port}"]
        return config

    def _ready(self) -> bool:
        with contextlib.suppress(urllib3.exceptions.HTTPError):
            return self._http.request("GET", f"{self._url}/-/ready", timeout=5).status == 200
        return False

    def get(self, endpoint: str, **parameters: Any) -> Any:
        """Query the API; an error, such as an invalid expression, fails the test."""
        response = self._http.request("GET", f"{self._url}/api/v1/{endpoint}", fields=parameters).json()
        assert response["status"] == "success", f"{parameters}: {response['error']}"
        return response["data"]

    def at(self, moment: float, expression: str) -> list[dict[str, Any]]:
        """Evaluate an expression at one time; returns a value or histogram per series."""
        result = self.get("query", query=expression, time=moment)
        assert result["resultType"] == "vector", expression
        return [{"metric": series["metric"], "values": [series.get("value") or series["histogram"]]} for series in result["result"]]

    def during(self, times: tuple[float, float], expression: str) -> list[dict[str, Any]]:
        """Evaluate an expression at each second of a period."""
        result: list[dict[str, Any]] = self.get("query_range", query=expression, start=times[0], end=times[1], step=1)["result"]
        return result

    def label_values(self, times: tuple[float, float], selector: str, label: str) -> list[str]:
        """Return the values of a label."""
        values: list[str] = self.get(f"label/{label}/values", **{"match[]": selector}, start=times[0], end=times[1])
        return values
