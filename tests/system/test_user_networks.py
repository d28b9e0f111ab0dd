"""Networks of the user's own: the built-in trainer trains them in a trainer process, to the bits of this process."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from structlog.testing import capture_logs

from memtail import datasets
from memtail.errors import TrainerError, TrainingStopped, WorkerFaultError
from memtail.execution.declare import declare as make_record
from memtail.execution.embedded import run
from memtail.spec import Experiment
from memtail.storage.local import LocalStore
from memtail.trainers import landlock, process
from memtail.trainers.images import devices, images
from memtail.trainers.shard_trainer import ShardTrainer
from memtail.trials import Shard, TrialBatch
from tests.support import inline
from tests.support.checkpoints import KeptCheckpoints
from tests.support.cli import command, write_spec

MODULE = """
import json, os, sys, time
from pathlib import Path
from torch import nn
from memtail.models.plain import mlp

sys.path.append("tests/support")

def wide(image_shape, classes):
    return mlp(image_shape, classes, [16])

class Single(nn.Sequential):
    pass

def linear(input_shape, classes):
    (features,) = input_shape
    return Single(nn.Linear(features, classes))

def single(image_shape, classes):
    return Single(*mlp(image_shape, classes, [16]))

def acting(image_shape, classes, act, **options):
    exec(act)
    return single(image_shape, classes)

class Slow(nn.Sequential):
    def forward(self, images):
        time.sleep(0.02 * self.training)
        return super().forward(images)

def slow(image_shape, classes):
    return Slow(*mlp(image_shape, classes, [16]))

built = 0

def cramped(image_shape, classes):
    global built
    built += 1
    if built == 5:
        raise RuntimeError("can't allocate memory")
    return wide(image_shape, classes)

def looking(image_shape, classes, file, read):
    import hostile_trainer
    seen = {
        "pid": os.getpid(),
        "environment": dict(os.environ),
        "open": hostile_trainer.opened(),
        "parents": [hostile_trainer.attempt(lambda p=p: hostile_trainer._read(f"/proc/{p}/environ")) for p in hostile_trainer.parents()],
        "read": [hostile_trainer.attempt(lambda p=p: hostile_trainer._read(p)) for p in read],
    }
    Path(file).write_text(json.dumps(seen))
    return single(image_shape, classes)
"""
SUPPORT = Path(__file__).parents[1] / "support"
FIRST = Shard(0, 5)

needs_landlock = pytest.mark.skipif(not landlock.version(), reason="needs Landlock")


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    """A module of networks in a folder of code; a result that its networks may write to."""
    folder = tmp_path / "code"
    folder.mkdir()
    (tmp_path / "results").mkdir()
    (folder / "mine.py").write_text(MODULE.replace("tests/support", str(SUPPORT)))
    monkeypatch.setenv("MEMTAIL_CODE", str(folder))
    return folder


@pytest.fixture(scope="module")
def small():
    return datasets.prepare(Experiment.parse({"name": "e", "dataset": {"name": "digits", "max_train": 200, "max_test": 50}}).dataset)


def declare(small, model, **parts):
    spec = {"name": "mine", "dataset": {"name": "digits", "max_train": 200, "max_test": 50}, "model": model, "training": {"epochs": 2}}
    return make_record(
        Experiment.parse({**spec, "subsets": {"trials": 12, "design": "balanced"}, "record": {"margins": True}, **parts}), small, 6
    )


def network(name, **options):
    return {"name": f"mine:{name}", "options": options}


@pytest.fixture
def trainer():
    made = ShardTrainer("cpu")
    yield made
    made.end()


@pytest.fixture
def train(trainer, module, small):
    def train(record, trained=FIRST, kept=None, **options):
        return trainer.train(record, small, trained, kept or KeptCheckpoints(), code=module, **options)

    return train


def timeless(batch: TrialBatch) -> bytes:
    """The bytes of a batch without what depends on the time."""
    return replace(batch, provenance=replace(batch.provenance, started=None, seconds=None, phases=None)).to_bytes()


@pytest.fixture
def here(module, small, monkeypatch):
    """Train in this process."""
    monkeypatch.syspath_prepend(str(module))

    def train(record, trained=FIRST, kept=None):
        inside, kept = ShardTrainer("cpu"), kept or KeptCheckpoints()
        return inside._train_images(record, small, trained, kept, lambda fraction: None, lambda: None, lambda: False, lambda: None)

    return train


@pytest.mark.parametrize("name", ["wide", "single"])
def test_a_batch_has_the_bytes_of_a_training_in_this_process(train, here, small, name):
    record, fractions, steps = declare(small, network(name)), [], []
    batch = train(record, on_progress=fractions.append, on_step=lambda: steps.append(1))
    assert {"data", "forward/backward", "evaluation"} <= batch.provenance.phases.keys()
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert len(steps) >= len(fractions)
    assert timeless(batch) == timeless(here(record))
    assert batch.train_margin is not None


@pytest.mark.parametrize("name", ["wide", "single"])
def test_models_have_the_bytes_of_a_training_in_this_process(train, here, small, name):
    record, kept, kept_here = declare(small, network(name), record={"models": 3}), KeptCheckpoints(), KeptCheckpoints()
    train(record, kept=kept)
    here(record, kept=kept_here)
    assert list(kept.models) == [0, 1, 2]
    assert kept.models == kept_here.models


@pytest.mark.parametrize(("trial", "models"), [(3, 3), (7, "all"), (-1, "all")])
def test_a_network_that_sends_other_models_than_are_to_be_kept_is_refused(train, small, trial, models):
    act = f"""
import gc
from memtail.trainers.child import _Parent
for each in gc.get_objects():
    if isinstance(each, _Parent):
        each.keep_model({trial}, b"forged")
"""
    record, kept = declare(small, network("acting", act=act), record={"models": models}), KeptCheckpoints()
    with pytest.raises(TrainerError, match=rf"^the trainer process returned a model of trial {trial}, which is not to be kept$"):
        train(record, kept=kept)
    assert not kept.models


def test_a_network_gets_features_in_the_trainer_process(module, trainer, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"{split}_{name}": values for split, count in (("train", 60), ("test", 20)) for name, values in _split(rng, count).items()}
    np.savez(tmp_path / "features.npz", **arrays)
    dataset = datasets.prepare(Experiment.parse({"name": "e", "dataset": {"name": "arrays", "root": tmp_path / "features.npz"}}).dataset)
    spec = {"name": "arrays", "root": str(tmp_path / "features.npz")}
    record = declare(dataset, network("linear"), dataset=spec, training={"epochs": 40, "batch_size": 8})
    batch = trainer.train(record, dataset, FIRST, KeptCheckpoints(), code=module)
    assert not any(entry.diverged for entry in batch.metrics)
    assert batch.metrics[0].in_subset_accuracy > 0.5


def _split(rng, count):
    labels = np.arange(count) % 2
    return {"features": rng.normal(size=(count, 3)).astype(np.float32) + labels[:, None], "labels": labels}


def test_networks_of_memtail_train_in_this_process(train, small, monkeypatch):
    monkeypatch.setattr(process.TrainerProcess, "_start", lambda *_: pytest.fail("a trainer process was started"))
    train(declare(small, {"name": "mlp", "hidden": [16]}))


def test_this_process_keeps_no_images_on_the_device_while_a_network_trains(train, small):
    images.release_images()
    train(declare(small, {"name": "mlp", "hidden": [16]}))
    assert len(images._kept) == 1
    train(declare(small, network("single")))
    assert not images._kept


@needs_landlock
def test_a_network_sees_no_credentials_and_no_store(train, small, tmp_path, monkeypatch):
    store, key, file = tmp_path / "store", tmp_path / "secret", tmp_path / "results" / "seen"
    LocalStore(store).put("experiments/other/experiment.json", b"{}")
    key.write_text("secret")
    monkeypatch.setenv("MEMTAIL_BROKER_FILE", str(key))
    for name in ("MEMTAIL_S3_SECRET_KEY", "AWS_SECRET_ACCESS_KEY", "MEMTAIL_BROKER"):
        monkeypatch.setenv(name, "secret")
    read = [str(key), str(store / "experiments" / "other" / "experiment.json"), str(small.folder / "meta.json")]
    train(declare(small, network("looking", file=str(file), read=read)), store=str(store))
    seen = json.loads(file.read_text())
    assert seen["pid"] != os.getpid()
    assert not [name for name, value in seen["environment"].items() if "secret" in value or name.startswith("AWS_")]
    assert len([target for number, target in seen["open"].items() if int(number) > 2 and target.startswith("socket:")]) == 1
    assert seen["parents"] == ["Permission denied"] * 2
    assert seen["read"] == ["Permission denied", "Permission denied", "done"]


FATAL = {
    "raise ValueError('not today')": r"^ValueError: not today$",
    "os._exit(3)": r"^the trainer process ended with exit code 3$",
    "os.kill(os.getpid(), 9)": r"^the trainer process was ended by SIGKILL: out of memory, or killed$",
    "raise RuntimeError('CUDA error: unknown')": r"^RuntimeError: CUDA error: unknown$",
    "import memtail; raise memtail.WorkerFaultError('not mine')": r"^not mine$",
}


@pytest.mark.parametrize(("act", "message"), FATAL.items())
def test_a_fatal_network_costs_its_shard_and_says_why(trainer, train, small, act, message):
    with pytest.raises(TrainerError, match=message) as caught:
        train(declare(small, network("acting", act=act)))
    assert type(caught.value) is TrainerError
    assert trainer.usable


def test_an_import_that_fails_costs_its_shard_and_the_next_shard_gets_a_new_process(train, small, module, tmp_path):
    mark = tmp_path / "results" / "mark"
    code = f"from pathlib import Path\nif not Path({str(mark)!r}).exists():\n    Path({str(mark)!r}).touch()\n    raise OSError('first')\n"
    (module / "broken.py").write_text(f"{code}from mine import single\n")
    record = declare(small, {"name": "broken:single"})
    with pytest.raises(TrainerError, match=r"^model.name: 'broken:single' cannot be imported \(OSError: first\)") as caught:
        train(record)
    assert "raise OSError('first')" in str(caught.value.__cause__)
    assert train(record, Shard(6, 11)).trial.tolist() == list(range(6, 12))


def test_a_fault_of_this_machine_is_not_charged_to_the_network(train, small, monkeypatch):
    def broken(device):
        raise WorkerFaultError("device cpu computes wrongly")

    monkeypatch.setattr(devices, "check_device", broken)
    with pytest.raises(WorkerFaultError, match=r"^device cpu computes wrongly$") as caught:
        train(declare(small, network("acting", act="1 / 0")))
    assert "division by zero" in str(caught.value.__cause__)


def test_training_stops_with_a_checkpoint_and_goes_on_from_it_to_the_same_bytes(train, small):
    record, kept, fractions = declare(small, network("slow")), KeptCheckpoints(), []
    with pytest.raises(TrainingStopped):
        train(record, kept=kept, on_progress=fractions.append, stop=lambda: bool(fractions) and fractions[-1] > 0.3)
    assert 0.3 < fractions[-1] < 0.9
    fractions.clear()
    resumed = train(record, kept=kept, on_progress=fractions.append)
    assert fractions[0] >= 0.3 - 1 / 12
    assert timeless(resumed) == timeless(train(record))


def test_a_network_for_which_memory_is_short_is_trained_in_smaller_stacks(train, small):
    with capture_logs() as events:
        batch = train(declare(small, network("cramped")))
    assert any("halving the stack" in event.get("output", "") for event in events)
    assert (batch.train_correct == train(declare(small, network("wide"))).train_correct).all()


HANGS = {
    "in construction": "time.sleep(1000)",
    "in a step": "Single.forward = lambda self, images: time.sleep(1000)",
}


@pytest.mark.parametrize("act", HANGS.values(), ids=HANGS)
def test_a_network_that_hangs_is_ended_and_its_stack_is_shown(trainer, train, small, act):
    with pytest.raises(TrainerError, match=r"^training hangs: no progress for more than 10 s: the output shows where") as caught:
        train(declare(small, network("acting", act=act)), silence=10)
    assert "most recent call first" in str(caught.value.__cause__)
    assert "in train_network_shard" in str(caught.value.__cause__)
    assert trainer.usable


def test_a_run_imports_its_network_in_trainer_processes_only(module, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "mine", raising=False)  # of another test
    monkeypatch.chdir(module)
    spec = {"name": "mine", "dataset": {"name": "digits"}, "model": {"name": "mine:wide"}, "training": {"epochs": 1}}
    execution = {"device": "cpu", "trials_per_shard": 2}
    experiment = Experiment.parse({**spec, "subsets": {"trials": 4, "design": "balanced"}, "execution": execution})
    with inline.training():
        result = run(experiment, tmp_path / "store")
    assert result.summary.trials == 4
    assert "mine" not in sys.modules


@pytest.mark.parametrize("name", ["run", "submit"])
def test_a_network_that_ends_its_process_when_it_is_checked_is_one_line(name, module, tmp_path):
    (module / "deadly.py").write_text("import os\nprint('before the end', flush=True)\nos._exit(3)\n")
    path = write_spec(tmp_path, "deadly", model={"name": "deadly:build"})
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "model": {"name": "deadly:build"}}))
    done = command(name, str(path), "--store", str(tmp_path / "store"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "memtail: model 'deadly:build': the process that built it ended with exit code 3: fix the model"
    )
    assert not list((tmp_path / "store").glob("experiments/*"))
