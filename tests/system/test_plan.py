"""Forecasts and profiles of runs, compared with real runs through the command line."""

import json
import math
import re

import pytest
import torch
import yaml

from memtail.errors import MemtailError
from memtail.estimators import expected_standard_error
from memtail.execution import forecast as planning
from memtail.execution import measurements
from memtail.trainers.images import train_shard
from memtail.trainers.images.profiling import COMPUTATION, PHASES
from memtail.trainers.process import TrainerProcess
from memtail.trials import TrialBatch
from tests.support import inline
from tests.support.cli import command

CPU = torch.device("cpu")
START = planning._START


def spec(folder, **parts):
    content = {
        "name": "digits",
        "dataset": {"name": "digits", "max_train": 300, "max_test": 100},
        "model": {"name": "mlp", "hidden": [64]},
        "training": {"epochs": 12},
        "subsets": {"trials": 60},
        "execution": {"trials_per_shard": 16, "device": "cpu"},
        **parts,
    }
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module", autouse=True)
def quickly():
    """Shorten the start of a process, which forecasts measure, to that of Python."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "_START", "")
        yield


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "recorded"])
def planned(request, tmp_path_factory, quickly):
    """A forecast as JSON, and a profiled run of the same experiment; the second parameter records more, the first measures the start."""
    folder = tmp_path_factory.mktemp("planned")
    path = spec(folder, record={"margins": True, "snapshots": [1, 2, 5, 12], "models": 20} if request.param else {})
    with pytest.MonkeyPatch.context() as patch:
        if not request.param:
            patch.setattr(planning, "_START", START)
        plan = command("plan", path, "--store", folder / "store", "--price", 3, "--standard-error", 0.05, "--json")
    assert plan.returncode == 0, plan.stderr
    assert not (folder / "store").exists()
    run = command("run", path, "--store", folder / "store", "--profile", "--json")
    assert run.returncode == 0, run.stderr
    return json.loads(plan.stdout), json.loads(run.stdout), folder, path


def test_the_forecasts_agree_with_each_other(planned):
    plan = planned[0]
    assert plan["trials"] == plan["trials_to_train"] == 60
    assert plan["trials_per_shard"] == 16
    assert [each["devices"] for each in plan["elsewhere"]] == [1, 8, 64]
    assert plan["here"]["devices"] == plan["devices"]
    alone, many, most = (each["seconds"] for each in plan["elsewhere"])
    fixed = plan["startup_seconds"] + plan["scoring_seconds"]
    assert alone == pytest.approx(fixed + 60 * plan["seconds_per_trial"])
    assert many == pytest.approx(fixed + 8 * plan["seconds_per_trial"])
    assert most == pytest.approx(fixed + plan["seconds_per_trial"])
    assert fixed < plan["here"]["seconds"] <= alone
    for each in (plan["here"], *plan["elsewhere"]):
        assert each["cost"] == pytest.approx(3 * each["devices"] * each["seconds"] / 3600)
    assert plan["peak_memory"] > 1 << 26
    assert not plan["extrapolated"]


def test_the_forecast_has_the_smallest_number_of_trials_for_a_standard_error(planned):
    plan = planned[0]
    assert plan["standard_error"] == pytest.approx(math.sqrt(1.19 / 60), rel=0.01)
    trials = plan["trials_for_it"]
    assert expected_standard_error(trials, 0.7) <= 0.05 < expected_standard_error(trials - 1, 0.7)


def test_forecast_sizes_are_those_of_a_run(planned):
    plan, _, folder, _ = planned
    experiment = folder / "store" / "experiments" / "digits"
    assert plan["trial_bytes"] == pytest.approx(size_of(experiment / "trials"), rel=0.15)
    assert plan["score_bytes"] == pytest.approx(size_of(experiment / "scores"), rel=0.15)
    assert plan["model_bytes"] == pytest.approx(size_of(experiment / "models"), rel=0.01)


def test_a_plan_counts_trials_in_the_store_and_does_not_change_it(planned):
    _, _, folder, path = planned
    experiment = folder / "store" / "experiments" / "digits"
    before = {file: file.stat().st_mtime_ns for file in (folder / "store").rglob("*")}
    result = command("plan", path, "--store", folder / "store")
    assert result.returncode == 0, result.stderr
    assert "60 trials, 0 of them to train" in result.stdout
    assert "64 x cpu" in result.stdout
    assert "standard error" in result.stdout
    assert ("of models" in result.stdout) == (experiment / "models").exists()
    assert {file: file.stat().st_mtime_ns for file in (folder / "store").rglob("*")} == before


@pytest.mark.slow
def test_a_plan_measures_a_network_in_the_folder_of_the_code(tmp_path, monkeypatch):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "mine.py").write_text(
        "from memtail.models.plain import mlp\n\n\ndef net(shape, classes):\n    return mlp(shape, classes, [8])\n"
    )
    monkeypatch.setenv("MEMTAIL_CODE", str(tmp_path / "code"))
    plan = command(
        "plan",
        spec(tmp_path, model={"name": "mine:net"}, training={"epochs": 1}, execution={"trials_per_shard": 1, "device": "cpu"}),
        "--store",
        tmp_path / "store",
    )
    assert plan.returncode == 0, plan.stderr


def test_the_phases_of_a_run_add_up_to_its_device_time(planned):
    profile = planned[1]["profile"]
    assert list(profile["phases"]) == [*PHASES, "writing", "rest"]
    assert sum(profile["phases"].values()) == pytest.approx(profile["seconds"] * profile["devices"], rel=0.01)
    assert all(profile["phases"][phase] > 0 for phase in ("data", "forward/backward", "evaluation", "writing", "rest"))
    batches = [TrialBatch.from_bytes(file.read_bytes()) for file in (planned[2] / "store").glob("experiments/digits/trials/*.npz")]
    summed = sum(batch.provenance.phases["evaluation"] for batch in batches)
    assert summed == pytest.approx(profile["phases"]["evaluation"], abs=0.01)


def test_the_share_of_computation_is_that_of_the_training(planned):
    _, result, folder, _ = planned
    profile = result["profile"]
    batches = [TrialBatch.from_bytes(file.read_bytes()) for file in (folder / "store").glob("experiments/digits/trials/*.npz")]
    computing = sum(batch.provenance.phases.get(phase, 0) for batch in batches for phase in COMPUTATION)
    (share,) = profile["computation"].values()
    assert list(profile["computation"]) == ["cpu"]
    assert 0 < computing / (profile["seconds"] * profile["devices"]) <= share <= 1  # the training is a part of the run


def test_a_profile_is_shown_in_a_table(tmp_path):
    path = spec(tmp_path)
    shown = command("run", path, "--store", tmp_path / "store", "--profile")
    assert shown.returncode == 0, shown.stderr
    assert all(phase in shown.stdout for phase in (*PHASES, "writing", "rest"))
    assert re.search(r"computation during training: cpu [1-9][0-9.]*%", shown.stdout)
    assert "forward/backward" not in command("run", path, "--store", tmp_path / "other").stdout


@pytest.mark.parametrize(
    ("options", "parts", "said"),
    [
        (["--standard-error", "0"], {}, "--standard-error must be above 0, got 0"),
        (["--standard-error", "nan"], {}, "--standard-error must be above 0, got nan"),
        (["--overlap", "1"], {}, "--overlap must be between 0 and 1, got 1"),
        (["--overlap", "0.8"], {}, "--overlap needs scores, and experiment 'digits' has none in the store"),
        (["--price", "-1"], {}, "--price must be at least 0, got -1"),
        ([], {"model": {"name": "nonesuch"}}, "nonesuch"),
        ([], {"subsets": {"trials": 2}}, "trials"),
        ([], {"execution": {"device": "cuda:99"}}, "cuda:99"),
    ],
)
def test_bad_input_is_refused_in_one_line(tmp_path, options, parts, said):
    result = command("plan", spec(tmp_path, **parts), "--store", tmp_path / "store", *options)
    assert result.returncode == 2
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "store").exists()


def test_another_experiment_under_the_name_is_refused(planned, tmp_path):
    result = command("plan", spec(tmp_path, training={"epochs": 3}), "--store", planned[2] / "store")
    assert result.returncode == 2
    assert "choose another name" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_long_trials_are_extrapolated_from_a_part_of_the_epochs_and_images(declare, tmp_path, monkeypatch):
    monkeypatch.setitem(measurements._OPERATIONS, "cpu", 1e6)
    monkeypatch.setattr(measurements, "_MEASURED_SECONDS", 0.1)
    experiment = declare(40, training={"epochs": 1000}, execution={"device": "cpu", "trials_per_shard": 4})
    plan = planning.forecast(experiment, tmp_path / "store")
    assert plan.extrapolated
    assert plan.here.cost is None
    assert plan.trials_for_it is None
    assert 1000 * 1e-6 < plan.seconds_per_trial < 1000
    assert list(tmp_path.iterdir()) == []


def test_a_trial_that_fails_is_named(declare, tmp_path):
    experiment = declare(40, model={"name": "tests.support.networks:failing"}, execution={"device": "cpu", "trials_per_shard": 2})
    with pytest.raises(MemtailError, match="a trial failed while the run was measured: RuntimeError: not in training"):
        planning.forecast(experiment, tmp_path / "store")


def test_a_network_of_the_users_own_is_measured_in_a_trainer_process_that_is_kept(declare, tmp_path, monkeypatch):
    start, started = TrainerProcess._start, []
    monkeypatch.setattr(TrainerProcess, "_start", lambda self, work: started.append(work) or start(self, work))
    monkeypatch.setattr("memtail.trainers.images.devices.peak_memory", lambda device: 1)  # of this process
    experiment = declare(40, model={"name": "tests.support.networks:with_dropout"}, execution={"device": "cpu", "trials_per_shard": 2})
    monkeypatch.setattr("memtail.trainers.images.devices.cores", lambda: 1)
    with inline.training():
        plan = planning.forecast(experiment, tmp_path / "store")
    trained = [work.record.experiment.training.epochs for work in started if work.record.fingerprint]
    assert trained == [1, 2]  # the second one is another experiment
    assert plan.peak_memory > 1 << 26


def test_each_shard_goes_to_the_first_free_device():
    assert planning._makespan([3.0, 2.0, 2.0, 1.0], 2) == 4.0
    assert planning._makespan([3.0, 2.0], 1) == 5.0
    assert planning._makespan([3.0, 2.0], 8) == 3.0
    assert planning._makespan([], 2) == 0.0


@pytest.mark.parametrize("model", [{"name": "mlp", "hidden": [16]}, {"name": "cnn", "channels": [4], "hidden": 8}])
def test_phases_take_at_most_the_whole_time(declare, digits, model):
    experiment = declare(6, model=model, record={"margins": True})
    batch = train_shard(experiment, digits, range(6), CPU)
    phases = batch.provenance.phases
    assert {"data", "forward/backward", "evaluation"} <= set(phases) <= set(PHASES)
    assert 0 < sum(phases.values()) <= batch.provenance.seconds + 0.01
