"""Connections between pods of the release, and from other namespaces: network policies allow those that the chart's README lists."""

import json
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.deployment import CONTROL
from tests.node.release import VERSION, RealNode, Release, name_of

# Prints the names of the places that accept a connection; the argument is JSON {name: [host, port]}.
CONNECT = """
import json, socket, sys
def accepts(host, port):
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True
print(json.dumps([name for name, place in json.loads(sys.argv[1]).items() if accepts(*place)]))
"""
# Prints the status of a page; the arguments are its URL and a token.
STATUS = """
import sys, urllib.error, urllib.request
try:
    print(urllib.request.urlopen(urllib.request.Request(sys.argv[1], headers={"Authorization": f"Bearer {sys.argv[2]}"})).status)
except urllib.error.HTTPError as error:
    print(error.code)
"""
Places = dict[str, tuple[str, int]]
METRICS = {"metrics of dispatcher", "metrics of aggregator", "metrics of explorer", "metrics of worker"}
# Places that components reach, besides themselves.
ALLOWED = {
    "dispatcher": {"redis", "bucket", "API server"},
    "worker": {"redis", "bucket"},
    "aggregator": {"bucket"},
    "explorer": {"bucket"},
}


@dataclass(frozen=True)
class Client:
    """A pod in another namespace."""

    node: RealNode
    namespace: str

    @classmethod
    def start(cls, node: RealNode, prefix: str) -> "Client":
        client = cls(node, node.namespace(prefix, restricted=False))
        client._kubectl("run", "client", "--image", f"{CONTROL}:{VERSION}", "--command", "--", "sleep", "infinity")
        client._kubectl("wait", "--for=condition=Ready", "pod/client", "--timeout=120s")
        return client

    def reached(self, places: Places) -> set[str]:
        return set(json.loads(self._python(CONNECT, json.dumps(places))))

    def status(self, url: str, token: str) -> int:
        return int(self._python(STATUS, url, token))

    def _python(self, code: str, *arguments: str) -> str:
        return self._kubectl("exec", "client", "--", "python", "-c", code, *arguments)

    def _kubectl(self, *arguments: str) -> str:
        return self.node.kubectl("--namespace", self.namespace, *arguments)


def test_only_documented_connections_are_accepted(release: Release, embedded: dict[str, bytes], tmp_path: Path) -> None:
    outside, monitoring = (Client.start(release.node, name) for name in ("outside", "monitoring"))
    training = release.submit("access")
    training.begin()
    places = _places(release)
    assert outside.reached(places) == METRICS | {"API server"}
    for component, allowed in ALLOWED.items():
        others = {name: place for name, place in places.items() if component not in name}
        pod = name_of(release.pods(component)[0])
        assert set(json.loads(release.execute(pod, "python", "-c", CONNECT, json.dumps(others)))) == allowed, component

    peers = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": monitoring.namespace}}}]
    release.helm("upgrade", "--wait", "--timeout", "5m", networkPolicy__metricsFrom=peers, networkPolicy__explorerFrom=peers)
    release.until(lambda: outside.reached(places) == {"API server"}, 60)
    expected = METRICS | {"API server", "explorer"}
    # the worker may have ended
    release.until(lambda: expected - {"metrics of worker"} <= monitoring.reached(places) <= expected, 60)
    explorer, token = "http://{}:{}/".format(*places["explorer"]), release.secret("explorer-token")
    assert [monitoring.status(explorer, each) for each in ("", "x" * len(token), token)] == [401, 401, 200]
    release.helm("upgrade", "--wait", "--timeout", "5m")
    training.assert_complete(embedded, tmp_path)


def _places(release: Release) -> Places:
    """Return the ports of pods of the release, and that of the API server."""
    ips = {component: release.pods(component)[0]["status"]["podIP"] for component in (*ALLOWED, "redis", "minio")}
    api_server = release.node.get("service", "kubernetes", "--namespace", "default")["spec"]["clusterIP"]
    return {
        **{f"metrics of {component}": (ips[component], 9100) for component in ALLOWED},
        "explorer": (ips["explorer"], 8080),
        "redis": (ips["redis"], 6379),
        "bucket": (ips["minio"], 9000),
        "API server": (api_server, 443),
    }
