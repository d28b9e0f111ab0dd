"""Embedded runs as processes: stopped, concurrent, and with failing training processes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from memtail.execution import pool
from memtail.execution.declare import declare as make_record
from memtail.execution.pool import Task, Workers
from memtail.execution.shard_task import ShardOutcome
from memtail.experiment_store import ExperimentStore
from memtail.storage.local import LocalStore
from memtail.trials import Shard
from tests.support import inline
from tests.support.arrays import write_tree
from tests.support.cli import MEMTAIL, batches, command, command_in_process, module_path, same_files, version
from tests.support.cli import write_spec as spec


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A store with a finished run, for comparison."""
    folder = tmp_path_factory.mktemp("finished")
    with inline.training():
        result = command("run", spec(folder), "--store", folder / "store")
    assert result.returncode == 0, result.stderr
    return folder / "store", result.stdout


@pytest.mark.parametrize(
    "signals",
    [
        [signal.SIGTERM, signal.SIGINT, signal.SIGKILL],
        *(
            pytest.param(signals, marks=pytest.mark.slow)
            for signals in ([signal.SIGKILL], [signal.SIGTERM], [signal.SIGINT], [signal.SIGKILL, signal.SIGINT, signal.SIGKILL])
        ),
    ],
)
def test_a_run_stopped_at_any_moment_resumes_to_equal_scores(finished, tmp_path, signals):
    store, _ = finished
    path = spec(tmp_path)
    for number, sent in enumerate(signals, start=1):
        process = subprocess.Popen(
            [*MEMTAIL, "run", str(path), "--store", str(tmp_path / "store")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        children = []
        while process.poll() is None and (len(batches(tmp_path / "store")) < 2 * number or not children):  # a killed run may commit more
            children = _children(process.pid) or children
            time.sleep(0.02)
        assert process.poll() is None, process.communicate()
        process.send_signal(sent)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[sent]
        assert "Traceback" not in errors
        _wait_until_gone(children)
    assert 0 < len(batches(tmp_path / "store")) < 12
    with inline.training():
        assert command("run", path, "--store", tmp_path / "store").returncode == 0
    assert same_files(version(store), version(tmp_path / "store"))
    assert [batch.name for batch in batches(tmp_path / "store")] == [batch.name for batch in batches(store)]


def _children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _wait_until_gone(pids):
    """Wait for the end of training processes, which end with their parent even if it was killed."""
    assert pids
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text() for pid in pids):
        assert time.monotonic() < deadline, "a training process outlived its parent"
        time.sleep(0.05)


def test_two_runs_of_one_experiment_at_once_count_each_trial_once(finished, tmp_path):
    store, _ = finished
    path = spec(tmp_path)
    arguments = [*MEMTAIL, "run", str(path), "--store", str(tmp_path / "store")]
    both = [subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    assert [batch.name for batch in batches(tmp_path / "store")] == [batch.name for batch in batches(store)]
    assert same_files(version(store), version(tmp_path / "store"))


MODELS = """
import os, signal
from torch import nn

class Fragile(nn.Sequential):
    def forward(self, x):
        if os.environ.get("MODE") == "raise" and x.shape[0] > 1 and self.training:
            raise RuntimeError("the model is broken")
        if os.environ.get("MODE") == "die" and x.shape[0] > 1 and self.training:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)

def build(image_shape, classes):
    return Fragile(nn.Flatten(), nn.Linear(64, classes))
"""


@pytest.mark.parametrize(
    ("mode", "error"),
    [
        pytest.param("raise", "RuntimeError: the model is broken", marks=pytest.mark.slow),
        ("die", "the trainer process was ended by SIGKILL"),
    ],
)
def test_a_shard_that_always_fails_leaves_failure_records_and_a_later_run_trains_it(tmp_path, mode, error):
    (tmp_path / "fragile.py").write_text(MODELS)
    path = spec(
        tmp_path,
        model={"name": "fragile:build"},
        training={"epochs": 1},
        subsets={"trials": 4, "design": "balanced", "fraction": 0.5},
        execution={"trials_per_shard": 2},
    )
    content = yaml.safe_load(path.read_text())
    content["model"] = {"name": "fragile:build"}
    path.write_text(yaml.safe_dump(content))
    environment = module_path(tmp_path)
    result = command_in_process("run", path, "--store", tmp_path / "store", env={**environment, "MODE": mode})
    assert result.returncode == 2
    assert "Traceback" not in result.stderr.splitlines()[-1]
    assert "failures" in result.stderr
    failures = list(ExperimentStore(LocalStore(tmp_path / "store"), "digits").failures())
    assert [(failure.shard, failure.attempt) for failure in failures] == [
        (Shard(first, first + 1), attempt) for first in (0, 2) for attempt in (1, 2, 3)
    ]
    assert all(failure.error.startswith(error) for failure in failures)
    assert mode == "die" or all("in forward" in failure.traceback for failure in failures)
    result = command_in_process("run", path, "--store", tmp_path / "store", env=environment)
    assert result.returncode == 0, result.stderr
    assert len(batches(tmp_path / "store")) == 2


def test_a_training_process_that_dies_costs_its_shard_and_is_replaced(declare, digits, tmp_path):
    store = LocalStore(tmp_path / "store")
    record = make_record(declare(4, subsets={"design": "balanced"}), digits, 2)
    ExperimentStore(store, "digits").register(record)
    with Workers(Task(record, digits.folder, store.address, device=""), ["cpu"]) as workers:
        workers.start(Shard(0, 1))
        next(iter(workers._pools[0]._processes.values())).kill()
        (result,) = workers.finished(60)
        assert (result.outcome, result.attempt) == (ShardOutcome.FAILED, 0)
        assert result.error.startswith("the training process died (killed")
        workers.start(Shard(0, 1))
        (result,) = workers.finished(60)
        assert result.outcome is ShardOutcome.COMMITTED


def test_the_next_shard_of_a_process_that_dies_is_trained_by_another_and_not_counted_as_failed(declare, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "_most_next", lambda device: 1)
    store = LocalStore(tmp_path / "store")
    record = make_record(declare(6, subsets={"design": "balanced"}), digits, 2)
    ExperimentStore(store, "digits").register(record)
    shards = [Shard(0, 1), Shard(2, 3)]
    with Workers(Task(record, digits.folder, store.address, device=""), ["cpu"]) as workers:
        for shard in shards:
            assert workers.takes(1)
            workers.start(shard)
        assert not workers.takes(1)
        next(iter(workers._pools[0]._processes.values())).kill()
        results = {}
        while workers.running:
            results |= {result.shard: result for result in workers.finished(60)}
    assert [results[shard].outcome for shard in shards] == [ShardOutcome.FAILED, ShardOutcome.COMMITTED]
    assert (results[shards[0]].attempt, results[shards[0]].process_usable) == (0, False)


def test_a_run_ends_when_its_first_shards_fail_alike(tmp_path):
    (tmp_path / "fragile.py").write_text(MODELS)
    path = spec(tmp_path, training={"epochs": 1}, execution={"trials_per_shard": 1})
    content = yaml.safe_load(path.read_text())
    content["model"] = {"name": "fragile:build"}
    path.write_text(yaml.safe_dump(content))
    environment = {**module_path(tmp_path), "MODE": "raise"}
    result = command_in_process("run", path, "--store", tmp_path / "store", env=environment)
    assert result.returncode == 2
    assert "the first 5 shards failed alike (RuntimeError: the model is broken)" in result.stderr.splitlines()[-1]
    experiment_store = ExperimentStore(LocalStore(tmp_path / "store"), "digits")
    # other devices may have a failing shard each
    assert len(experiment_store.attempts()) < 10


@pytest.mark.parametrize("source", ["digits", "folder", "function"])
def test_a_script_without_a_guard_ends_with_one_line_that_names_the_fix(tmp_path, source):
    """Processes that train, prepare a folder of images, or load a dataset import the script, and would start the run again."""
    sources = {
        "digits": {"name": "digits"},
        "folder": {"name": "folder", "root": str(tmp_path / "tree")},
        "function": {"function": "data:load", "folder": str(tmp_path)},
    }
    write_tree(tmp_path / "tree")
    (tmp_path / "data.py").write_text("def load(): ...")
    script, path = tmp_path / "script.py", spec(tmp_path)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"dataset": sources[source]}))
    script.write_text(f"import memtail\nmemtail.run(memtail.Experiment.load({str(path)!r}), {str(tmp_path / 'store')!r})\n")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, timeout=100)
    assert result.returncode == 1
    assert result.stderr.count("Traceback") == 1
    assert result.stderr.splitlines()[-1] == (
        f"memtail.errors.SpecError: {script} starts a run as soon as it is imported, and the processes of the run import it: "
        'put the call under `if __name__ == "__main__":`'
    )
    assert batches(tmp_path / "store") == []
