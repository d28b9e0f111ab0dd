"""`memtail trainer check`, and the other commands on experiments with a function or a command as their trainer."""

import json
import sys
from textwrap import dedent

import pytest
import yaml

from memtail.storage.local import LocalStore
from memtail.trainers import landlock
from tests.support.arrays import write_arrays
from tests.support.cli import command

TRAIN = """
import numpy as np
import memtail

def train(task):
    rng = np.random.default_rng(task.seed)
    labels = np.asarray(task.dataset.train_labels)
    correct = rng.random(task.dataset.n_train) < 0.5
    correct[task.subset] = True
    RETURN
"""
_RETURN = "return memtail.Outcome(train_correct=correct, test_correct=rng.random(task.dataset.n_test) < 0.5, PARTS)"
RETURN = _RETURN.replace("PARTS", "")


@pytest.fixture
def declared(tmp_path):
    """Writes an experiment whose function `train` ends with some code, and returns the path of its file."""

    def write(end=RETURN, source=TRAIN, **parts):
        (tmp_path / "own.py").write_text(dedent(source).replace("RETURN", dedent(end).strip().replace("\n", "\n    ")))
        content = {
            "name": "own",
            "dataset": {"name": "arrays", "root": str(write_arrays(tmp_path / "arrays.npz"))},
            "trainer": {"function": "own:train"},
            "subsets": {"trials": 12, "fraction": 0.5},
            "execution": {"device": "cpu"},
            **parts,
        }
        path = tmp_path / "own.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def check(path, *options):
    return command("trainer", "check", path, *options)


def outcome(parts):
    return _RETURN.replace("PARTS", parts)


def test_a_check_shows_what_came_back_and_how_long_it_took(declared):
    parts = "train_margin=rng.random(len(correct)), test_margin=rng.random(task.dataset.n_test), train_labels=labels, "
    path = declared(outcome(parts + "metrics={'loss': 0.25, 'steps': 7}"), record={"margins": True})
    shown = check(path, "--trial", 3)
    assert shown.returncode == 0, shown.stderr
    lines = {line[2:26].strip(): line[27:] for line in shown.stdout.splitlines()[1:]}
    assert shown.stdout.startswith("own: trial 3 of 12, on cpu\n")
    assert lines["code"].startswith("own.py:")
    assert lines["in-subset accuracy"] == "100.00%"
    assert lines["order"] == "the dataset's, by train_labels"
    assert lines["margins"] == "returned"
    assert lines["metrics"] == "loss 0.25, steps 7"
    assert lines["trained again"].startswith("equal outcomes")
    assert "devices" in lines["all trials"] or "device" in lines["all trials"]
    assert "warning" not in shown.stdout


def test_a_check_as_json_forecasts_all_trials_from_the_second_training(declared):
    path = declared(RETURN.replace("return", "import time; time.sleep(0.2)\nreturn"))
    shown = json.loads(check(path, "--json").stdout)
    assert shown["outcome"]["in_subset_accuracy"] == 1.0
    assert shown["compared"] == []
    assert shown["repetition"]["differences"] == 0
    assert shown["repetition"]["seconds"] >= 0.2
    assert shown["all_seconds"] == pytest.approx(-(-12 // shown["devices"]) * shown["repetition"]["seconds"])


def test_equal_trials_that_differ_are_warned_of(declared):
    path = declared(source=TRAIN.replace("default_rng(task.seed)", "default_rng()"))
    shown = check(path)
    assert "outcomes differ" in shown.stdout
    assert "draw all randomness from task.seed" in shown.stdout
    once = check(path, "--once")
    assert once.returncode == 0
    assert "trained again" not in once.stdout


@pytest.mark.parametrize(
    ("end", "advice"),
    [
        (RETURN.replace("train_correct=correct", "train_correct=rng.permutation(correct)"), "return train_labels"),
        (RETURN.replace("train_correct=correct", "train_correct=correct | True"), "trains on task.subset only"),
        (outcome("train_labels=labels").replace("train_correct=correct", "train_correct=~correct"), "trains on task.subset"),
        (outcome("metrics={'loss': float('nan')}"), "diverged"),
    ],
)
def test_signs_of_a_fault_are_warned_of_with_advice(declared, end, advice):
    shown = check(declared(end), "--once")
    assert shown.returncode == 0, shown.stderr
    (warning,) = [line for line in shown.stdout.splitlines() if line.startswith("warning: ")]
    assert advice in warning


@pytest.mark.parametrize(
    ("end", "line", "above"),
    [
        ("print('almost there')\nraise ValueError('no such file')", "ValueError: no such file", "almost there"),
        ("import os\nprint('going', flush=True)\nos._exit(3)", "ended with exit code 3", "going"),
    ],
)
def test_faults_are_the_last_line_below_traceback_and_output(declared, end, line, above):
    shown = check(declared(end))
    assert shown.returncode == 2
    *lines, last = shown.stderr.splitlines()
    assert last.startswith("memtail: ")
    assert line in last
    assert above in "\n".join(lines)


def test_the_last_lines_of_a_long_output_are_shown(declared):
    shown = check(declared("print(*range(1000), sep='\\n')\n1 / 0"))
    _, _, output = shown.stderr.partition("Last output of the trainer:\n")
    assert output.splitlines()[:-1] == [str(number) for number in range(950, 1000)]
    assert "ZeroDivisionError" in output.splitlines()[-1]
    assert "in train" in shown.stderr


@pytest.mark.parametrize(
    ("options", "parts", "line"),
    [
        (["--trial", "12"], {}, "--trial 12: the trials of experiment 'own' are 0 to 11"),
        ([], {"trainer": {"function": "nonesuch:train"}}, "there is no module 'nonesuch'"),
        ([], {"trainer": {"command": [sys.executable, "nonesuch.py"]}}, "no argument of the command names a file"),
    ],
)
def test_bad_input_is_refused_in_one_line(declared, options, parts, line):
    shown = check(declared(**parts), *options)
    assert shown.returncode == 2
    assert line in shown.stderr
    assert len(shown.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("end", "parts", "line"),
    [
        ("return memtail.Outcome(train_correct=correct[task.subset], test_correct=[])", {}, "train_correct has shape"),
        (outcome("train_labels=labels[::-1]"), {}, "the outcomes are in another order"),
        (RETURN, {"trainer": {"function": "own:missing"}}, "trainer.function: module 'own' has no function 'missing'"),
        (RETURN, {"trainer": {"command": ["pythn", "own.py"]}}, "command pythn cannot be started"),
    ],
)
def test_faults_that_memtail_finds_have_no_traceback(declared, end, parts, line):
    shown = check(declared(end, **parts))
    assert shown.returncode == 2
    assert line in shown.stderr
    assert "Traceback" not in shown.stderr


def test_the_built_in_trainer_needs_no_check(declared):
    shown = check(declared(trainer={"name": "images"}))
    assert shown.returncode == 0
    assert "the built-in trainer needs no check" in shown.stdout


def test_a_command_is_checked_too(declared, tmp_path):
    (tmp_path / "train.py").write_text(
        dedent("""
        import json, os, numpy as np
        folder = os.environ["MEMTAIL_TASK"]
        task = json.load(open(folder + "/task.json"))
        correct = np.arange(task["n_train"]) % 2 == 0
        correct[np.load(folder + "/subset.npy")] = True
        np.savez(folder + "/outcome.npz", train_correct=correct, test_correct=np.ones(task["n_test"], bool))
        """)
    )
    shown = check(declared(trainer={"command": [sys.executable, "train.py"]}))
    assert shown.returncode == 0, shown.stderr
    assert "train.py: a change makes" in shown.stdout
    assert "equal outcomes" in shown.stdout


def test_a_forecast_names_the_check_instead(declared, tmp_path):
    shown = command("plan", declared(), "--store", tmp_path / "store")
    assert shown.returncode == 2
    assert "memtail trainer check" in shown.stderr
    assert len(shown.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(not landlock.version(), reason="needs Landlock")
@pytest.mark.parametrize("named", ["option", "variable", "default"])
def test_the_store_is_kept_from_code_that_is_checked(declared, tmp_path, monkeypatch, named):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    store = LocalStore("memtail-store" if named == "default" else "results")
    store.put("experiments/other/experiment.json", b"{}")
    if named == "variable":
        monkeypatch.setenv("MEMTAIL_STORE", "results")
    path = declared(f"import shutil; shutil.rmtree({store.address + '/experiments'!r})\nreturn None")
    shown = check(path, "--once", *(["--store", "results"] if named == "option" else []))
    assert shown.returncode == 2
    assert "PermissionError" in shown.stderr
    assert store.get("experiments/other/experiment.json") == b"{}"
