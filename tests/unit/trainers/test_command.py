"""Commands as trainers: what they are given, and how each way to end is described."""

import json
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from memtail.datasets import prepare
from memtail.errors import OutcomeError, TrainerError, TrainingStopped
from memtail.spec import CommandTrainer, DatasetSpec, RecordedOutcomes
from memtail.trainers import command as module
from memtail.trainers.command import Command, describe_exit
from memtail.trainers.outcomes import check_outcome
from memtail.trainers.task import Outcome, TrainingTask


@pytest.fixture
def task(tmp_path, digits):
    folder = tmp_path / "7"
    for name in ("work", "checkpoint"):
        (folder / name).mkdir(parents=True)
    options, reported, saved = {"lr": 0.1}, [], []

    def make(stop=lambda: False):
        made = TrainingTask(
            7, np.array([1, 5, 9]), 2**62 + 1, "cuda:1", options, digits, folder / "work", folder / "checkpoint",
            lambda fraction, metrics: reported.append(fraction), lambda: saved.append(True), stop,
        )  # fmt: skip
        made.options["reported"], made.options["saved"] = reported, saved
        return made

    return make


@pytest.fixture
def run(tmp_path, task):
    def run(script, *arguments, stop=lambda: False):
        (tmp_path / "train.py").write_text("import json, os, sys, time\nimport numpy as np\n" + textwrap.dedent(script))
        command = Command(CommandTrainer(command=[sys.executable, "train.py", *arguments]), tmp_path)
        (outcome,) = command([task(stop)])
        return outcome

    return run


WRITE = """
task = json.load(open(os.environ["MEMTAIL_TASK"] + "/task.json"))
np.savez(task["outcome"], train_correct=np.ones(task["n_train"]), test_correct=np.zeros(task["n_test"]), metrics=json.dumps({"loss": 2}))
"""


def test_a_command_reads_its_task_and_writes_its_outcome(run, digits, tmp_path):
    look = """
labels, subset = np.load(task["dataset"]["train_labels"]), np.load(task["subset"])
told = {"labels": len(labels), "subset": subset.tolist(), "folder": os.getcwd()}
json.dump(task | told, open(sys.argv[1], "w"))
"""
    outcome = run(WRITE + look, str(tmp_path / "told.json"))
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["subset"] == [1, 5, 9]
    assert (told["trial"], told["seed"], told["device"], told["options"]["lr"]) == (7, 2**62 + 1, "cuda:1", 0.1)
    assert (told["n_train"], told["n_test"], told["labels"]) == (digits.n_train, digits.n_test, digits.n_train)
    assert told["folder"] == str(tmp_path / "7/work")
    assert len(outcome.train_correct) == digits.n_train
    assert outcome.metrics == {"loss": 2}


def test_its_progress_is_reported(run, task):
    run(WRITE + 'open(task["progress"], "w").write("0.25"); time.sleep(0.5)')
    assert task().options["reported"][-1] == 0.25


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("sys.exit(3)", "ended with exit code 3$"),
        ("os.kill(os.getpid(), 9)", "was ended by SIGKILL: out of memory, or killed$"),
        ("os.kill(os.getpid(), 7)", "was ended by SIGBUS: /dev/shm may be too small"),
    ],
)
def test_a_command_that_fails_is_described(run, script, message):
    with pytest.raises(TrainerError, match=message):
        run(script)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("", r"ended without outcome\.npz in the folder MEMTAIL_TASK"),
        ('open(os.environ["MEMTAIL_TASK"] + "/outcome.npz", "w").write("no")', r"outcome\.npz cannot be read"),
        ('np.savez(os.environ["MEMTAIL_TASK"] + "/outcome.npz", correct=[1])', "unknown arrays .*correct"),
        ('np.savez(os.environ["MEMTAIL_TASK"] + "/outcome.npz", train_correct=[1], test_correct=[1], metrics="x")', "no JSON text"),
        ('np.savez(os.environ["MEMTAIL_TASK"] + "/outcome.npz", train_correct=np.array([{}]), test_correct=[1])', "cannot be read"),
    ],
)
def test_an_outcome_that_cannot_be_read_is_described(run, script, message):
    with pytest.raises(OutcomeError, match=message):
        run(script)


def test_scores_may_be_all_that_it_writes(run, digits):
    scores = f"train_score=np.full({digits.n_train}, 0.5), test_score=[]"
    written = run(f'np.savez(os.environ["MEMTAIL_TASK"] + "/outcome.npz", {scores})')
    assert (written.train_correct, written.test_correct) == (None, None)
    with pytest.raises(OutcomeError, match=r"train_correct is missing: return one value for each .* record: \{scores: only\}"):
        check_outcome(written, digits, RecordedOutcomes())


def test_a_task_without_labels_or_test_set_says_so(tmp_path, own_cache):
    np.savez(tmp_path / "a.npz", train_features=np.ones((4, 2)))
    dataset = prepare(DatasetSpec(name="arrays", root=tmp_path / "a.npz"))
    for name in ("work", "checkpoint"):
        (tmp_path / "0" / name).mkdir(parents=True)
    (tmp_path / "train.py").write_text(
        "import json, os, numpy as np\n"
        "task = json.load(open(os.environ['MEMTAIL_TASK'] + '/task.json'))\n"
        "correct = np.load(task['dataset']['train_features'])[:, 0]\n"
        "np.savez(task['outcome'], train_correct=correct, metrics=json.dumps({'q': task['n_test']}))\n"
    )
    task = TrainingTask(0, np.array([1]), 1, "cpu", {}, dataset, tmp_path / "0/work", tmp_path / "0/checkpoint")
    (outcome,) = Command(CommandTrainer(command=[sys.executable, "train.py"]), tmp_path)([task])
    assert isinstance(outcome, Outcome)
    assert (np.asarray(outcome.train_correct).tolist(), outcome.test_correct, outcome.metrics) == ([1, 1, 1, 1], None, {"q": 0})
    told = json.loads((tmp_path / "0/task.json").read_text())
    assert (told["classes"], told["n_test"]) == ([], 0)
    assert sorted(told["dataset"]) == ["test_features", "train_features"]


def test_a_program_that_is_missing_is_named(tmp_path, task):
    with pytest.raises(TrainerError, match="command no-such-program cannot be started: No such file or directory: fix"):
        Command(CommandTrainer(command=["no-such-program"]), tmp_path)([task()])


def test_a_program_below_the_code_is_started_from_there(tmp_path, task):
    (tmp_path / "train").write_text('#!/bin/sh\necho "$1" >"$MEMTAIL_TASK/../told"; exit 5\n')
    (tmp_path / "train").chmod(0o755)
    (tmp_path / "data.txt").write_text("")
    with pytest.raises(TrainerError, match="exit code 5"):
        Command(CommandTrainer(command=["./train", "{code}/data.txt"]), tmp_path)([task()])
    assert (tmp_path / "told").read_text() == f"{tmp_path}/data.txt\n"


@pytest.mark.parametrize("patient", [True, False], ids=["ends", "ignores SIGTERM"])
def test_a_command_that_is_to_stop_keeps_its_checkpoint_and_ends_with_all_it_started(run, task, tmp_path, monkeypatch, patient):
    monkeypatch.setattr(module, "GRACE_SECONDS", 20.0 if patient else 0.3)
    act = "time.sleep(0.2); sys.exit(0)" if patient else "None"
    script = f"""
    import signal, subprocess
    child = subprocess.Popen(["sleep", "300"])
    def stop(*_):
        {act}
    signal.signal(signal.SIGTERM, stop)
    open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
    while True:
        time.sleep(0.1)
    """
    with pytest.raises(TrainingStopped):
        run(script, stop=(tmp_path / "pid").exists)
    assert task().options["saved"]
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/status")
    assert not status.exists() or "Z (zombie)" in status.read_text()


@pytest.mark.parametrize(("code", "text"), [(0, "exit code 0"), (-11, "SIGSEGV: a crash in native code"), (-64, "signal 64|SIGRTMAX")])
def test_each_end_has_a_description(code, text):
    assert re.search(text, describe_exit(code))
