"""The command line on a store in a bucket."""

import json

import pytest
import torch

import memtail
from memtail.errors import ScoresError, StoreError
from memtail.scores.fetch import open_scores
from memtail.storage.s3 import S3Store
from tests.support.cli import batches, command, version
from tests.support.cli import write_spec as spec
from tests.support.explored import publish_random
from tests.support.fake_s3 import FakeS3

FEW = {"trials": 10, "design": "balanced", "fraction": 0.5}


@pytest.fixture(scope="module")
def in_a_bucket(minio, tmp_path_factory):
    """The address of a store with a finished run, the environment to use it in, and the run's folder and output."""
    folder, address = tmp_path_factory.mktemp("bucket"), f"s3://{minio.new_bucket()}/runs"
    environment = {**minio.environment(), "MEMTAIL_CACHE": str(folder / "cache")}
    result = command("run", spec(folder, subsets=FEW, record={"models": 2}), "--store", address, env=environment)
    assert result.returncode == 0, result.stderr
    return address, environment, folder, result.stdout


def test_a_run_in_a_bucket_gives_the_bits_of_a_run_in_a_folder(in_a_bucket, minio, tmp_path):
    address, environment, _, text = in_a_bucket
    assert "10/10 trials" in text
    assert "most memorized" in text
    assert f"memtail top digits --store {address}" in text  # without --pairs: so few trials select none
    assert command("run", spec(tmp_path, subsets=FEW), "--store", tmp_path / "store").returncode == 0
    result = command("scores", "--fetch", tmp_path / "copy", "--store", address, "--json", env=environment)
    assert result.returncode == 0
    assert json.loads(result.stdout)["folder"] == str(tmp_path / "copy")
    wanted = version(tmp_path / "store")
    assert sorted(path.name for path in wanted.iterdir()) == sorted(path.name for path in (tmp_path / "copy").iterdir())
    assert all((tmp_path / "copy" / path.name).read_bytes() == path.read_bytes() for path in wanted.iterdir())
    bucket, prefix = address.removeprefix("s3://").split("/")
    keys = list(S3Store(bucket, prefix, minio.settings()).list(""))
    trials = [key.rpartition("/")[2] for key in keys if key.startswith("experiments/digits/trials/")]
    assert trials == [batch.name for batch in batches(tmp_path / "store")]
    assert not any(key.startswith("probe/") or "/checkpoints/" in key for key in keys)


def test_models_in_a_bucket_are_those_in_a_folder(in_a_bucket, tmp_path, monkeypatch):
    address, environment, _, _ = in_a_bucket
    assert command("run", spec(tmp_path, subsets=FEW, record={"models": 2}), "--store", tmp_path / "store").returncode == 0
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for trial in range(2):
        models = [memtail.load_model(f"{store}/experiments/digits", trial) for store in (address, tmp_path / "store")]
        assert models[0].about == models[1].about
        assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))
    with pytest.raises(memtail.ObjectNotFound, match="keeps no model of trial 2"):
        memtail.load_model(f"{address}/experiments/digits", 2)


def test_a_second_run_trains_nothing(in_a_bucket):
    address, environment, folder, _ = in_a_bucket
    result = command("run", spec(folder, subsets=FEW), env={**environment, "MEMTAIL_STORE": address})
    assert result.returncode == 0
    assert "all from the store" in result.stdout


def test_read_only_commands_accept_a_bucket(in_a_bucket):
    address, environment, _, _ = in_a_bucket
    here = {**environment, "MEMTAIL_STORE": address}
    status = json.loads(command("status", "--json", env=here).stdout)
    assert [(row["experiment"], row["trials"], row["published_trials"]) for row in status] == [("digits", 10, 10)]
    top = [json.loads(command("top", *options, "--json", env=here).stdout) for options in ((), ("--influencers-of", "3"), ("--pairs",))]
    assert [len(rows) for rows in top] == [10, 10, 0]  # so few trials select no pairs
    listed = command("scores", env=here).stdout.splitlines()
    assert f"{address}/experiments/digits/scores/" in listed[1]
    assert listed[1].rpartition("/")[2] == "high_infl_pairs_infl0.15_mem0.25.npz"
    assert command("top", "nobody", env=here).stderr.startswith("memtail: there is no experiment 'nobody'")
    assert command("doctor", env=here).returncode == 0


def test_scores_are_copied_to_the_cache_once(in_a_bucket):
    address, environment, folder, _ = in_a_bucket
    assert command("top", "--store", address, env=environment).returncode == 0
    files = {path: path.stat().st_mtime_ns for path in (folder / "cache" / "scores").rglob("*.*")}
    assert any(path.name == "memorization.parquet" for path in files)
    assert command("top", "--store", address, env=environment).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in (folder / "cache" / "scores").rglob("*.*")} == files


def test_a_notebook_loads_scores_from_a_bucket(in_a_bucket, monkeypatch):
    address, environment, _, _ = in_a_bucket
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    scores = memtail.load_scores(f"{address}/experiments/digits")
    assert scores.summary["trials"] == 10
    assert len(scores.memorization["mem"]) == 1438
    with pytest.raises(ScoresError, match="experiment 'nobody' has no published scores"):
        memtail.load_scores(f"{address}/experiments/nobody")
    with pytest.raises(StoreError, match="is not the address of a store"):
        memtail.load_scores("gs://bucket/experiments/digits")


def test_an_unusable_bucket_is_reported_in_one_line(in_a_bucket, tmp_path):
    environment = in_a_bucket[1]
    for arguments in (("status",), ("run", spec(tmp_path))):
        result = command(*arguments, "--store", "s3://not-there", env=environment)
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == 1
        assert "NoSuchBucket" in result.stderr
        result = command(*arguments, "--store", "gs://bucket", env=environment)
        assert result.returncode == 2
        assert result.stderr.startswith("memtail: gs://bucket is not the address of a store")


def test_warnings_of_transient_failures_do_not_mix_with_the_output(in_a_bucket):
    with FakeS3(failures=[(503, "SlowDown")]) as server:
        environment = {**in_a_bucket[1], "MEMTAIL_S3_ENDPOINT": server.settings().endpoint}
        result = command("status", "--json", "--store", "s3://bucket", env=environment)
    assert result.returncode == 0
    assert json.loads(result.stdout) == []
    assert "trying again" in result.stderr


def test_the_cache_keeps_the_latest_and_the_previous_scores(minio, declare, tmp_path, monkeypatch):
    monkeypatch.setenv("MEMTAIL_CACHE", str(tmp_path))
    store = S3Store(minio.new_bucket(), settings=minio.settings())
    for trials in (20, 30, 40):
        publish_random(store, declare(40), trials)
        assert open_scores(store, "digits").summary["trials"] == trials
    assert sorted(int(folder.name.partition("-")[0]) for folder in tmp_path.glob("scores/*/digits/*")) == [30, 40]
