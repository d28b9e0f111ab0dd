"""Examples: the scripts of the studies, and trainers of the user's own, on fewer and shorter trials."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from memtail.storage.local import LocalStore
from memtail.studies import STUDIES
from memtail.studies.result import load_results
from tests.support.cli import command

PROJECT = Path(__file__).parents[2]
SCRIPTS = sorted((PROJECT / "examples/studies").iterdir())
# others have tests of their own
TRAINERS = [PROJECT / "examples" / name for name in ("command", "scikit-learn")]
TRIALS, EPOCHS = 100, 5


@pytest.fixture(scope="module")
def folder(own_cache, tmp_path_factory):
    """A folder with the examples, where all of them write their results to one store."""
    folder = tmp_path_factory.mktemp("examples")
    shutil.copytree(PROJECT / "examples", folder / "examples")
    for path in (folder / "examples").glob("digits*.yaml"):
        declared = yaml.safe_load(path.read_text())
        declared["subsets"]["trials"] = TRIALS
        declared["training"]["epochs"] = EPOCHS
        if declared["model"]["name"] == "cnn":
            declared["model"] |= {"channels": [2, 4], "hidden": 8}
            declared["training"]["epochs"] = 1
        path.write_text(yaml.safe_dump(declared))
    return folder


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_example_runs_the_study_it_is_named_after(folder, script, monkeypatch):
    monkeypatch.chdir(folder)
    first, *commands = [shlex.split(line) for line in script.read_text().splitlines() if not line.startswith("#")]
    assert first == ["set", "-eu"]
    shown = ""
    for program, *arguments in commands:
        assert program == "memtail"
        done = command(*arguments)
        assert done.returncode == 0, done.stderr
        shown += done.stdout
    assert result_of(folder, script).findings[0] in shown


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_each_example_is_a_shell_script_that_prints_the_result(folder, script):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(PROJECT)}
    command = ["sh", script.relative_to(PROJECT)]
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert result_of(folder, script).findings[0] in done.stdout


def result_of(folder, script):
    return {result.study: result for result in load_results(LocalStore(folder / "memtail-store"), "digits")}[script.stem]


def test_every_study_has_an_example():
    assert set(STUDIES) <= {script.stem for script in SCRIPTS}


@pytest.mark.parametrize("example", TRAINERS, ids=lambda example: example.name)
def test_the_commands_in_the_readme_of_a_trainer_run(example, own_cache, tmp_path, monkeypatch):
    shutil.copytree(example, tmp_path / "examples" / example.name)
    (path,) = (tmp_path / "examples" / example.name).glob("*.yaml")
    declared = yaml.safe_load(path.read_text())
    assert declared["subsets"]["trials"] == 300
    declared |= {"dataset": {"name": "digits", "max_train": 300, "max_test": 100}, "subsets": {"design": "balanced", "trials": 12}}
    path.write_text(yaml.safe_dump(declared))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    commands = re.findall(r"^memtail (.+)$", (example / "README.md").read_text(), re.MULTILINE)
    assert [line.split()[0] for line in commands] == ["trainer", "run", "top"]
    shown = ""
    for line in commands:
        done = command(*shlex.split(line))
        assert done.returncode == 0, done.stderr
        shown += done.stdout
    assert "the dataset's, by train_labels" in shown
    assert "equal outcomes" in shown
    assert "warning" not in shown
    scores = command("scores", "--json")
    assert json.loads(scores.stdout)["summary"]["trials"] == 12
