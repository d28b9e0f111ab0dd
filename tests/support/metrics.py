"""Metrics and logs of services."""

import json
from typing import Any

import urllib3
from prometheus_client.parser import text_string_to_metric_families

from tests.support.cluster import Service


class Scrape:
    """One scrape of a service."""

    def __init__(self, text: str) -> None:
        self._samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def values(self, name: str, **labels: str) -> list[float]:
        """Return the values of all series that have these labels."""
        return [sample.value for sample in self._samples if sample.name == name and labels.items() <= sample.labels.items()]

    def value(self, name: str, **labels: str) -> float | None:
        """Return the sum of these values; None if there are none."""
        found = self.values(name, **labels)
        return sum(found) if found else None

    def experiments(self) -> set[str]:
        """Return the experiments that have series."""
        return {sample.labels["experiment"] for sample in self._samples if "experiment" in sample.labels}


def scrape(service: Service) -> Scrape:
    until_up = urllib3.Retry(total=None, connect=200, backoff_factor=0.1, backoff_max=0.3)
    answer = urllib3.PoolManager(retries=until_up).request("GET", f"http://127.0.0.1:{service.port}/metrics", timeout=10)
    assert answer.status == 200
    return Scrape(answer.data.decode())


def logged(log: str) -> list[dict[str, Any]]:
    """Parse the JSON lines of a log, without Celery's warning against running as root, which containers do not."""
    return [line for line in map(json.loads, log.splitlines()) if "SecurityWarning" not in line["event"]]


def states(scraped: Scrape, experiment: str) -> dict[str, float]:
    return {
        state: count
        for state in ("waiting", "queued", "training", "committed", "dead")
        if (count := scraped.value("memtail_trials", experiment=experiment, state=state))
    }
