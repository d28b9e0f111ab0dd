"""Each component has the rights that it needs, and no others, on a real S3 server and a real Redis."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
import structlog
import urllib3
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from memtail.errors import AccessRefusedError, ObjectNotFound, StoreError
from memtail.spec import RecordedOutcomes
from memtail.storage import UnreachableError, keys
from memtail.storage.identity import make_identity
from memtail.storage.s3 import S3Store
from services.common import process
from services.tools import make_passwords
from services.tools.rights import REDIS_RULES, RIGHTS, rendered, s3_policy, user
from tests.support.cluster import PROJECT, Cluster
from tests.support.proxies import ResettingProxy
from tests.support.servers import MinioServer, free_port

PREFIX = "team/a"
WAITING = "waiting for access to the store, which the dispatcher may be about to give"
# Size of the parts of large objects, in bytes.
_PART = 5 << 20
# Keys of one experiment, by what they are.
OBJECTS = {
    "dataset": keys.dataset("f00d", "manifest.json"),
    "masks": keys.masks("f00d"),
    "weights": keys.weights("f00d"),
    "record": keys.experiment("digits"),
    "control": keys.control("digits"),
    "device": keys.device("digits"),
    "trials": keys.trial_batch("digits", 0, 3),
    "checkpoint": keys.checkpoint("digits", 0, 3),
    "failure": keys.failure("digits", 0, 3, 1),
    "replica": keys.replica("digits", 0, 3, "equal"),
    "worker's notice": keys.notice("digits", "worker"),
    "dispatcher's notice": keys.notice("digits", "dispatcher"),
    "fleet's notice": keys.notice("digits", "fleet"),
    "aggregator's notice": keys.notice("digits", "aggregator"),
    "discard": keys.discard("digits", 0, 3, "now"),
    "model": keys.model("digits", 3),
    "snapshot": keys.snapshot("digits"),
    "pointer": keys.latest_scores("digits"),
    "scores": keys.scores("digits", "v1") + "memorization.csv",
    "report": keys.latest_report("digits"),
    "study": keys.study("digits", "removal") + "result.json",
    "probe": keys.probe(),
    "identity": keys.identity(),
}
EVERYTHING = set(OBJECTS)
WRITTEN = {
    "worker": {"device", "trials", "checkpoint", "model", "failure", "replica", "worker's notice", "probe"},
    "dispatcher": {"control", "failure", "dispatcher's notice", "fleet's notice", "probe", "identity"},
    "aggregator": {"record", "failure", "aggregator's notice", "snapshot", "pointer", "scores", "report", "probe"},
    "explorer": set(),
    "client": EVERYTHING,
}
DELETED = {
    "worker": {"checkpoint", "worker's notice", "probe"},
    "dispatcher": {"dispatcher's notice", "fleet's notice", "probe"},
    "aggregator": {"aggregator's notice", "snapshot", "pointer", "scores", "report", "probe"},
    "explorer": set(),
    "client": EVERYTHING,
}
READ = {
    "worker": EVERYTHING - {"discard", "model", "snapshot", "pointer", "scores", "report", "study"},
    "dispatcher": EVERYTHING - {"dataset", "masks", "weights"},
    "aggregator": EVERYTHING - {"weights", "identity"},
    "explorer": EVERYTHING - {"masks", "weights", "probe", "identity"},
    "client": EVERYTHING,
}


class Deployed:
    """A store whose server has the users of the components, with the passwords that compose generates."""

    def __init__(self, minio: MinioServer, bucket: str, folder: Path, prefix: str = "") -> None:
        self._minio, self._bucket, self._prefix, self.folder = minio, bucket, prefix, folder
        (folder / "s3-access-key").write_text(minio.access_key)
        make_passwords.make(folder, folder / "services")
        address = f"s3://{bucket}/{prefix}".rstrip("/")
        command = [sys.executable, "-m", "services.tools.make_bucket", str(folder)]
        for _ in range(2):  # which may be repeated
            done = subprocess.run(
                command, cwd=PROJECT, env={**minio.environment(), "MEMTAIL_STORE": address}, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr

    def secret(self, component: str, name: str) -> str:
        return (self.folder / "services" / component / name).read_text()

    def keys(self, component: str) -> dict[str, str]:
        return {"access_key": self.secret(component, "s3-access-key"), "secret_key": self.secret(component, "s3-secret-key")}

    def store(self, component: str) -> S3Store:
        return S3Store(self._bucket, self._prefix, settings=self._minio.settings(**self.keys(component)))


@pytest.fixture(scope="module")
def deployed(minio: MinioServer, tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    return Deployed(minio, minio.new_bucket(), tmp_path_factory.mktemp("passwords"), PREFIX)


def permitted(action: Callable[[str], object]) -> set[str]:
    """Return the objects with which an action is permitted."""
    found = set()
    for name, key in OBJECTS.items():
        try:
            action(key)
        except ObjectNotFound:
            found.add(name)
        except StoreError as error:
            if "AccessDenied" not in str(error):
                raise
        else:
            found.add(name)
    return found


@pytest.mark.parametrize("component", RIGHTS)
def test_a_component_reads_writes_and_removes_what_it_needs_and_nothing_else(deployed, component):
    store = deployed.store(component)
    assert permitted(store.get) == READ[component]
    assert (
        permitted(lambda key: store.put_if_absent(key, b"{}") if key in _created(component) else store.put(key, b"{}"))
        == WRITTEN[component]
    )
    assert permitted(store.delete) == DELETED[component]
    assert not store.exists(keys.experiment("none"))  # not found, rather than denied
    list(store.list("experiments/"))


def _created(component: str) -> set[str]:
    return {OBJECTS[name] for name in ("trials", "failure", "replica", "device")} if component == "worker" else set()


@pytest.mark.parametrize(("component", "name"), [("client", "dataset"), ("worker", "checkpoint"), ("aggregator", "snapshot")])
def test_an_upload_that_was_cut_off_is_continued(deployed, minio, component, name):
    content = os.urandom(8 * _PART)

    def through(proxy: ResettingProxy, **options: Any) -> S3Store:
        settings = minio.settings(**deployed.keys(component), endpoint=proxy.endpoint)
        return S3Store(deployed._bucket, PREFIX, settings=settings, part_size=_PART, **options)

    with ResettingProxy(minio.port, after_bytes=7 << 20) as proxy, pytest.raises(UnreachableError):
        through(proxy, attempts=1).put(OBJECTS[name], content)
    with ResettingProxy(minio.port) as proxy:
        through(proxy).put(OBJECTS[name], content)
        assert 0 < sum(b"partNumber=" in request and request.startswith(b"PUT") for request in proxy.requests) < 8
    assert deployed.store(component).get(OBJECTS[name]) == content


def test_a_component_has_no_rights_outside_of_the_prefix(deployed, minio):
    settings = minio.settings(**deployed.keys("client"))
    outside = S3Store(deployed._bucket, "team/b", settings=settings)
    assert permitted(outside.get) == permitted(lambda key: outside.put(key, b"")) == permitted(outside.delete) == set()


def test_on_aws_what_is_written_once_is_written_under_a_condition():
    statements = {each["Sid"]: each for each in s3_policy("worker", "b", "p/")["Statement"]}
    assert statements["Create"]["Condition"] == {"Null": {"s3:if-none-match": "false"}}
    assert "arn:aws:s3:::b/p/experiments/*/trials/*" in statements["Create"]["Resource"]
    assert not set(statements["Create"]["Resource"]) & set(statements["Write"]["Resource"] + statements["Delete"]["Resource"])
    assert len(json.dumps(s3_policy("worker", "b" * 63, "p" * 20), separators=(",", ":"))) < 6144  # AWS's limit


def test_the_generated_files_are_up_to_date():
    assert {path: path.read_text() for path in rendered()} == rendered(), "run python -m services.tools.rights"


@pytest.fixture
def restricted(cluster: Cluster, tmp_path: Path) -> tuple[Cluster, Callable[[str], dict[str, str]]]:
    """A cluster whose servers have the users, and the environment of each component."""
    deployed = Deployed(cluster.minio, cluster.bucket, tmp_path)
    for line in (tmp_path / "services/redis/redis.conf").read_text().splitlines()[1:]:
        cluster.redis.client().execute_command("ACL", "SETUSER", *line.split()[1:])

    def environment(component: str) -> dict[str, str]:
        s3 = deployed.keys(component)
        broker = {}
        if component in REDIS_RULES:
            url = deployed.secret(component, "broker").replace("@redis:6379", f"@127.0.0.1:{cluster.redis.port}")
            broker = {"MEMTAIL_BROKER": url}
        return {"MEMTAIL_S3_ACCESS_KEY": s3["access_key"], "MEMTAIL_S3_SECRET_KEY": s3["secret_key"], "MEMTAIL_BROKER": "", **broker}

    return cluster, environment


def test_services_run_an_experiment_with_their_own_keys(restricted, experiment, digits, expected):
    cluster, environment = restricted
    port = free_port()
    for component in ("dispatcher", "worker", "aggregator"):
        cluster.start(component, **environment(component))
    token = {"MEMTAIL_EXPLORER_TOKEN": "a token of this test", "MEMTAIL_EXPLORER_PORT": str(port)}
    cluster.start("explorer", **environment("explorer"), **token)
    keeping = experiment.model_copy(update={"record": RecordedOutcomes(models=2)})
    experiment_store = cluster.submit(keeping, digits)
    cluster.until_published(experiment_store, experiment.subsets.trials)
    assert cluster.scores(experiment.name) == expected(experiment)
    assert list(cluster.store.list(keys.models(experiment.name))) == [keys.model(experiment.name, trial) for trial in (0, 1)]
    cluster.until(lambda: list(cluster.store.list(keys.all_reports(experiment.name))))
    address = f"http://127.0.0.1:{port}/experiments/{experiment.name}"
    headers = {"Authorization": "Bearer a token of this test"}
    cluster.until(lambda: b"training examples" in urllib3.request("GET", address, headers=headers, timeout=60).data)
    log = cluster.logs()
    assert "AccessDenied" not in log
    assert "NOPERM" not in log.upper()
    doctor = subprocess.run(
        [sys.executable, "-m", "memtail", "doctor"],
        env={**cluster.environment, **environment("dispatcher")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert doctor.returncode == 0, doctor.stdout


def test_redis_denies_what_a_component_does_not_need(restricted):
    _, environment = restricted
    denied = [
        (component, command) for component in REDIS_RULES for command in ("FLUSHALL", "KEYS *", "CONFIG GET *", "ACL LIST", "GET theirs")
    ]
    denied += [("worker", command) for command in ("GET memtail2:leader", "SET memtail2:leader me", "INFO", "SCAN 0", "RANDOMKEY")]
    for component, command in denied:
        client = redis.Redis.from_url(environment(component)["MEMTAIL_BROKER"])
        assert client.ping()
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.execute_command(*command.split())


def test_redis_starts_with_the_generated_configuration(tmp_path: Path):
    make_passwords.make(tmp_path, tmp_path / "services")
    port = free_port()
    command = ["redis-server", str(tmp_path / "services/redis/redis.conf"), "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    server = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, env=os.environ)
    try:
        for component in REDIS_RULES:
            url = (tmp_path / "services" / component / "broker").read_text().replace("redis:6379", f"127.0.0.1:{port}")
            assert f"//{user(component)}:" in url
            retrying = Retrying(retry=retry_if_exception_type(redis.ConnectionError), stop=stop_after_delay(10), wait=wait_fixed(0.1))
            assert retrying(redis.Redis.from_url(url).ping)
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(port=port).ping()
    finally:
        server.terminate()
        server.wait()


@pytest.mark.parametrize("service", ["aggregator", "worker"])
def test_a_service_that_starts_before_its_user_is_made_waits_for_it(cluster, service):
    name = f"late-{service}"
    make_identity(cluster.store)  # for which workers wait
    started = cluster.start(service, MEMTAIL_S3_ACCESS_KEY=name, MEMTAIL_S3_SECRET_KEY="late-secret")
    cluster.until(lambda: any(WAITING in line and "InvalidAccessKeyId" in line for line in cluster.events(started, WAITING)))
    cluster.minio.add_user(name, "late-secret")
    cluster.until(lambda: cluster.serves(started))
    assert started.process.poll() is None


@pytest.mark.parametrize(("key", "bucket", "code"), [("nobody", "", "InvalidAccessKeyId"), ("", "no-such-bucket", "NoSuchBucket")])
def test_a_service_that_is_never_given_access_ends_with_the_reason(minio, monkeypatch, key, bucket, code):
    for variable, value in (minio.environment() | ({"MEMTAIL_S3_ACCESS_KEY": key} if key else {})).items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(process, "_ACCESS_SECONDS", 1.0)
    monkeypatch.setattr(process, "_ACCESS_PAUSE", 0.5)
    with structlog.testing.capture_logs() as logs, pytest.raises(AccessRefusedError, match=code):
        process.open_when_allowed(f"s3://{bucket or minio.new_bucket()}", lambda *_: None)
    assert 1 <= len([line for line in logs if line["event"] == WAITING]) <= 3
