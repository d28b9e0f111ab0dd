"""Versions of memtail beside each other on one bucket and one Redis: what a version cannot serve it leaves to the others, and says so."""

import io
import json
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import urllib3
import yaml

from memtail.experiment_store import ExperimentStore
from memtail.storage import keys
from tests.support import versions
from tests.support.cluster import Cluster, Service
from tests.support.experiments import PER_SHARD, SHARDS, TRIALS, gated
from tests.support.faulty_models import Gate
from tests.support.servers import free_port

SERVICES = ("dispatcher", "aggregator", "worker")
_SPEC = "memtail/spec/experiment.py"
_RECIPE = (_SPEC, "RECIPE_VERSION = 2", "RECIPE_VERSION = 3")
_KEYS = (
    ("memtail/spec/training.py", '"auto"] = "float32"\n', '"auto"] = "float32"\n    dropout: float = 0.0\n'),
    (_SPEC, "    workers: WorkersSpec | None = None\n", '    workers: WorkersSpec | None = None\n    compile: str = "no"\n'),
)
_RECORD = "memtail/experiment_store/record.py"
_SCHEMA = (
    (_RECORD, "SCHEMA = 1", "SCHEMA = 2"),
    (_RECORD, '(schema := content.pop("schema")) != SCHEMA', '(schema := content.pop("schema")) not in (1, SCHEMA)'),
)


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    """Version 0.1.0."""
    return versions.release_0_1_0(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def new_recipe(tmp_path_factory) -> Path:
    """A later version that only trains recipe 3."""
    return versions.later_version(tmp_path_factory.mktemp("recipe"), "0.9.0", [_RECIPE])


@pytest.fixture(scope="module")
def new_keys(tmp_path_factory) -> Path:
    """A later version with a further key of `training` and one of `execution`."""
    return versions.later_version(tmp_path_factory.mktemp("keys"), "0.8.0", _KEYS)


@pytest.fixture(scope="module")
def new_schema(tmp_path_factory) -> Path:
    """A later version that writes records of schema 2, and reads schema 1 too."""
    return versions.later_version(tmp_path_factory.mktemp("schema"), "0.7.0", _SCHEMA)


@pytest.fixture
def submit(cluster, tmp_path) -> Callable[..., ExperimentStore]:
    """Submit an experiment with the command line of another version."""

    def submit(code: Path, name: str, **parts: dict[str, Any]) -> ExperimentStore:
        spec = {
            "name": name,
            "dataset": {"name": "digits"},
            "model": {"name": "mlp", "hidden": [16]},
            "training": {"epochs": 2, **parts.get("training", {})},
            "subsets": {"trials": TRIALS},
            "execution": {"trials_per_shard": PER_SHARD, "device": "cpu", **parts.get("execution", {})},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(spec))
        versions.python(code, "-m", "memtail", "submit", path, env=cluster.environment)
        return ExperimentStore(cluster.store, name)

    return submit


def start(cluster: Cluster, *names: str, **options: Any) -> list[Service]:
    return [cluster.start(name, **options) for name in names]


def stop(services: Iterable[Service]) -> None:
    for service in services:
        service.stop()


def notices(experiment_store: ExperimentStore) -> str:
    return " | ".join(line for notice in experiment_store.notices().values() for line in notice.lines)


def trained_by(experiment_store: ExperimentStore) -> set[str | None]:
    """Return the versions that trained an experiment's shards."""
    record = experiment_store.read_record()
    return {experiment_store.batch(shard, record).provenance.memtail for shard in experiment_store.committed()}


def test_a_worker_of_0_1_0_takes_no_message(cluster, release, experiment, digits):
    old = cluster.start("worker", code=release)
    cluster.start("dispatcher")
    experiment_store = cluster.submit(experiment, digits)
    cluster.until(lambda: cluster.broker().waiting() == SHARDS)
    # that it takes a message of its version shows that it had time to take the others
    message = {"experiment": "of-its-version", "fingerprint": "0" * 64, "first": 0, "last": 3}
    script = """
import json, sys
from services.broker import Assignment, Broker
from services.settings import ServiceSettings
Broker(ServiceSettings.from_environment()).send([Assignment(**json.load(sys.stdin))])
"""
    versions.python(release, "-c", script, text=json.dumps(message), env=cluster.environment)
    cluster.until(lambda: '"outcome": "not wanted"' in old.log.read_text())
    assert cluster.broker().waiting() == SHARDS
    assert experiment.name not in old.log.read_text()
    assert not experiment_store.committed()


@pytest.mark.slow
def test_an_experiment_of_another_recipe_is_left_to_its_workers_and_does_not_block_others(
    cluster, new_recipe, declare, digits, expected, submit
):
    # the messages of the foreign experiment come first, and a pause for each would last longer than the test
    lease = {"MEMTAIL_LEASE_SECONDS": "100"}
    cluster.start("dispatcher", **lease)
    foreign = submit(new_recipe, "a-foreign")
    own = declare(TRIALS, name="b-own", execution={"trials_per_shard": PER_SHARD, "device": "cpu"})
    own_store = cluster.submit(own, digits)
    cluster.until(lambda: cluster.broker().waiting() == 2 * SHARDS)
    start(cluster, "aggregator", "worker", **lease)
    cluster.until_published(own_store, TRIALS)
    assert not foreign.committed()
    assert "this release does not train it: it has recipe 3" in notices(foreign)
    assert "do not train it: it has recipe 3" in notices(foreign)
    cluster.start("worker", code=new_recipe, **lease)
    cluster.until_published(foreign, TRIALS)
    cluster.until(lambda: not notices(foreign))
    assert cluster.scores("b-own") == expected(own)
    assert trained_by(foreign) == {"0.9.0"}
    assert "0.9.0" not in trained_by(own_store)
    assert not own_store.attempts() + foreign.attempts()


@pytest.mark.slow
def test_an_upgrade_leaves_a_running_experiment_alone_until_the_rollback(cluster, new_recipe, declare, digits, expected, submit, tmp_path):
    gate = Gate(tmp_path / "gate")
    cluster.environment["GATE_FOLDER"] = str(tmp_path / "gate")
    before = start(cluster, *SERVICES)
    running = gated(declare, name="a-running")
    running_store = cluster.submit(running, digits)
    gate.admit(2)
    cluster.until(lambda: len(running_store.committed()) == 2)
    stop(before)
    after = start(cluster, *SERVICES, code=new_recipe)
    cluster.until_published(submit(new_recipe, "b-later"), TRIALS)
    cluster.until(lambda: len(running_store.notices()) == 2)
    output = versions.python(new_recipe, "-m", "memtail", "status", env=cluster.environment)
    assert "this release does not train it: it has recipe 2, and memtail 0.9.0 trains recipe 3" in output
    assert "workers of memtail 0.9.0 do not train it" in output
    assert len(running_store.committed()) == 2
    assert not [id_ for id_ in cluster.broker().leased() if id_.startswith("a-running")]
    stop(after)
    start(cluster, *SERVICES)
    gate.open()
    cluster.until_published(running_store, TRIALS)
    cluster.until(lambda: not notices(running_store))
    assert cluster.scores("a-running") == expected(running)
    assert not running_store.attempts()


@pytest.mark.slow
def test_keys_of_a_later_version_are_ignored_where_no_trial_depends_on_them(cluster, new_keys, declare, digits, expected, submit):
    port = free_port()
    dispatcher = cluster.start("dispatcher")
    cluster.start("aggregator")
    cluster.start("explorer", MEMTAIL_EXPLORER_PORT=str(port), MEMTAIL_EXPLORER_TOKEN="a token of this test")
    cluster.start("worker")
    knob = submit(new_keys, "a-knob", training={"dropout": 0.1})
    speed = submit(new_keys, "b-speed", execution={"compile": "max"})
    cluster.until_published(speed, TRIALS)
    same = declare(TRIALS, name="b-speed", execution={"trials_per_shard": PER_SHARD, "device": "cpu"})
    assert cluster.scores("b-speed") == expected(same)
    cluster.until(lambda: "unknown key 'training.dropout'" in notices(knob))
    output = versions.python(Path(__file__).parents[2], "-m", "memtail", "status", env=cluster.environment)
    assert "b-speed" in output
    assert "a-knob: cannot be read" in output
    http = urllib3.PoolManager()
    page = http.request("GET", f"http://127.0.0.1:{port}/", headers={"Authorization": "Bearer a token of this test"}).data.decode()
    assert "a-knob" in page
    assert "b-speed" in page
    # with the later dispatcher, an earlier worker receives its messages
    stop([dispatcher])
    cluster.start("dispatcher", code=new_keys)
    cluster.until(lambda: "do not train it" in notices(knob))
    cluster.start("worker", code=new_keys)
    cluster.until(lambda: len(knob.committed()) == SHARDS)
    cluster.until(lambda: not notices(knob))
    assert not knob.attempts() + speed.attempts()


@pytest.mark.slow
def test_a_record_of_a_later_schema_is_left_to_its_version_and_hides_no_other(cluster, new_schema, declare, digits, expected, submit):
    before = start(cluster, *SERVICES)
    later = submit(new_schema, "a-later")
    own = declare(TRIALS, name="b-own", execution={"trials_per_shard": PER_SHARD, "device": "cpu"})
    own_store = cluster.submit(own, digits)
    cluster.until_published(own_store, TRIALS)
    assert cluster.scores("b-own") == expected(own)
    reason = "has schema 2, this memtail reads 1: use the memtail that wrote it"
    cluster.until(lambda: reason in notices(later))
    output = versions.python(Path(__file__).parents[2], "-m", "memtail", "status", env=cluster.environment)
    assert "b-own" in output
    assert "a-later: cannot be read" in output
    assert reason in output
    start(cluster, "dispatcher", "aggregator", code=new_schema)
    stop(service for service in before if service.name != "worker")
    # the worker of this version leaves the later version's messages in the queue
    cluster.until(lambda: "do not train it" in notices(later))
    start(cluster, "worker", code=new_schema)
    cluster.until_published(later, TRIALS)
    cluster.until(lambda: not notices(later))
    batches = [np.load(io.BytesIO(later.store.get(key))) for key in later.store.list(keys.trials("a-later"))]
    assert {json.loads(str(batch["provenance"]))["memtail"] for batch in batches} == {"0.7.0"}
    assert not later.attempts() + own_store.attempts()


def test_versions_of_one_recipe_train_an_experiment_together(cluster, new_keys, declare, digits, expected, tmp_path):
    gate = Gate(tmp_path / "gate")
    cluster.environment["GATE_FOLDER"] = str(tmp_path / "gate")
    start(cluster, *SERVICES)
    cluster.start("worker", code=new_keys)
    together = gated(declare, name="together")
    experiment_store = cluster.submit(together, digits)
    cluster.until(lambda: gate.waiting == 2)
    gate.open()
    cluster.until_published(experiment_store, TRIALS)
    scores, alone = cluster.scores("together"), expected(together)
    # which versions trained them
    assert json.loads(scores.pop("summary.json"))["conditions"]["memtail"].keys() > {version("memtail")}
    del alone["summary.json"]
    assert scores == alone
    assert len(trained_by(experiment_store)) == 2
    assert not experiment_store.attempts()
