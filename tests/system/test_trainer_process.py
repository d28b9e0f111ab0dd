"""User code in a trainer process: what it sees, and what it costs when it is faulty or hostile."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from structlog.testing import capture_logs

from memtail.errors import TrainerError, TrainingStopped
from memtail.execution.declare import declare
from memtail.experiment_store import ExperimentStore
from memtail.spec import Experiment
from memtail.storage.local import LocalStore
from memtail.trainers import landlock, limits
from memtail.trainers.process import TrainerProcess
from memtail.trainers.work import Work
from memtail.trials import Shard
from tests.support.checkpoints import KeptCheckpoints
from tests.support.cli import MEMTAIL

CODE = Path(__file__).parents[1] / "support"
TRIALS = 4

needs_landlock = pytest.mark.skipif(not landlock.version(), reason="needs Landlock")


def hostile(digits, acts, timeout=None, **options):
    trainer = {"function": "hostile_trainer:train", "options": {"acts": acts, **options}, "folder": CODE, "timeout": timeout}
    spec = {"name": "hostile", "dataset": {"name": "digits"}, "trainer": trainer, "subsets": {"trials": TRIALS, "design": "balanced"}}
    record = declare(Experiment.parse(spec), digits, 2)
    return Work(record, digits, Shard(0, 1), CODE)


def train(trainer, work, checkpoints=None, stop=lambda: False, on_step=lambda: None):
    return trainer.train(work, checkpoints or KeptCheckpoints(), on_progress=lambda fraction: None, on_step=on_step, stop=stop)


@pytest.fixture
def temporary(monkeypatch):
    """A folder of temporary files whose name is short, as sockets need it."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="t") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


@pytest.fixture
def trainer(temporary):
    """A trainer that leaves no process and no folder."""
    made = TrainerProcess("cpu")
    yield made
    made.end()
    assert not list(temporary.iterdir())
    assert not [pid for pid in map(int, (path.name for path in Path("/proc").glob("[0-9]*"))) if is_running(pid) and _in(pid, temporary)]


@pytest.fixture
def file(tmp_path):
    """A file that user code may write, which is not beside the store."""
    (tmp_path / "results").mkdir()
    return tmp_path / "results" / "file"


def _in(pid, folder):
    try:
        return str(folder).encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def own_score():
    """How readily the kernel kills this process for want of memory."""
    return int(Path("/proc/self/oom_score_adj").read_text())


def causes(error):
    return str(error.__cause__)


FATAL = {
    "exit_0": "the trainer process ended with exit code 0",
    "exit_3": "the trainer process ended with exit code 3",
    "leave_python": "trainer.function 'hostile_trainer:train' failed: SystemExit: 0 (",
    "killed": "the trainer process was ended by SIGKILL: out of memory, or killed",
    "bus_error": "the trainer process was ended by SIGBUS: /dev/shm may be too small for the workers of a DataLoader",
    "segfault": "the trainer process was ended by SIGSEGV: a crash in native code",
    "fail": "trainer.function 'hostile_trainer:train' failed: RuntimeError: ? of the code (",
    "no_outcome": "trial 1 of hostile_trainer:train: the trainer returned dict, not a memtail.Outcome",
    "stop_unasked": "the code raised memtail.TrainingStopped although it was not told to stop",
    "blame_the_worker": "not mine",
    "blame_the_version": "not mine",
    "close_the_connection": "the trainer process ended with exit code 1",
    "send_garbage": "the trainer process sent no message",
    "send_text": "the trainer process sent no message",
    "forge_a_batch": "the trainer process returned what is no batch",
}


@pytest.mark.parametrize(("act", "message"), FATAL.items(), ids=FATAL)
def test_fatal_code_costs_its_shard_and_says_why(trainer, digits, act, message):
    with pytest.raises(TrainerError) as caught:
        train(trainer, hostile(digits, {"1": act}))
    assert type(caught.value) is TrainerError
    assert str(caught.value).startswith(message)
    expected = {"exit_3": "before the end", "segfault": "in segfault", "fail": "in fail"}  # output, stack of a crash, traceback
    assert expected.get(act, "") in causes(caught.value)


def test_a_trainer_goes_on_after_a_fatal_shard(trainer, digits):
    work = hostile(digits, {"0": "exit_3"})
    with pytest.raises(TrainerError):
        train(trainer, work)
    assert train(trainer, Work(work.record, digits, Shard(2, 3), CODE)).trial.tolist() == [2, 3]


def test_harmless_oddities_cost_nothing(trainer, digits):
    acts = {"0": "change_the_folder", "1": "remove_the_folder", "2": "replace_the_output", "3": "leave_a_thread"}
    work = hostile(digits, acts)
    for shard in (Shard(0, 1), Shard(2, 3)):
        assert train(trainer, Work(work.record, digits, shard, CODE)).trial.tolist() == list(shard.trials)


@pytest.mark.parametrize("act", ["leave_children", "leave_children_and_die"])
def test_no_child_outlives_its_trainer_process(trainer, digits, file, act):
    work = hostile(digits, {"1": act, "0": "lock_a_folder"}, file=str(file))
    if act == "leave_children":
        train(trainer, work)
    else:
        with pytest.raises(TrainerError):
            train(trainer, work)
    children = json.loads(file.read_text())
    assert len(children) == 4
    trainer.end()
    assert not any(map(is_running, children))


def test_trainer_processes_end_when_the_process_that_started_them_is_killed(digits, file, temporary):
    script = f"""if True:
        import os, signal
        from memtail.datasets import ImageDataset
        from tests.system.test_trainer_process import *
        digits = ImageDataset.open(Path({str(digits.folder)!r}))
        train(TrainerProcess("cpu"), hostile(digits, {{"1": "leave_children"}}, file={str(file)!r}))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    started = subprocess.run([sys.executable, "-c", script], env={**os.environ, "TMPDIR": str(temporary)}, check=False)
    assert started.returncode == -signal.SIGKILL
    children = json.loads(file.read_text())
    until = time.monotonic() + 10
    while any(map(is_running, children)) or list(temporary.glob("memtail-*")):
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("act", ["hang", "hang_in_native_code", "send_half", "send_much"])
def test_code_that_hangs_is_ended_at_the_timeout(trainer, digits, act):
    train(trainer, hostile(digits, {}))  # imports take longer than the timeout
    began = time.monotonic()
    with pytest.raises(TrainerError, match=r"longer than trainer.timeout, 4 s"):
        train(trainer, hostile(digits, {"1": act}, timeout=4))
    assert time.monotonic() - began < 30


def test_code_that_ignores_a_stop_is_killed(trainer, digits, file, monkeypatch):
    monkeypatch.setattr(limits, "_STOP_SECONDS", 0.5)
    with pytest.raises(TrainingStopped):
        train(trainer, hostile(digits, {"0": "ignore_signals"}, file=str(file)), stop=file.exists)
    assert trainer._guardian is None


def test_the_end_of_the_output_is_kept_at_a_timeout(trainer, digits):
    train(trainer, hostile(digits, {}))
    with pytest.raises(TrainerError, match="longer than") as caught:
        train(trainer, hostile(digits, {"1": "print_and_hang"}, timeout=3))
    assert "before the hang" in causes(caught.value)


def test_a_flood_of_output_is_bounded(trainer, digits):
    began = time.monotonic()
    with capture_logs() as events, pytest.raises(TrainerError, match="printed") as caught:
        train(trainer, hostile(digits, {"0": "print_much"}, mib=1024))
    assert time.monotonic() - began < 60
    assert len([event for event in events if event["event"] == "trainer"]) == 1000
    assert [event["event"] for event in events if event["log_level"] == "warning"] == ["trainer prints too much, the rest is left out"]
    assert "the last line" in causes(caught.value)
    assert 64 << 10 <= len(causes(caught.value)) < 70 << 10


@needs_landlock
def test_user_code_sees_no_credentials_and_no_store(trainer, digits, tmp_path, file, monkeypatch):
    store, key = tmp_path / "store", tmp_path / "keys" / "secret"
    LocalStore(store).put("experiments/other/experiment.json", b"{}")
    key.parent.mkdir()
    key.write_text("secret")
    (key.parent / "other").write_text("harmless")
    monkeypatch.setenv("MEMTAIL_S3_SECRET_KEY_FILE", str(key))
    for name in ("MEMTAIL_S3_SECRET_KEY", "AWS_SECRET_ACCESS_KEY", "MEMTAIL_BROKER", "MEMTAIL_STORE"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("HF_TOKEN", "of the code")
    object_file = store / "experiments" / "other" / "experiment.json"
    dataset = digits.folder / "train_labels.npy"
    forbidden = [str(key), str(object_file)]
    work = hostile(
        digits,
        {"0": "look"},
        file=str(file),
        read=[*forbidden, str(key.parent / "other"), str(dataset)],
        write=[
            str(store / "experiments" / "new"),
            str(store / "new"),
            str(digits.folder / "new"),
            str(tmp_path / "results" / "new"),
            "new",
        ],
        remove=[str(object_file), str(object_file.parent), str(dataset)],
    )
    train(trainer, replace(work, store=str(store)))
    seen = json.loads(file.read_text())
    assert not [name for name, value in seen["environment"].items() if "secret" in value or name.startswith(("MEMTAIL_S3", "AWS_"))]
    assert seen["environment"]["HF_TOKEN"] == "of the code"
    others = {number: target for number, target in seen["open"].items() if int(number) > 2}
    assert len([target for target in others.values() if target.startswith("socket:")]) == 1
    assert not [target for target in others.values() if str(tmp_path) in target or "pipe:" in target]
    assert seen["open"]["0"] == "/dev/null"
    assert seen["parents"] == ["Permission denied"] * 4
    assert seen["files of parents"] == ["Permission denied"] * 2
    assert seen["out of memory"] > own_score()
    if landlock.version() >= 6:
        assert seen["signals"] == ["Operation not permitted"] * 2
    denied = "Permission denied"
    assert list(seen["read"].values()) == [denied, denied, "done", "done"]
    assert list(seen["append"].values()) == [denied, denied, "done", denied]
    assert list(seen["write"].values()) == [denied, denied, denied, "done", "done"]
    assert set(seen["remove"].values()) == {denied}
    assert set(seen["use"].values()) == {"done"}, seen["use"]


def test_a_process_that_starts_user_code_is_not_dumpable(tmp_path):
    script = "from memtail.processes import hide; import ctypes; hide(); print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"
    assert subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True).stdout == b"0\n"


def test_a_run_with_hostile_shards_trains_the_others_and_records_what_happened(tmp_path, file, temporary):
    acts = {"2": "exit_3", "5": "leave_children_and_die", "6": "segfault", "8": "fail"}
    options = {"acts": acts, "file": str(file)}
    spec = {
        "name": "hostile",
        "dataset": {"name": "digits"},
        "trainer": {"function": "hostile_trainer:train", "options": options, "folder": str(CODE)},
        "subsets": {"trials": 12, "design": "balanced"},
        "execution": {"trials_per_shard": 2},
    }
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [*MEMTAIL, "run", str(tmp_path / "spec.yaml"), "--store", str(tmp_path / "store")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2, run.stderr
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("memtail: ")]
    assert "4 shards failed 2 to 3 times each and are missing from the scores" in line
    experiment_store = ExperimentStore(LocalStore(tmp_path / "store"), "hostile")
    assert [shard.first for shard in experiment_store.committed()] == [0, 10]
    errors = {shard.first: list(experiment_store.failures(shard)) for shard in (Shard(2, 3), Shard(4, 5), Shard(6, 7))}
    assert errors[2][0].error == "the trainer process ended with exit code 3"
    assert "before the end" in errors[2][0].traceback
    assert errors[6][0].error.startswith("the trainer process was ended by SIGSEGV")
    assert len(list(experiment_store.failures(Shard(8, 9)))) == 2  # at one place
    assert not any(map(is_running, json.loads(file.read_text())))
    assert not list(temporary.glob("memtail-*"))
