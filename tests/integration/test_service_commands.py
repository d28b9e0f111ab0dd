"""Commands for experiments that the services train. Trials are random: no test trains."""

import dataclasses
import json
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from memtail import datasets
from memtail.broker import key_prefix
from memtail.cli import doctor, watch
from memtail.cli.app import app
from memtail.cli.doctor import examine
from memtail.datasets.staged_dataset import fetch
from memtail.errors import SpecError, StoreError, UnsupportedError
from memtail.execution.progress import progress_of
from memtail.experiment_store import Control, ExperimentStore, Origin
from memtail.scores.publish import publish
from memtail.statistics import Statistics
from memtail.storage import ObjectNotFound, keys
from memtail.storage.identity import make_identity, read_identity
from memtail.storage.local import LocalStore
from memtail.storage.s3 import S3Store
from memtail.trials import Shard
from tests.support.arrays import write_arrays
from tests.support.batches import commit
from tests.support.cli import command, invoke
from tests.support.cluster import RedisServer
from tests.support.servers import MinioServer, free_port, server_binary

TRIALS, PER_SHARD = 12, 4
SHARDS = [Shard(0, 3), Shard(4, 7), Shard(8, 11)]


@pytest.fixture
def spec(tmp_path):
    """Factory of experiment files: 12 trials in shards of 4 on a tiny dataset."""

    def write(name="tiny", trials=TRIALS, **parts):
        root = write_arrays(tmp_path / "tiny.npz")
        content = {
            "name": name,
            "dataset": {"name": "arrays", "root": str(root)},
            "model": {"name": "mlp", "hidden": [4]},
            "subsets": {"trials": trials, "design": "balanced", "fraction": 0.5},
            "execution": {"trials_per_shard": PER_SHARD},
            **parts,
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "store")


@pytest.fixture
def call(store):
    """Runs a command on the store in this process; raises the error that users would see."""
    return partial(invoke, store.address)


@pytest.fixture
def submitted(call, spec, store):
    """A submitted experiment without trials."""
    call("submit", spec())
    return ExperimentStore(store, "tiny")


def publish_all(experiment_store):
    """Publishes the scores, as the aggregator does."""
    record = experiment_store.read_record()
    statistics = Statistics(record.n_train, record.n_test)
    for shard in experiment_store.committed():
        statistics.accumulate(experiment_store.batch(shard, record))
    publish(experiment_store.store, record, statistics, datasets.prepare(record.experiment.dataset))


def fail(experiment_store, shard, times, error="RuntimeError: boom"):
    for _ in range(times):
        experiment_store.record_failure(
            shard,
            error,
            f"Traceback (most recent call last):\n  in forward\n{error}\n",
            "2026-01-02T03:04:05+00:00",
            Origin("rack-3", "worker-7", "cuda:1"),
        )


def test_stage_stages_a_dataset_once(call, spec, store, tmp_path):
    text = call("stage", spec())
    facts = json.loads(call("stage", spec(), "--json"))
    assert text.rstrip().endswith(", staged")
    assert facts["fingerprint"] in text
    assert facts["staged"] is False
    assert facts["store"] == store.address
    assert "already staged" in call("stage", spec())
    assert fetch(store, facts["fingerprint"], tmp_path / "cache").n_train == 40


def test_stage_without_a_store_only_prepares(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["stage", str(spec()), "--json"])
    assert result.exit_code == 0
    assert "store" not in json.loads(result.stdout)
    assert not (tmp_path / "memtail-store").exists()


def test_submit_stages_the_dataset_registers_the_experiment_and_shows_the_next_commands(call, spec, store, tmp_path):
    text = call("submit", spec(), "--priority", 5)
    experiment_store = ExperimentStore(store, "tiny")
    record = experiment_store.read_record()
    assert f"tiny submitted to {store.address}" in text
    assert "12 in 3 shards of 4" in text
    assert "staged to the store" in text
    assert f"memtail watch tiny --store {store.address}" in text
    assert f"memtail scores tiny --fetch DIR --store {store.address}" in text
    assert experiment_store.control() == Control("running", 5)
    assert fetch(store, record.canonical["dataset"]["fingerprint"], tmp_path / "cache").n_train == record.n_train


def test_submitting_again_changes_nothing_and_more_trials_extend(call, spec, store):
    call("submit", spec(), "--priority", 5)

    def held():
        return {key: store.get(key) for key in store.list("") if key != keys.change("tiny")}  # a marker, which services look for

    before = held()
    assert "is already in" in call("submit", spec())
    assert held() == before
    assert "extended from 12 to 20 trials" in call("submit", spec(trials=20))
    made = json.loads(call("submit", spec(trials=20), "--json"))
    assert (made["new"], made["trials_before"], made["trials"], made["shards"], made["priority"]) == (False, 20, 20, 5, 5)
    with pytest.raises(StoreError, match="with 20 trials, this spec has 12"):
        call("submit", spec())


@pytest.mark.parametrize(
    ("trials", "message"),
    [
        (3_000_000, "has 3000000 trials, and at most 1000000 are allowed: declare fewer trials, or raise MEMTAIL_MAX_TRIALS"),
        (900_000, "experiment 'tiny' has 225000 shards, and at most 200000 are allowed: declare more trials per shard"),
        (10**30, "experiment 'tiny' has 1000000000000000000000000000000 trials"),
    ],
)
def test_an_experiment_that_is_too_large_is_not_submitted(call, spec, store, trials, message):
    with pytest.raises(UnsupportedError, match=message):
        call("submit", spec(trials=trials))
    assert not list(store.list(""))


def test_an_experiment_is_not_extended_beyond_the_limit(call, spec, submitted, monkeypatch):
    monkeypatch.setenv("MEMTAIL_MAX_TRIALS", "16")
    with pytest.raises(UnsupportedError, match="has 20 trials, and at most 16"):
        call("submit", spec(trials=20))
    assert submitted.read_record().experiment.subsets.trials == 12


@pytest.mark.parametrize("limit", ["0", "many", "-1", "9" * 5000])
def test_a_limit_that_is_no_number_is_named(call, spec, monkeypatch, limit):
    monkeypatch.setenv("MEMTAIL_MAX_SHARDS", limit)
    with pytest.raises(StoreError, match=r"MEMTAIL_MAX_SHARDS is '.*': give a whole number above 0"):
        call("submit", spec())


def test_an_extended_experiment_keeps_its_trials_when_its_first_declaration_is_submitted_again(call, spec, store):
    subsets = {"trials": 12, "design": "balanced", "fraction": 0.5, "until": {"standard_error": 0.1}}
    call("submit", spec(subsets=subsets))
    ExperimentStore(store, "tiny").extend(20)
    assert "20 in 5 shards of 4" in call("submit", spec(subsets=subsets))
    made = json.loads(call("submit", spec(subsets=subsets), "--json"))
    assert (made["trials_before"], made["trials"]) == (20, 20)


def test_each_action_of_a_person_is_on_record(call, spec, store, monkeypatch):
    monkeypatch.setenv("LOGNAME", "ada")
    call("submit", spec(), "--priority", 5, "--owner", "team vision")
    call("submit", spec(), "--priority", 5)  # changes nothing
    monkeypatch.setenv("LOGNAME", "grace")
    call("submit", spec(trials=20), "--owner", "Grace")
    for arguments in (["pause"], ["pause"], ["resume"], ["cancel"], ["priority"], ["retry"]):
        call(arguments[0], "tiny", *(["-3"] if arguments == ["priority"] else []))
    experiment_store = ExperimentStore(store, "tiny")
    fail(experiment_store, SHARDS[0], 2)
    call("retry", "tiny", "--shard", "0-3")
    commit(experiment_store, SHARDS[1])
    call("discard", "tiny", "--shard", "4-7", "--why", "a broken GPU")
    actions = json.loads(call("history", "tiny", "--json"))
    assert [(each["user"], each["action"], each["details"]) for each in actions] == [
        ("ada", "submit", "12 trials, priority 0 -> 5, owner team vision"),
        ("grace", "submit", "12 -> 20 trials, owner Grace"),
        ("grace", "pause", "running -> paused"),
        ("grace", "resume", "paused -> running"),
        ("grace", "cancel", "running -> cancelled"),
        ("grace", "priority", "5 -> -3"),
        ("grace", "retry", "2 failed attempts of shard 0-3"),
        ("grace", "discard", "trials 4-7: a broken GPU"),
    ]
    assert {(each["host"], each["memtail"]) for each in actions} == {(socket.gethostname(), version("memtail"))}
    assert re.search(r"grace +\S+ +\S+ +priority +5 -> -3", call("history"))
    for key in list(store.list(keys.audits("tiny")))[:2]:
        store.put(key, b"{")
    assert len(json.loads(call("history", "tiny", "--json"))) == 6
    store.delete(keys.experiment("tiny"))
    assert "a broken GPU" in call("history", "tiny")
    with pytest.raises(ObjectNotFound, match="there is no experiment 'other'"):
        call("history", "other")


def test_an_owner_is_recorded_and_shown_only_if_named(call, spec, store):
    call("submit", spec())
    assert b'"owner"' not in store.get(keys.experiment("tiny"))
    assert "owner" not in call("status")
    assert json.loads(call("submit", spec(), "--owner", "team vision", "--json"))["owner"] == "team vision"
    call("submit", spec(trials=20))
    experiment_store = ExperimentStore(store, "tiny")
    assert experiment_store.extend(24).owner == experiment_store.read_record().owner == "team vision"
    assert "team vision" in call("status")
    assert json.loads(call("status", "--json"))[0]["owner"] == "team vision"
    fail(experiment_store, SHARDS[0], 1)
    assert "owner: team vision" in call("failures")


@pytest.mark.parametrize("owner", ["", "two\nlines", "\x1b[31mred", "x" * 101])
def test_an_owner_is_one_printable_line(call, spec, store, owner):
    with pytest.raises(SpecError, match="give one line of 1 to 100 printable characters"):
        call("submit", spec(), "--owner", owner)
    assert not list(store.list(""))


def test_another_experiment_under_the_name_is_refused_before_its_dataset_is_staged(call, spec, store, tmp_path):
    call("submit", spec())
    held = list(store.list(""))
    other = write_arrays(tmp_path / "other.npz", test_images=np.zeros((20, 6, 6), np.uint8))
    with pytest.raises(StoreError, match=r"'tiny' is in the store .*dataset\.fingerprint .*choose another name"):
        call("submit", spec(dataset={"name": "arrays", "root": str(other)}))
    assert list(store.list("")) == held


def test_a_paused_experiment_stays_paused_when_submitted_again(call, spec, submitted):
    call("pause", "tiny")
    assert "paused: continue with memtail resume tiny" in call("submit", spec(), "--priority", 2)
    assert submitted.control() == Control("paused", 2)


def test_submit_does_not_need_the_device_of_the_workers(call, spec):
    call("submit", spec(execution={"trials_per_shard": 4, "device": "cuda:7"}))


def test_without_torch_submit_asks_for_the_trials_per_shard_and_checks_no_model(spec, store, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    result = command("submit", spec(execution={}), "--store", store.address)
    assert result.returncode == 2
    assert "trials_per_shard of experiment 'tiny' is auto, and torch is not installed here" in result.stderr.splitlines()[-1]
    assert not store.exists(keys.experiment("tiny"))
    result = command("submit", spec(), "--store", store.address)
    assert result.returncode == 0, result.stderr
    assert "model not checked: torch is not installed here" in result.stderr
    assert "12 in 3 shards of 4" in result.stdout


def test_state_and_priority_are_set_independently(call, submitted):
    call("priority", "tiny", "-3")
    assert submitted.control() == Control("running", -3)
    for name, state in (("pause", "paused"), ("cancel", "cancelled"), ("resume", "running")):
        text = call(name, "tiny")
        assert submitted.control() == Control(state, -3)
        assert state in text
    assert "priority -3" in text
    call("pause", "tiny")
    assert "paused" in call("priority", "tiny", 7)
    assert submitted.control() == Control("paused", 7)
    for name in ("pause", "cancel", "resume"):
        with pytest.raises(StoreError, match="there is no experiment 'nobody' in the store; there: tiny"):
            call(name, "nobody")
    assert not submitted.store.exists(keys.control("nobody"))


def test_status_shows_control_shards_failures_and_what_is_published(call, spec, submitted):
    call("submit", spec("other"), "--priority", 2)
    commit(submitted, SHARDS[0])
    publish_all(submitted)
    commit(submitted, SHARDS[1])
    fail(submitted, SHARDS[2], 3)
    fail(submitted, SHARDS[1], 1)  # its next attempt was committed
    other, tiny = json.loads(call("status", "--json"))
    assert (other["experiment"], other["state"], other["priority"], other["published"]) == ("other", "running", 2, None)
    wanted = {
        "state": "running", "ending": "dead", "priority": 0, "trials": 8, "wanted": 12, "shards_committed": 2, "shards_wanted": 3,
        "failed_attempts": 4, "dead_shards": ["8-11"], "published_trials": 4, "test_accuracy": 0.75,
    }  # fmt: skip
    assert {key: tiny[key] for key in wanted} == wanted
    assert 0 <= tiny["published_age"] < 60
    assert 0 < tiny["standard_error"] < 1
    assert (other["few_trials"], tiny["few_trials"][:37]) == (None, "These scores rest on only 4 trials: b")
    lines = [line.split() for line in call("status").splitlines()]
    assert lines[0][:7] == ["experiment", "state", "prio", "trials", "shards", "failed", "dead"]
    assert lines[2][:8] == ["tiny", "dead", "0", "8/12", "2/3", "4", "1", "4,"]
    assert lines[2][-3:-1] == ["few", "trials"]
    assert [row["experiment"] for row in json.loads(call("status", "tiny", "--json"))] == ["tiny"]


def test_an_unreadable_experiment_does_not_hide_the_others(call, spec, submitted):
    call("submit", spec("other"))
    key = keys.experiment("other")
    content = json.loads(submitted.store.get(key))
    content["experiment"]["training"]["new"] = 1
    submitted.store.put(key, json.dumps(content).encode())
    text = call("status")
    assert "tiny" in text.splitlines()[1]
    assert re.search(r"^other: cannot be read \(experiments/other/experiment.json: unknown key 'training.new'", text, re.MULTILINE)
    tiny, other = json.loads(call("status", "--json"))
    assert (tiny["experiment"], other["experiment"]) == ("tiny", "other")
    assert "unknown key" in other["error"]
    with pytest.raises(UnsupportedError, match="use the version that registered it"):
        call("status", "other")


def test_failures_are_a_table_or_tracebacks(call, submitted):
    assert "tiny: no failed attempts" in call("failures")
    fail(submitted, SHARDS[0], 3)
    fail(submitted, SHARDS[1], 1, "MemoryError: " + "x" * 300)
    commit(submitted, SHARDS[1])
    text = call("failures")
    rows = [line.split() for line in text.splitlines()]
    assert rows[0] == ["trials", "attempt", "when", "where", "now", "error"]
    assert rows[1][:3] == ["0-3", "1", "2026-01-02T03:04:05+00:00"]
    assert rows[3][1] == "3"
    assert "worker-7 on rack-3, cuda:1" in text
    assert "given up" in text
    assert "committed" in text
    assert "Traceback" not in text
    assert "retry with memtail retry tiny" in text
    assert "Some failed on rack-3 only" in text
    assert text.count("x") >= 300
    whole = call("failures", "tiny", "--traceback")
    assert whole.count("Traceback (most recent call last):\n  in forward") == 4
    assert "trials 0-3, attempt 3" in whole
    records = json.loads(call("failures", "--json"))
    assert [(record["shard"], record["attempt"], record["now"]) for record in records] == [
        ("0-3", 1, "given up"), ("0-3", 2, "given up"), ("0-3", 3, "given up"), ("4-7", 1, "committed")
    ]  # fmt: skip


def test_discard_removes_a_batch_and_keeps_the_reason(call, submitted):
    commit(submitted, SHARDS[1])
    with pytest.raises(ObjectNotFound, match="'tiny' has no trial batch 0-3"):
        call("discard", "tiny", "--shard", "0-3", "--why", "a test")
    assert "tiny: discarded trials 4-7; it is trained again" in call("discard", "tiny", "--shard", "4-7", "--why", "bad memory")
    assert not submitted.committed()
    ended, begun = submitted.store.list(keys.discards("tiny"))
    assert ended == keys.discard_end(begun)
    assert json.loads(submitted.store.get(begun))["why"] == "bad memory"


def test_retry_clears_the_failures_of_one_shard_or_of_all(call, submitted):
    for shard in SHARDS:
        fail(submitted, shard, 3)
    assert "cleared 3 failed attempts" in call("retry", "--shard", "4-7")
    assert set(submitted.attempts()) == {SHARDS[0], SHARDS[2]}
    assert "no failed attempts of shard 4-7" in call("retry", "tiny", "--shard", "4-7")
    call("pause", "tiny")
    assert "cleared 6 failed attempts" in (text := call("retry", "tiny"))
    assert "memtail resume tiny" in text
    assert not submitted.attempts()
    assert "tiny: no failed attempts" in call("retry")
    for wrong in ("4", "a-b", "4-", "4:7"):
        with pytest.raises(StoreError, match=f"--shard: '{wrong}' is not a shard: use FIRST-LAST"):
            call("retry", "--shard", wrong)


@pytest.fixture
def meanwhile(monkeypatch):
    """Replaces the pauses of `watch`: each one runs the next of some actions."""

    def arrange(*actions):
        left = iter(actions)
        monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: next(left)()))
        monkeypatch.setattr(watch, "_PLAIN_LINE_SECONDS", 0.0)
        return left

    return arrange


def test_watch_follows_an_experiment_until_its_scores_are_published(call, submitted, meanwhile):
    left = meanwhile(
        lambda: commit(submitted, SHARDS[1]),
        lambda: (publish_all(submitted), fail(submitted, SHARDS[0], 1)),
        lambda: commit(submitted, SHARDS[0], SHARDS[2]),
        lambda: None,
        lambda: publish_all(submitted),
    )
    lines = call("watch").splitlines()
    assert next(left, None) is None
    assert lines[0] == "tiny: 0/12 trials; running"
    assert lines[1].startswith("tiny: 4/12 trials; ")
    assert "trials/s" in lines[1]
    assert lines[1].endswith("left")
    assert re.search(r"; published 4 trials \d s ago, standard error 0\.\d{3}, few trials; 1 failed attempt$", lines[2])
    assert "12/12 trials; waiting for the scores; published 4 trials" in lines[3]
    assert "12/12 trials; done; published 12 trials" in lines[-1]
    assert "12/12 trials; done" in call("watch")


def test_watch_exits_with_1_where_all_missing_shards_are_dead(call, submitted, meanwhile):
    commit(submitted, SHARDS[0])
    meanwhile(lambda: fail(submitted, SHARDS[1], 3), lambda: fail(submitted, SHARDS[2], 3))
    lines = call("watch", "tiny", code=1).splitlines()
    assert "1 shard given up" in lines[1]
    assert lines[-1] == (
        "tiny: 8 of 12 trials are missing, their shards failed too often (4-7, 8-11): "
        "see memtail failures tiny --traceback, then memtail retry tiny"
    )


def test_watch_exits_with_1_where_an_experiment_is_cancelled_and_waits_for_a_paused_one(call, submitted, meanwhile):
    meanwhile(lambda: submitted.set_control(Control("paused")), lambda: submitted.set_control(Control("cancelled")))
    lines = call("watch", code=1).splitlines()
    assert lines[1] == "tiny: 0/12 trials; paused"
    assert lines[-1].endswith("it is cancelled: continue with memtail resume tiny")


def test_watch_exits_with_1_where_a_batch_was_refused(call, submitted, meanwhile):
    commit(submitted, *SHARDS)
    key = keys.trial_batch("tiny", 4, 7)
    meanwhile(lambda: fail(submitted, SHARDS[1], 1, f"{key}: is truncated or corrupt"))
    assert "the batches of trials 4-7 are damaged" in call("watch", code=1).splitlines()[-1]
    assert "refused" in call("failures")


def test_watch_counts_diverged_trials_as_done(call, submitted, meanwhile):
    meanwhile()
    commit(submitted, SHARDS[0], diverged=True)
    commit(submitted, *SHARDS[1:])
    publish_all(submitted)
    assert "12/12 trials; done; published 8 trials" in call("watch")


def test_watch_follows_all_experiments_until_the_last_ends(call, spec, submitted, meanwhile):
    call("submit", spec("other"))
    other = ExperimentStore(submitted.store, "other")
    meanwhile(
        lambda: (commit(other, *SHARDS), publish_all(other)), lambda: fail(submitted, SHARDS[0], 1), lambda: commit(submitted, *SHARDS),
        lambda: publish_all(submitted),
    )  # fmt: skip
    lines = call("watch").splitlines()
    assert sum(line.startswith("other: 12/12 trials; done") for line in lines) == 1
    assert lines[-1].startswith("tiny: 12/12 trials; done")


def test_watch_names_the_error_at_the_start_and_when_an_experiment_is_removed(call, store, spec, submitted, meanwhile):
    with pytest.raises(StoreError, match="there is no experiment 'nobody' in the store; there: tiny"):
        call("watch", "nobody")
    meanwhile(lambda: store.delete(keys.experiment("tiny")))
    with pytest.raises(ObjectNotFound, match="there is no experiment 'tiny'"):
        call("watch", "tiny")
    with pytest.raises(StoreError, match=r"there is no experiment in .*: submit one with memtail submit SPEC"):
        call("watch")


def test_the_rate_is_measured_over_the_last_minutes(submitted, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: clock.now))
    progress = progress_of(submitted.store, "tiny")
    followed = watch.Followed(progress)
    assert followed.pace() == "running"
    for clock.now, trials in ((10.0, 20), (700.0, 20), (900.0, 420)):
        followed.update(dataclasses.replace(progress, trials=trials))
    assert followed.rate == 2.0
    assert followed.pace() == "2.00 trials/s, 6.0 s left"


@pytest.fixture
def own_minio(tmp_path):
    """A server that the test may stop."""
    folder = tmp_path / "minio-of-its-own"
    folder.mkdir()
    with MinioServer(folder) as server:
        yield server


@pytest.fixture
def in_a_bucket(minio, monkeypatch):
    """A store in a bucket, configured in the environment."""
    for variable, value in minio.environment().items():
        monkeypatch.setenv(variable, value)
    return S3Store(minio.new_bucket(), "work", minio.settings())


def test_the_commands_work_on_a_bucket(in_a_bucket, spec, tmp_path):
    call = partial(invoke, in_a_bucket.address)
    experiment_store = ExperimentStore(in_a_bucket, "tiny")
    assert json.loads(call("submit", spec(), "--priority", 1, "--json"))["staged"] is True
    assert "already staged" in call("stage", spec())
    commit(experiment_store, *SHARDS[:2])
    fail(experiment_store, SHARDS[2], 3)
    assert "dead" in call("status")
    assert "given up" in call("failures")
    assert "shards failed too often (8-11)" in call("watch", code=1)
    call("retry")
    call("pause", "tiny")
    assert experiment_store.control() == Control("paused", 1)
    commit(experiment_store, SHARDS[2])
    publish_all(experiment_store)
    assert "12/12 trials; done" in call("watch")
    call("scores", "tiny", "--fetch", tmp_path / "fetched")
    assert json.loads((tmp_path / "fetched" / "summary.json").read_text())["trials"] == 12


def test_watch_retries_during_an_outage_of_the_store(own_minio, spec, meanwhile, monkeypatch):
    for variable, value in own_minio.environment().items():
        monkeypatch.setenv(variable, value)
    store = S3Store(own_minio.new_bucket(), "work", own_minio.settings())
    experiment_store = ExperimentStore(store, "tiny")
    runner = CliRunner()
    assert runner.invoke(app, ["submit", str(spec()), "--store", store.address]).exit_code == 0
    meanwhile(
        own_minio.stop, lambda: None, lambda: (own_minio.start(), commit(experiment_store, *SHARDS)), lambda: publish_all(experiment_store)
    )  # fmt: skip
    result = runner.invoke(app, ["watch", "--store", store.address])
    assert result.exit_code == 0, (result.output, result.exception)
    lines = result.stdout.splitlines()
    assert lines[1].startswith("store unreachable, retrying (")
    assert "refused" in lines[1]
    assert sum("unreachable" in line for line in lines) == 1
    assert "12/12 trials; waiting for the scores" in lines[2]
    assert "done" in lines[-1]


def test_doctor_accepts_a_machine_without_torch_but_not_one_with_half_of_the_packages(monkeypatch, tmp_path):
    def examined(*missing):
        def version(name):
            if name in missing:
                raise PackageNotFoundError(name)
            return "1.0"

        monkeypatch.setattr(doctor, "version", version)
        return {check.name: check for check in examine(tmp_path)}

    without = examined("torch", "torchvision", "scikit-learn")
    assert all(check.fine for check in without.values())
    assert "pip install 'memtail[train]'" in without["training"].finding
    assert [check.name for check in examined("torchvision").values() if not check.fine] == ["torchvision"]


def until_answers(port):
    end = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.02)


def _broker(monkeypatch, tmp_path, url):
    monkeypatch.setenv("MEMTAIL_BROKER", url)
    return next(check for check in examine(tmp_path) if check.name == "broker")


def test_doctor_checks_a_configured_broker_and_never_shows_its_password(monkeypatch, tmp_path):
    assert not [check for check in examine(tmp_path) if check.name == "broker"]
    monkeypatch.setattr(doctor, "_BROKER_TIMEOUT", 0.2)
    server = RedisServer()
    server.start()
    try:
        check = _broker(monkeypatch, tmp_path, server.url)
        assert check.fine
        prefix = key_prefix(str(tmp_path), make_identity(LocalStore(tmp_path)))
        assert check.finding == f"Redis at 127.0.0.1:{server.port} answers; keys of this store begin with {prefix}"
        assert not server.client().keys("*")
        (tmp_path / "url").write_text(server.url)
        monkeypatch.setenv("MEMTAIL_BROKER_FILE", str(tmp_path / "url"))
        assert _broker(monkeypatch, tmp_path, "").fine
        monkeypatch.delenv("MEMTAIL_BROKER_FILE")
        for url, message in (
            (server.url.replace(server.password, "wrong-secret"), f"Redis at 127.0.0.1:{server.port} refuses the password"),
            (f"redis://127.0.0.1:{server.port}/0", "refuses the password"),
            (f"redis://:a-secret@127.0.0.1:{free_port()}/0", "does not answer (Error 111"),
            ("redis://:a-secret@no-such-host.invalid/0", "no-such-host.invalid:6379 does not answer"),
            ("redis://:a/secret@127.0.0.1:1/0", "is not a Redis URL: use redis://:PASSWORD@HOST:PORT/0"),
            ("sentinel://:a-secret@127.0.0.1:26379/0", "is the URL of a Redis Sentinel: use a single server"),
            ("redis://secret/password@127.0.0.1:1/0", "is not a Redis URL"),
            ("redis://:a#secret@127.0.0.1:1/0", "is not a Redis URL"),
            ("redis://:a-secret@127.0.0.1:port/0", "is not a Redis URL"),
            ("http://:a-secret@127.0.0.1", "is not a Redis URL"),
            ("redis://:a-secret@127.0.0.1/0?colour=red", "is not a Redis URL"),
        ):
            check = _broker(monkeypatch, tmp_path, url)
            assert not check.fine
            assert message in check.finding
            assert "secret" not in check.finding
            assert "\n" not in check.finding
    finally:
        server.stop()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        check = _broker(monkeypatch, tmp_path, f"redis://:a-secret@127.0.0.1:{silent.getsockname()[1]}/0")
    assert not check.fine
    assert "does not answer" in check.finding
    assert "secret" not in check.finding


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (["+@all", "-@scripting", "~*"], "has no permissions to run the 'eval' command"),
        (["+@all", "-info", "~*"], "has no permissions to run the 'info"),
        (["+@all", "~memtail:*"], "no permissions to access one of the keys"),
        (["+@all", "-time", "~*"], "time"),
    ],
)
def test_doctor_names_what_a_redis_user_may_not_do(monkeypatch, tmp_path, rules, message):
    server = RedisServer()
    server.start()
    try:
        server.client().execute_command("ACL", "SETUSER", "limited", "on", ">a-secret", *rules)
        check = _broker(monkeypatch, tmp_path, f"redis://limited:a-secret@127.0.0.1:{server.port}/0")
        assert not check.fine
        assert check.finding.startswith(f"Redis at 127.0.0.1:{server.port} refuses what the services do (")
        assert message.lower() in check.finding.lower()
        prefix = key_prefix(str(tmp_path), make_identity(LocalStore(tmp_path)))
        assert f"allow its user all commands on keys that begin with {prefix}" in check.finding
        assert "secret" not in check.finding
        assert "\n" not in check.finding
        enough = ["reset", "on", ">a-secret", "+@all", "-@dangerous", "+info", f"~{prefix}*"]
        server.client().execute_command("ACL", "SETUSER", "limited", *enough)
        assert _broker(monkeypatch, tmp_path, f"redis://limited:a-secret@127.0.0.1:{server.port}/0").fine
    finally:
        server.stop()


@pytest.mark.parametrize("mode", ["cluster", "sentinel"])
def test_doctor_refuses_a_redis_cluster_and_a_sentinel(monkeypatch, tmp_path, mode):
    port, configuration = free_port(), tmp_path / "sentinel.conf"
    configuration.write_text("")
    options = [configuration, "--sentinel"] if mode == "sentinel" else ["--cluster-enabled", "yes", "--dir", tmp_path]
    command = [server_binary("redis-server"), *options, "--port", str(port), "--bind", "127.0.0.1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        until_answers(port)
        check = _broker(monkeypatch, tmp_path, f"redis://127.0.0.1:{port}/0")
        assert not check.fine
        assert f"runs as a {mode}: use a single server" in check.finding
    finally:
        process.terminate()
        process.wait()


def test_keys_in_redis_begin_with_a_digest_of_the_identity_and_the_address_of_the_store(minio):
    bucket, other = minio.new_bucket(), minio.new_bucket()

    def prefix(bucket, folder="", **settings):
        store = S3Store(bucket, folder, settings=minio.settings(**settings))
        return key_prefix(store.address, make_identity(store))

    assert re.fullmatch("memtail2:[0-9a-f]{8}:", prefix(bucket))
    assert prefix(bucket) == prefix(bucket, endpoint=minio.endpoint.replace("127.0.0.1", "localhost"))
    copied = S3Store(bucket, settings=minio.settings()).get(keys.identity())
    S3Store(other, settings=minio.settings()).put(keys.identity(), copied)
    assert len({prefix(bucket), prefix(bucket, "folder"), prefix(other)}) == 3


def test_a_store_has_one_identity_whoever_makes_it_first(tmp_path):
    store = LocalStore(tmp_path)
    assert read_identity(store) is None
    with ThreadPoolExecutor(8) as pool:
        made = set(pool.map(lambda _: make_identity(store), range(16)))
    assert made == {read_identity(store)}
    store.put(keys.identity(), b"any bytes")
    assert make_identity(store) == b"any bytes"


def test_bad_input_is_one_line_and_exit_code_2(spec, tmp_path):
    store = tmp_path / "store"
    for arguments, message in (
        (["stage", spec(), "--store", "gs://bucket"], "gs://bucket is not the address of a store"),
        (["pause", "tiny", "--store", store], f"there is no store at {store}"),
        (["submit", tmp_path / "missing.yaml", "--store", store], "missing.yaml: cannot be read"),
    ):
        result = command(*arguments)
        assert result.returncode == 2
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert not store.exists()
