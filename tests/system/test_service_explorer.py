"""The explorer that the aggregator serves, from a bucket."""

import os
import signal
from pathlib import Path

import urllib3

from tests.support.explored import publish_random
from tests.support.servers import free_port


def test_the_aggregator_restarts_its_explorer_which_requires_the_token_and_ends_with_it(cluster, declare, digits, tmp_path):
    publish_random(cluster.store, declare(40), 40)
    cluster.submit(declare(40), digits)
    (tmp_path / "token").write_text("secret\n")
    port = free_port()
    aggregator = cluster.start("aggregator", MEMTAIL_EXPLORER_PORT=str(port), MEMTAIL_EXPLORER_TOKEN_FILE=str(tmp_path / "token"))
    http = urllib3.PoolManager(retries=False)

    def status(path: str, token: str = "secret") -> int:
        try:
            return http.request("GET", f"http://127.0.0.1:{port}{path}", headers={"Authorization": f"Bearer {token}"}, timeout=30).status
        except urllib3.exceptions.HTTPError:
            return 0

    cluster.until(lambda: status("/") == 200)
    for path in (
        "/experiments/digits",
        "/experiments/digits/train/3",
        "/experiments/digits/test/3",
        "/experiments/digits/images/test/3.png",
    ):
        assert status(path, "guess") == 401
        cluster.until(lambda path=path: status(path) == 200)
    serving = [child for child in aggregator.children() if b"spawn_main" in _command(child)]
    os.kill(serving[0], signal.SIGKILL)
    cluster.until(lambda: list(cluster.events(aggregator, "the explorer ended and is started again")))
    cluster.until(lambda: status("/") == 200)
    os.kill(aggregator.process.pid, signal.SIGKILL)  # without its children
    cluster.until(lambda: status("/") == 0)


def test_an_unavailable_explorer_port_ends_the_aggregator_with_one_line(cluster):
    port = str(free_port())
    cluster.start("aggregator", MEMTAIL_PORT=port, MEMTAIL_EXPLORER_PORT=port)
    second = cluster.services[-1]
    assert second.process.wait(60) == 2
    assert "the explorer cannot listen on all addresses" in second.log.read_text()


def _command(process: int) -> bytes:
    return Path(f"/proc/{process}/cmdline").read_bytes()
