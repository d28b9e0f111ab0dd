"""Environment of trainer processes, and the files and folders that Landlock leaves to them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from memtail.trainers import confinement, landlock
from memtail.trainers.confinement import restricted_paths, trainer_environment
from memtail.trainers.landlock import Access

needs_landlock = pytest.mark.skipif(not landlock.version(), reason="needs Landlock")


@pytest.fixture
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


def restricted(environment, tmp_path, store=None, dataset="dataset"):
    return restricted_paths(environment, store, tmp_path / dataset, tmp_path / "code", tmp_path / "scratch")


def test_the_environment_has_no_credentials_of_stores_brokers_and_clouds(tmp_path):
    secrets = ["MEMTAIL_STORE", "MEMTAIL_BROKER", "MEMTAIL_S3_SECRET_KEY", "MEMTAIL_EXPLORER_TOKEN", "AWS_PROFILE", "AZURE_CLIENT_SECRET"]
    secrets += ["GOOGLE_APPLICATION_CREDENTIALS", "KUBECONFIG", "REDIS_URL", "CELERY_BROKER_URL", "aws_secret_access_key"]
    environment = dict.fromkeys([*secrets, "HF_TOKEN", "CUDA_VISIBLE_DEVICES", "MEMTAIL_DATA"], "value")
    kept = trainer_environment(environment, tmp_path)
    assert not [name for name in secrets if name in kept]
    assert kept["HF_TOKEN"] == kept["CUDA_VISIBLE_DEVICES"] == kept["MEMTAIL_DATA"] == "value"
    assert kept["TMPDIR"] == str(tmp_path)


def test_relative_folders_of_the_python_path_stay_those_of_this_process(tmp_path):
    kept = trainer_environment({"PYTHONPATH": os.pathsep.join(["lib", "", "/abs"])}, tmp_path)
    assert kept["PYTHONPATH"] == os.pathsep.join([str(Path.cwd() / "lib"), "/abs"])


def test_key_files_of_the_environment_and_of_the_home_folder_are_left_out(tmp_path, home):
    environment = {
        "MEMTAIL_S3_SECRET_KEY_FILE": "/keys/s3",
        "MEMTAIL_BROKER_FILE": "/keys/broker",
        "AWS_WEB_IDENTITY_TOKEN_FILE": "/keys/token",
        "GOOGLE_APPLICATION_CREDENTIALS": "/keys/google.json",
        "KUBECONFIG": "/keys/one:/keys/two",
        "MEMTAIL_HEARTBEAT_FILE": "/tmp/heartbeat",
        "MEMTAIL_S3_CA_FILE": "/keys/ca.crt",
        "OTHER_FILE": "/other",
    }
    left_out = {str(path) for path, access in restricted(environment, tmp_path).items() if access is Access.NONE}
    named = {"/keys/s3", "/keys/broker", "/keys/token", "/keys/google.json", "/keys/one", "/keys/two", "/run/secrets", "/var/run/secrets"}
    assert left_out == named | {str(home / name) for name in (".aws", ".azure", ".config/gcloud", ".docker", ".kube", ".mc")}


def test_a_store_in_a_folder_is_left_out_and_its_folder_may_hold_the_code(tmp_path, home):
    accesses = restricted({}, tmp_path, store=str(tmp_path / "code"))
    assert accesses[tmp_path / "code" / "experiments"] is Access.NONE
    assert accesses[tmp_path / "code"] is Access.ALL
    assert not [path for path in restricted({}, tmp_path, store="s3://bucket/prefix") if "bucket" in str(path)]


def test_a_kernel_without_landlock_is_mentioned_once(monkeypatch):
    from structlog.testing import capture_logs

    monkeypatch.setattr(landlock, "_call", _refuse)
    confinement.has_landlock.cache_clear()
    with capture_logs() as events:
        assert not confinement.has_landlock()
        assert not confinement.has_landlock()
    confinement.has_landlock.cache_clear()
    assert [event["log_level"] for event in events] == ["info"]


def _refuse(*_):
    raise OSError(38, "Function not implemented")


def restricting(accesses, script):
    """What a process that restricts itself prints as JSON."""
    program = f"""if True:
        import json, os
        from pathlib import Path
        from memtail.trainers.landlock import Access, restrict
        restrict({{Path(path): Access(access) for path, access in json.loads({json.dumps(json.dumps(accesses))}).items()}})
        def attempt(act):
            try:
                act()
            except OSError as error:
                return error.strerror
            return "done"
    """
    program += "\n".join("    " + line for line in script.strip().splitlines())
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


@needs_landlock
def test_folders_within_one_another_have_the_access_of_the_innermost(tmp_path):
    for name in ("none/read", "none/read/all", "none/other", "read", "beside"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "file").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "none" / "other")
    accesses = {"none": Access.NONE, "none/read": Access.READ, "none/read/all": Access.ALL, "read": Access.READ, "missing": Access.NONE}
    seen = restricting(
        {str(tmp_path / path): int(access) for path, access in accesses.items()},
        f"""
    base = Path({str(tmp_path)!r})
    folders = ["none", "none/other", "link", "none/read", "none/read/all", "read", "beside"]
    print(json.dumps({{f: [attempt((base / f / "file").read_text), attempt(lambda: (base / f / "new").write_text("x"))] for f in folders}}))
    """,
    )
    no, yes = "Permission denied", "done"
    assert seen.pop("none") == [no, no] or not (tmp_path / "none" / "file").exists()
    expected = {
        "none/other": [no, no],
        "link": [no, no],
        "none/read": [yes, no],
        "none/read/all": [yes, yes],
        "read": [yes, no],
        "beside": [yes, yes],
    }
    assert seen == expected


@needs_landlock
def test_files_move_between_folders_and_out_of_no_forbidden_one(tmp_path):
    for name in ("one", "two", "read"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    seen = restricting(
        {str(tmp_path / "read"): int(Access.READ)},
        f"""
    base = Path({str(tmp_path)!r})
    moves = [("one/one", "two/one"), ("read/read", "two/read"), ("two/two", "read/two")]
    truncated = attempt(lambda: os.truncate(base / "read" / "read", 0))
    print(json.dumps([truncated, *(attempt(lambda: os.rename(base / a, base / b)) for a, b in moves)]))
    """,
    )
    assert seen[0] == ("Permission denied" if landlock.version() >= 3 else "done")
    assert seen[1:] == ["done", "Permission denied", "Permission denied"]


@needs_landlock
def test_a_folder_that_cannot_be_listed_leads_to_those_that_are_named(tmp_path):
    if os.getuid() == 0:
        pytest.skip("the superuser can list every folder")
    (tmp_path / "shut" / "home" / "secret").mkdir(parents=True)
    (tmp_path / "shut" / "home" / "file").touch()
    (tmp_path / "shut").chmod(0o311)
    accesses = {str(tmp_path / "shut" / "home"): int(Access.ALL), str(tmp_path / "shut" / "home" / "secret"): int(Access.NONE)}
    seen = restricting(accesses, f"print(json.dumps(attempt(Path({str(tmp_path)!r}, 'shut', 'home', 'file').read_bytes)))")
    (tmp_path / "shut").chmod(0o700)
    assert seen == "done"
