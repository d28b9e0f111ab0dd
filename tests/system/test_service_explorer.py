"""The explorer as a service, from a bucket."""

import json
import signal

import pytest
import urllib3

from tests.support.explored import publish_random
from tests.support.servers import free_port

TOKEN = "a token of this service"


def test_the_explorer_serves_the_bucket_to_holders_of_the_token(cluster, declare, digits, tmp_path):
    publish_random(cluster.store, declare(40), 40)
    cluster.submit(declare(40), digits)
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    port = free_port()
    explorer = cluster.start("explorer", MEMTAIL_EXPLORER_PORT=str(port), MEMTAIL_EXPLORER_TOKEN_FILE=str(tmp_path / "token"))
    cluster.until(lambda: cluster.serves(explorer))
    http = urllib3.PoolManager(retries=False)

    def status(path: str, token: str = TOKEN) -> int:
        return http.request("GET", f"http://127.0.0.1:{port}{path}", headers={"Authorization": f"Bearer {token}"}, timeout=30).status

    for path in (
        "/",
        "/experiments/digits",
        "/experiments/digits/train/3",
        "/experiments/digits/test/3",
        "/experiments/digits/images/test/3.png",
    ):
        assert status(path, "guess") == 401
        cluster.until(lambda path=path: status(path) == 200)
    requests = [json.loads(line) for line in cluster.events(explorer, "request")]
    assert {(each["path"], each["status"]) for each in requests} >= {("/", 401), ("/", 200)}
    assert len(list(cluster.events(explorer, "login refused"))) == 5
    metrics = http.request("GET", f"http://127.0.0.1:{explorer.port}/metrics", timeout=30).data.decode()
    assert 'memtail_store_requests_total{operation="get",outcome="ok"}' in metrics
    explorer.process.send_signal(signal.SIGTERM)
    assert explorer.process.wait(30) == 0
    assert TOKEN not in explorer.log.read_text()


@pytest.mark.parametrize(
    ("service", "environment", "line"),
    [
        ("explorer", {}, "MEMTAIL_EXPLORER_TOKEN is not set"),
        ("explorer", {"MEMTAIL_EXPLORER_TOKEN": "secret"}, "MEMTAIL_EXPLORER_TOKEN has 6 characters"),
        ("aggregator", {"MEMTAIL_EXPLORER_PORT": "8080"}, "set it for python -m services.explorer only"),
    ],
)
def test_a_service_with_invalid_settings_of_the_explorer_ends_with_one_line(cluster, service, environment, line):
    ended = cluster.start(service, **environment)
    assert ended.process.wait(60) == 2
    [text] = ended.log.read_text().splitlines()
    assert line in json.loads(text)["event"]


def test_an_unavailable_port_ends_the_explorer_with_one_line(cluster):
    port = str(free_port())
    explorer = cluster.start("explorer", MEMTAIL_PORT=port, MEMTAIL_EXPLORER_PORT=port, MEMTAIL_EXPLORER_TOKEN=TOKEN)
    assert explorer.process.wait(60) == 2
    assert "the explorer cannot listen on all addresses" in explorer.log.read_text()
