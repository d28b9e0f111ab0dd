"""The password of Redis is replaced during a run, as a rotated secret is: first on the server, later in the mounted file."""

import secrets
import time
from pathlib import Path

import pytest

from services.tools.rights import REDIS_RULES, user
from tests.support.cluster import Cluster
from tests.support.experiments import TRIALS, gated
from tests.support.faulty_models import Gate


class Credentials:
    """Users of Redis, and the mounted files with their passwords."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._redis, self._port, self._folder = cluster.redis.client(), cluster.redis.port, folder
        self.passwords: dict[str, str] = {}

    def replace(self) -> None:
        """Set new passwords, and close the connections that used the earlier ones."""
        for component, rules in REDIS_RULES.items():
            self.passwords[component] = secrets.token_hex(16) + "@:/%"
            commands = rules.split() if component in self.passwords else []
            self._redis.execute_command("ACL", "SETUSER", user(component), "on", "resetpass", f">{self.passwords[component]}", *commands)
            self._redis.execute_command("CLIENT", "KILL", "USER", user(component))

    def publish(self) -> None:
        """Replace the files."""
        for component, password in self.passwords.items():
            quoted = password.replace("%", "%25").replace("@", "%40").replace(":", "%3A").replace("/", "%2F")
            url = f"redis://{user(component)}:{quoted}@127.0.0.1:{self._port}/0"
            (self._folder / component).write_text(f"{url}\n")

    def environment(self, component: str) -> dict[str, str]:
        return {"MEMTAIL_BROKER": "", "MEMTAIL_BROKER_FILE": str(self._folder / component)}

    def connected(self) -> set[str]:
        return {client["user"] for client in self._redis.client_list()}


@pytest.fixture
def credentials(cluster: Cluster, tmp_path: Path) -> Credentials:
    made = Credentials(cluster, tmp_path)
    made.replace()
    made.publish()
    return made


def test_a_rotated_redis_password_is_read_without_a_restart(cluster, credentials, declare, digits, expected, tmp_path):
    gate = Gate(tmp_path / "gate")
    experiment = gated(declare, name="rotated")
    experiment_store = cluster.submit(experiment, digits)
    services = [cluster.start(name, **credentials.environment(name), GATE_FOLDER=str(tmp_path / "gate")) for name in REDIS_RULES]
    cluster.start("aggregator")
    cluster.until(lambda: gate.waiting)
    before = dict(credentials.passwords)
    credentials.replace()
    gate.admit(2)
    cluster.until(lambda: len(list(experiment_store.iterate_committed())) == 1)  # a shard in training is committed without Redis
    cluster.until(lambda: all("invalid username-password" in service.log.read_text() for service in services))
    credentials.publish()
    began = time.monotonic()
    gate.open()
    cluster.until_published(experiment_store, TRIALS)
    assert time.monotonic() - began < 60
    assert cluster.scores(experiment.name) == expected(experiment)
    assert {user(component) for component in REDIS_RULES} <= credentials.connected()
    assert [service.process.poll() for service in services] == [None] * len(services)
    for password in (*before.values(), *credentials.passwords.values()):
        assert password not in cluster.logs()


def test_an_unreadable_file_is_a_refused_password(cluster, credentials, tmp_path):
    dispatcher = cluster.start("dispatcher", **credentials.environment("dispatcher"))
    cluster.until(lambda: cluster.serves(dispatcher))
    (tmp_path / "dispatcher").rename(tmp_path / "moved")
    credentials.replace()
    cluster.until(lambda: "cannot be read" in dispatcher.log.read_text())
    credentials.publish()
    cluster.until(lambda: "memtail-dispatcher" in credentials.connected())
    assert dispatcher.process.poll() is None
