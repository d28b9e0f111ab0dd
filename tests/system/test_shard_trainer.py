"""Trainer processes: user code of an embedded run, in a process that is kept from shard to shard."""

import os
import re
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from structlog.testing import capture_logs

from memtail.errors import TrainerError, TrainingStopped, UnsupportedError
from memtail.execution.declare import declare as make_record
from memtail.execution.embedded import run
from memtail.spec import Experiment
from memtail.trainers.process import TrainerProcess
from memtail.trainers.work import Work
from memtail.trials import Shard, unpack
from tests.support.checkpoints import KeptCheckpoints
from tests.support.cli import command

_FIRST = Shard(0, 3)
CODE = """
import os, sys, time
import numpy as np
import memtail

calls = 0

def outcome(task):
    d = task.dataset
    correct = np.random.default_rng(task.seed).random(d.n_train) < 0.5
    correct[task.subset] = True
    return memtail.Outcome(correct, np.random.default_rng(task.seed).random(d.n_test) < 0.9, train_labels=d.train_labels,
                           metrics={"pid": os.getpid(), "loss": 0.1})

def train(task):
    global calls
    calls += 1
    exec(task.options.get("act", ""), {**globals(), "task": task})
    if "returned" in task.options:
        return task.options["returned"]
    task.report(0.5)
    return outcome(task)
"""


def _failed(fault, line):
    """What the message of a fault of the function is to match."""
    return rf"^trainer\.function 'mine:train' failed: {fault} \(/.*/mine\.py, line {line}\)$"


@pytest.fixture
def code(tmp_path):
    (tmp_path / "mine.py").write_text(textwrap.dedent(CODE))
    return tmp_path


@pytest.fixture
def declared(code):
    def make(act="", trials=8, **trainer):
        declared = {"function": "mine:train", "folder": str(code), "options": {"act": act} if act else {}, **trainer}
        execution = {"device": "cpu", "trials_per_shard": 4}
        spec = {"name": "mine", "dataset": {"name": "digits", "max_train": 200, "max_test": 50}, "trainer": declared}
        return Experiment.parse({**spec, "subsets": {"trials": trials, "design": "balanced"}, "execution": execution})

    return make


@pytest.fixture(scope="module")
def small():
    from memtail import datasets

    return datasets.prepare(Experiment.parse({"name": "e", "dataset": {"name": "digits", "max_train": 200, "max_test": 50}}).dataset)


@pytest.fixture
def train(small, code):
    process = TrainerProcess("cpu")

    def train(experiment, shard=_FIRST, kept=None, **callbacks):
        silent = {"on_progress": lambda fraction: None, "on_step": lambda: None, "stop": lambda: False}
        work = Work(make_record(experiment, small, 4), small, shard, code)
        return process.train(work, kept or KeptCheckpoints(), **silent | callbacks)

    yield train
    process.end()


def pids(batch):
    return {int(each.further["pid"]) for each in batch.metrics}


def test_one_process_trains_shard_after_shard_without_touching_this_one(train, declared):
    fractions, steps = [], []
    first = train(declared(), on_progress=fractions.append, on_step=lambda: steps.append(1))
    second = train(declared(), Shard(4, 7))
    assert pids(first) == pids(second)
    assert pids(first) != {os.getpid()}
    assert first.trial.tolist() == [0, 1, 2, 3]
    assert unpack(first.train_correct, 200)[unpack(first.membership, 200)].all()
    assert 0.125 in fractions
    assert fractions[-1] == 1.0
    assert len(steps) >= 8


def test_outcomes_in_another_order_are_warned_of_once_by_this_process(train, declared):
    act = "sys.modules['mine'].outcome = lambda task: memtail.Outcome([i % 2 for i in range(200)], [True] * 50)"
    with capture_logs() as events:
        train(declared(act=act))
        train(declared(act=act), Shard(4, 7))
    (warning,) = [event for event in events if event["log_level"] == "warning"]
    assert "models are no better on their subsets than elsewhere" in warning["event"]
    assert (warning["experiment"], warning["trials"]) == ("mine", "0-3")
    assert not [event for event in events if event["event"] == "trainer"]


def test_another_experiment_and_a_failure_get_a_new_process(train, declared):
    first = pids(train(declared()))
    second = pids(train(declared(act="pass")))
    assert first != second
    with pytest.raises(TrainerError):
        train(declared(act="raise ValueError('no')"))
    third = pids(train(declared(act="pass")))
    assert third not in (first, second)


def test_an_exception_has_its_message_its_traceback_and_the_last_output(train, declared):
    with pytest.raises(TrainerError, match=_failed("ZeroDivisionError: division by zero", 18)) as raised:
        train(declared(act="print('before'); 1 / 0"))
    cause = str(raised.value.__cause__)
    assert "in train" in cause
    assert "Last output of the trainer:\nbefore\n" in cause


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import no_such_package", _failed("ModuleNotFoundError: No module named 'no_such_package'", 2)),
        ("print('before'); raise SystemExit(3)", _failed("SystemExit: 3", 2)),
        ("print('before'); os._exit(3)", "^the trainer process ended with exit code 3$"),
    ],
)
def test_a_failure_in_an_import_costs_its_shard_only(train, declared, code, line, message):
    path = code / "mine.py"
    working = path.read_text()
    path.write_text(f"import os\n{line}\n{working}")
    with pytest.raises(TrainerError, match=message) as raised:
        train(declared())
    assert "mine.py" in str(raised.value.__cause__) or "before" in str(raised.value.__cause__)
    path.write_text(working)
    assert train(declared()).trial.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        ("os._exit(3)", "^the trainer process ended with exit code 3$"),
        ("os.kill(os.getpid(), 9)", "^the trainer process was ended by SIGKILL: out of memory, or killed$"),
        ("sys.exit('bye')", _failed("SystemExit: bye", 18)),
        ("raise KeyboardInterrupt", _failed("KeyboardInterrupt:", 18)),
        (None, r"^trial 0 of mine:train: the trainer returned NoneType, not a memtail\.Outcome: return one$"),
    ],
)
def test_each_end_of_the_code_is_one_line(train, declared, act, message):
    with pytest.raises(TrainerError, match=message):
        train(declared(act) if act else declared(options={"returned": None}))


def test_a_trial_that_takes_too_long_ends(train, declared):
    began = time.monotonic()
    with pytest.raises(TrainerError, match=r"^a trial took longer than trainer\.timeout, 1 s: raise it, or make the code faster$"):
        train(declared(act="time.sleep(60)", timeout=1))
    assert time.monotonic() - began < 30


def test_code_that_has_reported_progress_and_is_silent_since_is_ended_and_its_stack_is_shown(train, declared):
    train(declared(act="if task.trial == 0: time.sleep(1.5)"), silence=1)  # before its first report
    with pytest.raises(TrainerError, match=r"^training hangs: no progress for more than 1 s: ") as raised:
        train(declared(act="task.report(0.1); time.sleep(60)"), silence=1)
    assert "in train\n" in str(raised.value.__cause__)


def test_a_store_that_is_slow_to_take_a_checkpoint_is_no_silence_of_the_code(train, declared):
    class Slow(KeptCheckpoints):
        def save(self, state):
            time.sleep(1.5)

    train(declared(act="task.report(0.1); task.save()"), kept=Slow(), silence=1)


def test_trials_are_timed_one_by_one(train, declared):
    train(declared(act="time.sleep(1.5)", timeout=5))  # four of them take longer


def test_training_stops_with_a_checkpoint_and_goes_on_from_it(train, declared, tmp_path):
    act = f"""
if task.trial == 2 and not any(task.checkpoint.iterdir()):
    while not task.should_stop():
        task.report(0.2)
        time.sleep(0.01)
    (task.checkpoint / "state").write_text("half")
    task.save()
    raise memtail.TrainingStopped
open({str(tmp_path / "trained")!r}, "a").write(f"{{task.trial}} {{[path.name for path in task.checkpoint.iterdir()]}}\\n")
"""
    kept, fractions = KeptCheckpoints(), []
    with pytest.raises(TrainingStopped):
        train(declared(act=act), kept=kept, on_progress=fractions.append, stop=lambda: bool(fractions) and fractions[-1] > 0.5)
    batch = train(declared(act=act), kept=kept)
    assert batch.trial.tolist() == [0, 1, 2, 3]
    assert (tmp_path / "trained").read_text() == "0 []\n1 []\n2 ['state']\n3 []\n"


def test_code_that_does_not_stop_is_ended_after_a_while(train, declared, monkeypatch):
    monkeypatch.setattr("memtail.trainers.limits._STOP_SECONDS", 0.5)
    with pytest.raises(TrainingStopped):
        train(declared(act="time.sleep(60)"), stop=lambda: True)


def test_other_code_than_the_experiments_is_left_alone(train, declared, code, small):
    experiment = declared()
    work = Work(make_record(experiment, small, 4), small, Shard(0, 3), code)
    (code / "mine.py").write_text("def train(task): return None")
    process = TrainerProcess("cpu")
    with pytest.raises(UnsupportedError, match=r"its training code differs from that in .*: digest [0-9a-f]{12}, here [0-9a-f]{12}"):
        process.train(work, KeptCheckpoints(), on_progress=print, on_step=lambda: None, stop=lambda: False)
    (code / "mine.py").unlink()
    process.end()
    with pytest.raises(UnsupportedError, match=r"its training code is not on this machine: trainer\.function: there is no module 'mine'"):
        process.train(work, KeptCheckpoints(), on_progress=print, on_step=lambda: None, stop=lambda: False)
    process.end()


def test_a_forged_batch_is_refused(train, declared):
    act = "shard = sys.modules['memtail.trainers.user_shard']; make = shard.make_batch\n"
    act += "if task.trial == 0: shard.make_batch = lambda dataset, trials, members, *rest: make(dataset, trials, ~members, *rest)"
    with pytest.raises(TrainerError, match="returned a batch of other trials"):
        train(declared(act=act))


def test_no_process_and_no_folder_are_left(train, declared, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(TrainerError):
        train(declared(act="import subprocess; subprocess.Popen(['sleep', '301'], process_group=0); os._exit(1)"))
    deadline = time.monotonic() + 5
    while any(b"sleep\x00301" in _read(path) for path in Path("/proc").glob("[0-9]*/cmdline")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not list(tmp_path.glob("memtail-*"))


def _read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_run_gives_equal_scores_for_a_function_and_for_train_many(declared, code, tmp_path):
    one = run(declared(), tmp_path / "one")
    with (code / "mine.py").open("a") as file:
        file.write("\ndef train_many(tasks):\n    return [outcome(task) for task in tasks]\n")
    many = run(declared(), tmp_path / "many")
    assert one.summary.trials == 8
    np.testing.assert_array_equal(one.scores.memorization["mem"], many.scores.memorization["mem"])


def test_changed_code_is_another_experiment(declared, code, tmp_path):
    path, store = code / "mine.yaml", str(tmp_path / "store")
    path.write_text(yaml.safe_dump(declared().model_dump(mode="json", exclude={"model", "training"})))
    assert command("run", str(path), "--store", store).returncode == 0
    (code / "mine.py").write_text((code / "mine.py").read_text() + "\n# other\n")
    done = command("run", str(path), "--store", store)
    assert done.returncode == 2
    assert re.search(r"trainer\.code \w+\.\.\. -> \w+\.\.\.", done.stderr)
    assert "Traceback" not in done.stderr
