"""Training on a device: equal bits twice, after an interruption and after a full memory; agreement of devices; sticky errors."""

import math
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch

from memtail.datasets import prepare
from memtail.errors import WorkerFaultError
from memtail.statistics import cooccurrence
from memtail.statistics.cooccurrence_torch import count_block, words_on
from memtail.trainers.images import prefetch, train_shard
from memtail.trainers.images import shard as shard_module
from memtail.trainers.images.cuda.network import CapturedNetwork
from memtail.trainers.images.cuda.steps import CapturedSteps
from memtail.trainers.images.devices import check_device, check_in_new_process, is_device_error
from memtail.trainers.images.images import device_images, release_images
from memtail.trainers.images.profiling import COMPUTATION
from memtail.trials import unpack
from tests.support.training import Interrupted, same_bits

pytestmark = pytest.mark.usefixtures("no_images")

CPU = torch.device("cpu")
MODELS = {
    "mlp": {"name": "mlp", "hidden": [16]},
    "cnn": {"name": "cnn", "channels": [4], "hidden": 8},
    "resnet9": {"name": "resnet9", "options": {"width": 4}},
}
PRECISIONS = ["float32", "tf32", "bfloat16", "auto"]


@pytest.fixture
def few(declare):
    return prepare(declare(dataset={"name": "digits", "max_train": 200}).dataset)


def experiment_of(declare, model, precision="auto", trials=3, **training):
    recipe = {"epochs": 2, "augmentation": "crop-flip", "precision": precision, **training}
    return declare(trials, model=MODELS[model], training=recipe, record={"margins": True, "scores": True})


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model", MODELS)
def test_training_twice_gives_equal_bits_by_deterministic_kernels_alone(declare, few, device, model, precision):
    experiment = experiment_of(declare, model, precision)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of kernels that are not deterministic
        first, second = (train_shard(experiment, few, range(3), device) for _ in range(2))
    assert same_bits([first], [second], recorded=True)


@pytest.mark.parametrize("model", MODELS)
def test_an_interrupted_shard_ends_with_equal_bits(declare, few, device, model, monkeypatch):
    monkeypatch.setattr(shard_module, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(shard_module, "_CHECKPOINT_SHARE", math.inf)
    experiment = experiment_of(declare, model, batch_size=32)
    expected, checkpoints = train_shard(experiment, few, range(3), device), Interrupted(2)
    with pytest.raises(Interrupted.StopError):
        train_shard(experiment, few, range(3), device, checkpoints=checkpoints)
    assert same_bits([expected], [train_shard(experiment, few, range(3), device, checkpoints=checkpoints)], recorded=True)


@pytest.mark.parametrize("model", MODELS)
def test_an_interrupted_shard_ends_on_another_device_with_the_bits_of_that(declare, few, gpu, model, monkeypatch):
    monkeypatch.setattr(shard_module, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(shard_module, "_CHECKPOINT_SHARE", math.inf)
    experiment = experiment_of(declare, model, batch_size=32, trials=2)
    for before, after in ((gpu, CPU), (CPU, gpu)):
        checkpoints = Interrupted(1)  # in the first stack: no trial is trained by two devices
        with pytest.raises(Interrupted.StopError):
            train_shard(experiment, few, range(2), before, checkpoints=checkpoints)
        expected = train_shard(experiment, few, range(2), after)
        resumed = train_shard(experiment, few, range(2), after, checkpoints=checkpoints)
        assert same_bits([expected], [resumed], recorded=True)


@pytest.mark.parametrize("model", MODELS)
def test_images_in_host_memory_give_equal_bits(declare, few, device, model):
    experiment = experiment_of(declare, model)
    expected, images = train_shard(experiment, few, range(3), device), device_images(few, device)
    assert images.evict() == (device.type == "cuda")
    images.resident = False
    assert same_bits([expected], [train_shard(experiment, few, range(3), device)], recorded=True)


@pytest.mark.parametrize("model", MODELS)
def test_no_bit_depends_on_the_other_networks_of_a_stack_in_float32(declare, few, device, model):
    experiment = experiment_of(declare, model, "float32", trials=8)
    together = train_shard(experiment, few, range(8), device)
    assert same_bits([together], [train_shard(experiment, few, range(start, start + 4), device) for start in (0, 4)], recorded=True)


def test_a_limit_of_memory_halves_the_stack_and_the_training_ends(declare, digits, gpu):
    experiment = declare(256, model={"name": "mlp", "hidden": [1024, 1024]}, training={"epochs": 1, "precision": "float32"})
    train_shard(experiment, digits, range(2), gpu)  # the context, libraries and kernels
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(gpu)
    torch.cuda.set_per_process_memory_fraction(min(1.0, (total - free + (2 << 30)) / total), gpu)  # 256 networks take 4 to 5 GiB
    try:
        torch.cuda.reset_peak_memory_stats(gpu)
        batch = train_shard(experiment, digits, range(256), gpu)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, gpu)
    assert len(batch.trial) == 256
    assert not any(entry.diverged for entry in batch.metrics)


def test_devices_agree_within_the_standard_errors(declare, digits, gpu):
    experiment = declare(64, model={"name": "mlp", "hidden": [64]}, training={"epochs": 10, "precision": "auto"})
    rates = []
    for where in (CPU, gpu):
        batch = train_shard(experiment, digits, range(64), where)
        members = unpack(batch.membership, digits.n_train)
        correct = unpack(batch.train_correct, digits.n_train)
        inside = (correct & members).sum(0) / members.sum(0)
        outside = (correct & ~members).sum(0) / (~members).sum(0)
        rates.append((inside - outside, members.sum(0), inside, outside))
    (here, size, p_in, p_out), (there, _, q_in, q_out) = rates
    variance = sum(p * (1 - p) / n for p, n in ((p_in, size), (q_in, size), (p_out, 64 - size), (q_out, 64 - size)))
    assert abs(np.mean(here - there)) < 0.005
    assert np.mean(np.abs(here - there) <= 3 * np.sqrt(variance) + 1 / (64 - size)) > 0.99


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model", MODELS)
def test_captured_steps_give_the_bits_of_the_same_steps_uncaptured(declare, few, gpu, model, precision, monkeypatch):
    experiment = experiment_of(declare, model, precision, batch_size=32)
    captured = train_shard(experiment, few, range(3), gpu)
    release_images()
    monkeypatch.setattr(CapturedSteps, "_take_step", lambda self, pixels, labels: self._step(pixels, labels))
    assert same_bits([captured], [train_shard(experiment, few, range(3), gpu)], recorded=True)


@pytest.mark.parametrize("optimizer", [{}, {"name": "adamw", "lr": 0.003}], ids=["sgd", "adamw"])
def test_a_network_that_has_trained_other_trials_gives_the_bits_of_a_new_one(declare, few, gpu, optimizer):
    experiment = experiment_of(declare, "resnet9", batch_size=32, optimizer=optimizer)
    together = train_shard(experiment, few, range(3), gpu)
    ((_, kept),) = device_images(few, gpu).networks
    assert isinstance(kept, CapturedNetwork)
    alone = []
    for trial in range(3):
        release_images()
        alone.append(train_shard(experiment, few, range(trial, trial + 1), gpu))
    assert same_bits([together], alone, recorded=True)


@pytest.mark.parametrize("execution", [{"compile": True}, {"compile": False}], ids=["compiled", "plain"])
@pytest.mark.parametrize("model", MODELS)
def test_compiled_captured_and_plain_steps_agree_within_rounding(declare, digits, gpu, model, execution):
    recipe = {"epochs": 1, "precision": "float32", "optimizer": {"lr": 0.01}}
    batches = [
        train_shard(declare(2, model=MODELS[model], training=recipe, record={"margins": True}, execution=each), digits, range(2), gpu)
        for each in ({}, execution)
    ]
    kept = device_images(digits, gpu).networks
    if model != "mlp" and execution["compile"]:
        assert kept[-1][1].compiled
    assert np.abs(batches[0].test_margin.astype(float) - batches[1].test_margin).max() < 0.1


@pytest.mark.parametrize(("W", "a", "b"), [(1, 1, 1), (3, 33, 70), (200, 300, 65), (2, 0, 5), (2, 5, 0)])
def test_counts_equal_those_of_the_compiled_kernel(device, W, a, b):
    rng = np.random.default_rng(0)
    left, right = (rng.integers(0, 2**64, (W, columns), dtype=np.uint64) for columns in (a, b))
    found = count_block(words_on(left, device), words_on(right, device)).cpu().numpy()
    assert (found == (cooccurrence(left, right) if a and b else np.zeros((a, b)))).all()


STICKY = """
import torch
from memtail.trainers.images.devices import is_device_error
values = torch.zeros(4, device="cuda")
try:
    values[torch.tensor([9], device="cuda")].cpu()
except Exception as error:
    assert is_device_error(error), error
else:
    raise SystemExit("no error")
try:
    torch.zeros(4, device="cuda").sum().item()
except Exception as error:
    assert is_device_error(error), error
    print("unusable")
"""


def test_an_error_of_a_kernel_leaves_its_process_unusable_and_another_one_usable(gpu):
    done = subprocess.run([sys.executable, "-c", STICKY], capture_output=True, text=True, check=False, timeout=100)
    assert done.stdout.split() == ["unusable"], done.stderr
    check_in_new_process(gpu)


def test_a_gpu_that_does_not_exist_is_a_fault_of_the_machine_and_no_sticky_error(gpu):
    with pytest.raises(WorkerFaultError) as raised:
        check_device(torch.device("cuda", torch.cuda.device_count()))
    assert is_device_error(raised.value)
    check_device(gpu)


TWICE = """
import sys
from memtail import datasets
from memtail.spec import Experiment
from memtail.trainers.images import train_shard
import torch
experiment = Experiment.parse({"name": "e", "dataset": {"name": "digits"}, "training": {"epochs": 2}, "subsets": {"trials": 32}})
batch = train_shard(experiment, datasets.prepare(experiment.dataset), range(32), torch.device("cuda:0"))
sys.stdout.write(batch.train_correct.tobytes().hex())
"""


def test_two_processes_train_on_one_gpu_at_once_with_equal_bits(gpu):
    running = [subprocess.Popen([sys.executable, "-c", TWICE], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=110)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert said[0] == said[1] != ""


@pytest.mark.parametrize("model", MODELS)
def test_no_bit_depends_on_work_ahead(declare, few, device, model, monkeypatch):
    monkeypatch.setattr(shard_module, "stack_width", lambda *_: 2 if model != "resnet9" else 1)
    experiment, got = experiment_of(declare, model, trials=8), []
    for ahead in (False, True):
        for module in (prefetch, shard_module):
            monkeypatch.setattr(module, "runs_ahead", lambda device, ahead=ahead: ahead)
        got.append([train_shard(experiment, few, range(start, start + 4), device, following=lambda: range(4, 8)) for start in (0, 4)])
    assert same_bits(*got, recorded=True)


def test_phases_wait_for_nothing_and_add_up_to_the_time_of_the_device(declare, few, gpu):
    provenance = train_shard(experiment_of(declare, "resnet9", epochs=5), few, range(2), gpu).provenance
    assert {"data", "forward/backward", "evaluation"} <= set(provenance.phases)
    assert 0.2 * provenance.seconds < sum(provenance.phases.values()) <= provenance.seconds + 0.01


BUSY = {
    "mnist-mlp": ((60_000, 28, 28), {"model": {"name": "mlp", "hidden": [512, 256]}, "training": {"precision": "auto", "epochs": 10}}, 512),
    "resnet9": (
        (50_000, 32, 32, 3),
        {"model": {"name": "resnet9"}, "training": {"precision": "auto", "epochs": 8, "batch_size": 512, "augmentation": "crop-flip"}},
        2,
    ),
}


@pytest.mark.parametrize("name", BUSY)
def test_a_gpu_computes_for_nine_tenths_of_its_time(declare, tmp_path, gpu, name):
    shape, parts, size = BUSY[name]
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, shape, np.uint8), random.integers(0, 10, shape[0])
    test = {"test_images": images[:10_000], "test_labels": labels[:10_000]}
    np.savez(tmp_path / "random.npz", train_images=images, train_labels=labels, **test)
    experiment = declare(3 * size, dataset={"name": "arrays", "root": str(tmp_path / "random.npz")}, **parts)
    dataset, shards = prepare(experiment.dataset), [range(start, start + size) for start in range(0, 3 * size, size)]
    train_shard(experiment, dataset, shards[0], gpu, following=lambda: shards[1])  # kernels and graphs are made
    began, computed = time.perf_counter(), 0.0
    for place, after in ((1, shards[2]), (2, None)):
        phases = train_shard(experiment, dataset, shards[place], gpu, following=lambda after=after: after).provenance.phases
        computed += sum(phases.get(phase, 0.0) for phase in COMPUTATION)
    assert computed / (time.perf_counter() - began) >= 0.9
