"""Training of shards: purity, batches, divergence, memory, checkpoints, and equality with plain torch."""

import copy
import dataclasses
import io
import math
import typing

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memtail import models, subsets
from memtail.datasets import prepare
from memtail.errors import SpecError
from memtail.models import build_model, check_model
from memtail.spec import AugmentationSpec, Constant, Cosine, Linear, NamedModel, OptimizerSpec, ScheduleSpec, Sgd, Step
from memtail.trainers.images import devices, evaluation, stack_trainer, stack_width, train_shard
from memtail.trainers.images import shard as shard_module
from memtail.trainers.images.augmentations import _STEPS
from memtail.trainers.images.batches import batch_bounds, epoch_order
from memtail.trainers.images.cpu.mlp import DenseStack, dense_layers
from memtail.trainers.images.images import DeviceImages
from memtail.trainers.images.optimizers import _OPTIMIZERS
from memtail.trainers.images.schedule import _SCHEDULES, learning_rate_factor
from memtail.trainers.images.shard_size import checked_shard_size, operations_per_trial
from memtail.trainers.images.stack import is_stackable, stack_networks
from memtail.trainers.images.stack_trainer import StackedRun
from memtail.trials import unpack
from tests.support.arrays import write_arrays
from tests.support.training import STACKABLE, Interrupted, same_bits, torchs_optimizer

CPU = torch.device("cpu")
RECORDED = {"margins": True, "scores": True}


def in_shards(experiment, dataset, trials, size):
    return [train_shard(experiment, dataset, range(first, min(first + size, trials)), CPU) for first in range(0, trials, size)]


@pytest.fixture
def small(tmp_path):
    """Prepare a dataset of 40 training images in two classes."""
    return prepare(_arrays(tmp_path))


def _arrays(tmp_path):
    from memtail.spec import DatasetSpec

    return DatasetSpec(name="arrays", root=write_arrays(tmp_path / "a.npz"))


def test_64_trials_give_the_same_bits_in_shards_of_1_7_and_64(declare, digits):
    experiment = declare(64, training={"epochs": 3, "augmentation": "crop-flip", "label_smoothing": 0.1}, record=RECORDED)
    together = in_shards(experiment, digits, 64, 64)
    assert same_bits(together, in_shards(experiment, digits, 64, 1), recorded=True)
    assert same_bits(together, in_shards(experiment, digits, 64, 7), recorded=True)


@pytest.mark.parametrize("model", [{"name": "cnn", "channels": [4, 8], "hidden": 16}, {"name": "resnet9", "options": {"width": 2}}])
def test_convolutional_trials_give_the_same_bits_in_any_shard_and_twice(declare, digits, model):
    experiment = declare(3, model=model, training={"epochs": 1, "augmentation": "flip"}, dataset={"name": "digits", "max_train": 100})
    dataset = prepare(experiment.dataset)
    together = in_shards(experiment, dataset, 3, 3)
    assert same_bits(together, in_shards(experiment, dataset, 3, 1))
    assert same_bits(together, in_shards(experiment, dataset, 3, 3))


def test_results_do_not_depend_on_threads_or_on_torchs_global_generator(declare, digits):
    experiment = declare(4)
    first = train_shard(experiment, digits, range(4), CPU)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    second = train_shard(experiment, digits, range(4), CPU)
    assert same_bits([first], [second])
    assert (torch.get_rng_state() == before).all()
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)


def test_every_batch_comes_from_the_subset_and_each_member_is_seen_once_an_epoch(declare, digits, monkeypatch):
    experiment = declare(5, training={"epochs": 3, "batch_size": 50, "augmentation": "crop-flip"})
    members = subsets.membership(experiment.subsets, digits.train_labels, range(5))
    seen = []
    batches = DeviceImages.batches

    def record(self, epoch, parts):
        seen.extend(epoch.order[:, part].clone() for part in parts)
        return batches(self, epoch, parts)

    sizes, steps = set(), DenseStack.train_steps

    def record_steps(self, pixels, labels, bounds, rates):
        assert bounds[0][0] == 0
        assert bounds[-1][1] == pixels.shape[1] == labels.shape[1]
        sizes.update(stop - start for start, stop in bounds)
        return steps(self, pixels, labels, bounds, rates)

    monkeypatch.setattr(DeviceImages, "batches", record)
    monkeypatch.setattr(DenseStack, "train_steps", record_steps)
    train_shard(experiment, digits, range(5), CPU)
    epochs = torch.cat(seen, 1).numpy().reshape(5, 3, -1)
    for trial in range(5):
        for epoch in range(3):
            assert sorted(epochs[trial, epoch].tolist()) == np.flatnonzero(members[trial]).tolist()
        assert not (epochs[trial, 0] == epochs[trial, 1]).all()
    assert sizes == {50, members[0].sum() % 50}


def reference_trial(experiment, dataset, trial):
    """Train one model in plain PyTorch, with memtail's membership, initial weights and batch order."""
    recipe, spec = experiment.training, experiment.training.optimizer
    member = subsets.membership(experiment.subsets, dataset.train_labels, [trial])[0]
    images = torch.from_numpy(np.array(dataset.train_images)).float().sub(torch.tensor(dataset.mean)).div(torch.tensor(dataset.std))
    images, labels = images.permute(0, 3, 1, 2), torch.from_numpy(np.array(dataset.train_labels))
    from memtail.randomness import Purpose, torch_seed

    torch.manual_seed(torch_seed(experiment.subsets.seed, Purpose.WEIGHTS, trial))
    model = build_model(experiment.model, dataset.image_shape, len(dataset.classes))
    optimizer = torchs_optimizer(spec, model.parameters())
    subset, step = np.flatnonzero(member)[None], 0
    bounds = batch_bounds(subset.shape[1], recipe.batch_size)
    for epoch in range(recipe.epochs):
        order = epoch_order(experiment.subsets.seed, [trial], epoch, subset)[0]
        for start, stop in bounds:
            for group in optimizer.param_groups:
                group["lr"] = spec.lr * learning_rate_factor(recipe.schedule, step, recipe.epochs * len(bounds))
            batch = torch.from_numpy(order[start:stop])
            loss = F.cross_entropy(model(images[batch]), labels[batch], label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    return model


@pytest.mark.parametrize(
    "model", [{"name": "mlp", "hidden": [32, 16]}, {"name": "mlp", "hidden": []}, {"name": "cnn", "channels": [4], "hidden": 8}]
)
@pytest.mark.parametrize(
    ("smoothing", "optimizer"), [(0.0, {}), (0.2, {}), (0.0, {"name": "adamw", "weight_decay": 0.5}), (0.2, {"name": "adam"})]
)
def test_a_stacked_trial_ends_with_the_weights_of_a_plain_pytorch_loop(declare, digits, model, smoothing, optimizer):
    experiment = declare(3, model=model, training={"epochs": 2, "label_smoothing": smoothing, "optimizer": optimizer})
    members = subsets.membership(experiment.subsets, digits.train_labels, range(3))
    run = StackedRun(
        experiment, DeviceImages(digits, CPU), digits.image_shape, 10, [0, 1, 2], np.stack([np.flatnonzero(row) for row in members])
    )
    run.train(lambda _: None)
    images = torch.rand(7, *digits.image_shape)
    logits = run.stack.eval()(images)
    for trial in range(3):
        torch.testing.assert_close(logits[trial], reference_trial(experiment, digits, trial).eval()(images), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("optimizer", [{}, {"name": "adamw", "lr": 0.003, "weight_decay": 0.5}])
def test_a_network_trained_alone_classifies_as_that_of_a_plain_pytorch_loop(declare, digits, optimizer):
    experiment = declare(3, model={"name": "resnet9", "options": {"width": 2}}, training={"epochs": 1, "optimizer": optimizer})
    batch = train_shard(experiment, digits, [2], CPU)
    shift, scale = DeviceImages(digits, CPU).shift, DeviceImages(digits, CPU).scale
    images = ((torch.from_numpy(np.array(digits.test_images)) + shift) * scale).movedim(-1, -3)
    predicted = reference_trial(experiment, digits, 2).eval()(images).argmax(1)
    correct = unpack(batch.test_correct, digits.n_test)[0]
    assert (correct == (predicted.numpy() == digits.test_labels)).mean() > 0.99


@pytest.mark.parametrize("name", STACKABLE)
def test_a_stack_computes_what_its_networks_compute(name):
    networks = [STACKABLE[name]() for _ in range(3)]
    assert all(is_stackable(network) for network in networks)
    stack = stack_networks([copy.deepcopy(network) for network in networks])
    shape = (1, 8, 8) if name == "mlp" else (3, 8, 8)
    batch = torch.randn(3, 6, *shape)
    for mode in (True, False):
        stack.train(mode)
        for network in networks:
            network.train(mode)
        expected = torch.stack([network(images) for network, images in zip(networks, batch, strict=True)])
        torch.testing.assert_close(stack(batch), expected)
    torch.testing.assert_close(stack(batch[0]), torch.stack([network(batch[0]) for network in networks]))


def test_only_sequences_of_plain_layers_are_stacked():
    shared, frozen, hooked = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4)
    hooked.register_forward_hook(lambda *_: None)
    for network in (
        nn.Sequential(nn.Flatten(), shared, nn.ReLU(), shared),
        nn.Sequential(nn.Flatten(), frozen),
        nn.Sequential(nn.Flatten(), hooked),
        nn.Sequential(nn.Linear(4, 4), nn.Flatten()),
        nn.Sequential(nn.Flatten(2), nn.Linear(4, 4)),
        nn.Linear(2, 2),
        nn.Sequential(nn.Dropout()),
        nn.Sequential(nn.Sequential(nn.GELU())),
        models.resnet.resnet9((3, 32, 32), 10, width=2),
    ):
        assert not is_stackable(network)
    with pytest.raises(ValueError, match="cannot be stacked"):
        stack_networks([nn.Linear(2, 2), nn.Linear(2, 2)])


def test_a_diverged_trial_is_recorded_and_does_not_change_the_others_in_its_stack(declare, digits, monkeypatch):
    experiment = declare(4, training={"epochs": 2})
    good = train_shard(experiment, digits, range(4), CPU)
    build, built = build_model, []

    def poisoned(*args):
        network = build(*args)
        built.append(network)
        if len(built) == 3:  # the first network is built to inspect it; trial 1 is the third
            with torch.no_grad():
                network[1].weight[0, 0] = float("nan")
        return network

    monkeypatch.setattr("memtail.trainers.images.initial.build_model", poisoned)
    built.append(None)
    bad = train_shard(experiment, digits, range(4), CPU)
    assert [entry.diverged for entry in bad.metrics] == [False, True, False, False]
    assert bad.metrics[1].loss is None
    assert not unpack(bad.train_correct, digits.n_train)[1].any()
    assert not bad.test_correct[1].any()
    for row in (0, 2, 3):
        assert (bad.train_correct[row] == good.train_correct[row]).all()
        assert bad.metrics[row] == good.metrics[row]


def test_a_trial_whose_loss_explodes_is_recorded_as_diverged(declare, digits):
    experiment = declare(2, training={"optimizer": {"lr": 1e8}, "schedule": {"name": "constant"}})
    assert all(entry.diverged for entry in train_shard(experiment, digits, range(2), CPU).metrics)


def test_out_of_memory_halves_the_stack_until_it_fits_and_changes_no_bit(declare, digits, monkeypatch, capfd):
    experiment = declare(12)
    expected = train_shard(experiment, digits, range(12), CPU)
    fits, widths = StackedRun.train, []

    def cramped(self, between_steps):
        widths.append(len(self.trials))
        if len(self.trials) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return fits(self, between_steps)

    monkeypatch.setattr(StackedRun, "train", cramped)
    assert same_bits([expected], [train_shard(experiment, digits, range(12), CPU)])
    assert widths == [12, 6, 3, 3, 6, 3, 3]
    assert "halving the stack" in "".join(capfd.readouterr())


def test_one_trial_that_does_not_fit_is_an_error(declare, digits, monkeypatch):
    def never(self, between_steps):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(StackedRun, "train", never)
    with pytest.raises(torch.OutOfMemoryError):
        train_shard(declare(3), digits, range(3), CPU)


@pytest.mark.parametrize(
    ("model", "stop_at", "optimizer"),
    [
        ({"name": "mlp", "hidden": [16]}, 1, "sgd"),
        ({"name": "mlp", "hidden": [16]}, 20, "sgd"),
        ({"name": "resnet9", "options": {"width": 2}}, 9, "sgd"),
        ({"name": "tests.support.networks:with_dropout"}, 9, "sgd"),
        ({"name": "mlp", "hidden": [16]}, 20, "adamw"),
        ({"name": "mlp", "hidden": [16]}, 20, "adam"),
        ({"name": "cnn", "channels": [2], "hidden": 8}, 9, "adamw"),
    ],
)
def test_a_shard_resumed_from_any_checkpoint_ends_with_the_same_bits(declare, monkeypatch, model, stop_at, optimizer):
    monkeypatch.setattr(shard_module, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(shard_module, "_CHECKPOINT_SHARE", math.inf)
    monkeypatch.setattr(stack_width, "_DENSE", {"cpu": 3})
    monkeypatch.setattr(stack_trainer, "_PIXELS_AT_ONCE", 1)
    experiment = declare(
        5,
        model=model,
        record=RECORDED,
        dataset={"name": "digits", "max_train": 300},
        training={"batch_size": 32, "augmentation": "crop-flip", "optimizer": {"name": optimizer, "weight_decay": 0.1}},
    )
    dataset = prepare(experiment.dataset)
    expected = train_shard(experiment, dataset, range(5), CPU)
    checkpoints = Interrupted(stop_at)
    with pytest.raises(Interrupted.StopError):
        train_shard(experiment, dataset, range(5), CPU, checkpoints=checkpoints)
    saves = checkpoints.saves
    resumed = train_shard(experiment, dataset, range(5), CPU, checkpoints=checkpoints)
    assert same_bits([expected], [resumed], recorded=True)
    whole = Interrupted()
    train_shard(experiment, dataset, range(5), CPU, checkpoints=whole)
    assert checkpoints.saves - saves == whole.saves - stop_at  # no epoch before the checkpoint was trained again


def test_a_checkpoint_is_resumed_by_stacks_of_another_width(declare, digits, monkeypatch):
    monkeypatch.setattr(shard_module, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(shard_module, "_CHECKPOINT_SHARE", math.inf)
    monkeypatch.setattr(stack_trainer, "_PIXELS_AT_ONCE", 1)
    experiment = declare(9, training={"epochs": 1, "batch_size": 256})
    expected = train_shard(experiment, digits, range(9), CPU)
    for before, after, stop_at in ((2, 8, 13), (8, 2, 2), (3, 16, 4)):
        checkpoints = Interrupted(stop_at)
        monkeypatch.setattr(stack_width, "_DENSE", {"cpu": before})
        with pytest.raises(Interrupted.StopError):
            train_shard(experiment, digits, range(9), CPU, checkpoints=checkpoints)
        monkeypatch.setattr(stack_width, "_DENSE", {"cpu": after})
        assert same_bits([expected], [train_shard(experiment, digits, range(9), CPU, checkpoints=checkpoints)])


@pytest.mark.parametrize(("before", "after"), [(False, True), (True, False)])
def test_a_checkpoint_with_other_outcomes_than_are_recorded_is_not_used(declare, digits, monkeypatch, capfd, before, after):
    monkeypatch.setattr(shard_module, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(shard_module, "_CHECKPOINT_SHARE", math.inf)
    monkeypatch.setattr(stack_width, "_DENSE", {"cpu": 2})
    first, second = (declare(4, training={"epochs": 1}, record={"scores": scores}) for scores in (before, after))
    checkpoints = Interrupted(2)  # in the second stack
    with pytest.raises(Interrupted.StopError):
        train_shard(first, digits, range(4), CPU, checkpoints=checkpoints)
    resumed = train_shard(second, digits, range(4), CPU, checkpoints=checkpoints)
    assert same_bits([train_shard(second, digits, range(4), CPU)], [resumed])
    assert (resumed.train_score is not None) == after
    assert "checkpoint cannot be used, starting over" in "".join(capfd.readouterr())


def test_each_batch_of_an_evaluation_is_a_sign_of_life(declare, digits, monkeypatch):
    monkeypatch.setattr(evaluation, "_BATCH", {"cpu": 16})
    experiment, calls = declare(2, training={"epochs": 1}, record={"snapshots": [1]}), []
    train_shard(experiment, digits, range(2), CPU, stop=lambda: bool(calls.append(0)))
    images = 2 * math.ceil(digits.n_train / 16) + math.ceil(digits.n_test / 16)
    steps = len(batch_bounds(round(0.7 * digits.n_train), experiment.training.batch_size))
    assert images < len(calls) <= images + steps


def test_a_shard_that_is_resumed_on_another_kind_of_device_names_all_kinds_in_order(declare, digits, monkeypatch):
    monkeypatch.setattr(shard_module, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(shard_module, "_CHECKPOINT_SHARE", math.inf)
    experiment, checkpoints = declare(2), Interrupted(1)
    with pytest.raises(Interrupted.StopError):
        train_shard(experiment, digits, range(2), CPU, checkpoints=checkpoints)
    first = train_shard(experiment, digits, range(2), CPU, checkpoints=checkpoints).provenance
    assert first.devices is None
    assert first.kind == f"{first.device}, {first.cpu}"
    assert torch.backends.cpu.get_cpu_capability() in first.cpu
    monkeypatch.setattr(devices, "cpu_name", lambda: "another processor")
    monkeypatch.setattr(shard_module, "cpu_name", lambda: "another processor")
    second = train_shard(experiment, digits, range(2), CPU, checkpoints=checkpoints).provenance
    assert second.devices == (first.kind, second.kind)
    assert second.kind == f"{first.device}, another processor"


def test_checkpoints_that_take_long_are_written_rarely(declare, digits, monkeypatch):
    monkeypatch.setattr(shard_module, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(stack_trainer, "_PIXELS_AT_ONCE", 1)
    experiment = declare(4, training={"epochs": 4})

    def saves(share: float) -> int:
        monkeypatch.setattr(shard_module, "_CHECKPOINT_SHARE", share)
        checkpoints = Interrupted()
        train_shard(experiment, digits, range(4), CPU, checkpoints=checkpoints)
        return checkpoints.saves

    assert saves(1e-9) == 1 < saves(math.inf)  # the first is written, since the duration is unknown before


def test_a_damaged_or_foreign_checkpoint_is_reported_and_not_used(declare, digits, monkeypatch, capfd):
    monkeypatch.setattr(shard_module, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(shard_module, "_CHECKPOINT_SHARE", math.inf)
    monkeypatch.setattr(stack_trainer, "_PIXELS_AT_ONCE", 1)
    experiment = declare(2, training={"epochs": 1})
    expected = train_shard(experiment, digits, range(2), CPU)
    foreign = Interrupted(3)
    with pytest.raises(Interrupted.StopError):
        train_shard(declare(2, training={"epochs": 1, "label_smoothing": 0.5}), digits, range(2), CPU, checkpoints=foreign)
    damaged = Interrupted()
    damaged.state = foreign.state[: len(foreign.state) // 2]
    for checkpoints in (foreign, damaged):
        checkpoints.stop_at = None
        assert same_bits([expected], [train_shard(experiment, digits, range(2), CPU, checkpoints=checkpoints)])
    assert "".join(capfd.readouterr()).count("checkpoint cannot be used") == 2


def test_a_checkpoint_of_an_older_layout_is_dropped_and_the_shard_starts_over(declare, digits, monkeypatch, capfd):
    monkeypatch.setattr(shard_module, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(shard_module, "_CHECKPOINT_SHARE", math.inf)
    monkeypatch.setattr(stack_width, "_DENSE", {"cpu": 2})
    monkeypatch.setattr(stack_trainer, "_PIXELS_AT_ONCE", 1)
    experiment = declare(4, training={"epochs": 1})
    expected = train_shard(experiment, digits, range(4), CPU)
    checkpoints = Interrupted(30)
    with pytest.raises(Interrupted.StopError):
        train_shard(experiment, digits, range(4), CPU, checkpoints=checkpoints)
    state = torch.load(io.BytesIO(checkpoints.state), weights_only=True)
    assert state.pop("layout") == 2
    (first,) = state.pop("finished")
    del first["test_predicted_class"]
    first |= {"train_given": first.pop("train_predicted_class"), "test_given": None}
    older = io.BytesIO()
    torch.save({**state, "done": [first]}, older)  # as version 0.1.0 wrote it
    checkpoints.state, checkpoints.stop_at, checkpoints.saves = older.getvalue(), None, 0
    assert same_bits([expected], [train_shard(experiment, digits, range(4), CPU, checkpoints=checkpoints)])
    whole = Interrupted()
    train_shard(experiment, digits, range(4), CPU, checkpoints=whole)
    assert checkpoints.saves == whole.saves
    shown = "".join(capfd.readouterr())
    assert shown.count("checkpoint cannot be used, starting over") == 1
    assert "its layout is 1, this version reads 2" in shown


def test_training_uses_the_given_dataset(declare, digits):
    experiment = declare(2, training={"epochs": 1})
    other = dataclasses.replace(digits, train_labels=(digits.train_labels + 1) % 10)
    batches = [train_shard(experiment, dataset, range(2), CPU) for dataset in (digits, other)]
    assert (batches[0].test_correct != batches[1].test_correct).any()


def test_margins_scores_and_mistakes_are_those_of_the_final_model(declare, digits):
    experiment = declare(2, record=RECORDED)
    batch = train_shard(experiment, digits, range(2), CPU)
    correct = unpack(batch.train_correct, digits.n_train)
    assert ((batch.train_margin > 0) <= correct).all()
    assert (batch.train_margin[~correct] <= 0).all()
    model = reference_trial(experiment, digits, 0).eval()

    def logits(images):
        pixels = torch.from_numpy(np.array(images)).float()
        return model(pixels.sub(torch.tensor(digits.mean)).div(torch.tensor(digits.std)).permute(0, 3, 1, 2)).double()

    given = logits(digits.train_images).argmax(1).numpy()
    wrong = ~correct[0]
    assert wrong.sum() > 10
    assert np.mean(batch.train_mistakes[: wrong.sum()] == given[wrong]) > 0.95
    p = logits(digits.test_images).softmax(1).gather(1, torch.from_numpy(np.array(digits.test_labels))[:, None])[:, 0].detach()
    np.testing.assert_allclose(batch.test_margin[0].astype(float), torch.logit(p).numpy(), atol=0.05, rtol=0.02)
    np.testing.assert_allclose(batch.test_score[0], 255 * p.numpy(), atol=1.5)
    assert (batch.train_score[correct] >= 25).all()
    assert (batch.train_score[~correct] <= 128).all()


def test_progress_counts_every_epoch_of_every_trial(declare, digits, monkeypatch):
    monkeypatch.setattr(stack_width, "_DENSE", {"cpu": 2})
    seen = []
    train_shard(declare(5), digits, range(5), CPU, on_progress=lambda progress: seen.append((progress.epochs, progress.total)))
    assert seen == [(2, 10), (4, 10), (6, 10), (8, 10), (9, 10), (10, 10)]


def test_explicit_masks_of_different_sizes_train_in_one_shard(declare, digits, tmp_path):
    masks = np.zeros((4, digits.n_train), bool)
    for row, size in enumerate((700, 700, 300, 700)):
        masks[row, :size] = True
    np.save(tmp_path / "m.npy", masks)
    experiment = declare(4, subsets={"design": "explicit", "masks": tmp_path / "m.npy"})
    batch = train_shard(experiment, digits, range(4), CPU)
    assert (unpack(batch.membership, digits.n_train) == masks).all()
    assert same_bits([batch], in_shards(experiment, digits, 4, 1))


@pytest.mark.parametrize("precision", ["bfloat16", "auto"])
def test_training_in_low_precision_learns(declare, digits, precision):
    batch = train_shard(declare(2, training={"precision": precision, "epochs": 5}), digits, range(2), CPU)
    assert min(entry.in_subset_accuracy for entry in batch.metrics) > 0.9


def test_batches_cover_an_epoch_and_none_has_a_single_example():
    assert batch_bounds(10, 4) == [(0, 4), (4, 8), (8, 10)]
    assert batch_bounds(9, 4) == [(0, 4), (4, 9)]
    assert batch_bounds(3, 1) == [(0, 1), (1, 2), (2, 3)]
    assert batch_bounds(3, 4) == [(0, 3)]
    assert batch_bounds(1, 4) == [(0, 1)]


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (Constant(name="constant", warmup=0.2), [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        (Step(name="step", milestones=[0.5, 0.8], gamma=0.1), [1, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01]),
        (Linear(name="linear"), [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        (Cosine(name="cosine"), [(1 + np.cos(np.pi * k / 10)) / 2 for k in range(10)]),
    ],
)
def test_schedules(schedule, factors):
    np.testing.assert_allclose([learning_rate_factor(schedule, step, 10) for step in range(10)], factors, atol=1e-12)


def test_every_declarable_optimizer_schedule_and_augmentation_is_implemented():
    def names(*specs):
        return {spec.model_fields["name"].annotation.__args__[0] for spec in specs}

    assert _OPTIMIZERS.keys() == names(*typing.get_args(typing.get_args(OptimizerSpec)[0]))
    assert _STEPS.keys() == names(*typing.get_args(typing.get_args(AugmentationSpec)[0]))
    assert _SCHEDULES.keys() == names(*typing.get_args(typing.get_args(ScheduleSpec)[0]))


def test_one_network_serves_the_check_and_the_count_of_operations(declare, digits, monkeypatch):
    built = []
    monkeypatch.setattr(models, "build_model", lambda *args: built.append(args) or build_model(*args))
    automatic, declared = declare(100), declare(100, execution={"trials_per_shard": 7})
    layers = 2 * (64 * 16 + 16 * 10)
    assert operations_per_trial(automatic, digits) == layers * (3 * 0.7 * digits.n_train * 2 + digits.n_train + digits.n_test)
    assert len(built) == 1
    assert checked_shard_size(automatic, digits, [CPU, CPU]) == 50
    assert checked_shard_size(declared, digits, [CPU]) == 7
    assert len(built) == 3
    for execution in ({}, {"trials_per_shard": 7}):
        with pytest.raises(SpecError, match="there is no model 'resnet8'"):
            checked_shard_size(declare(model={"name": "resnet8"}, execution=execution), digits, [CPU])


@pytest.mark.parametrize(
    "name",
    [
        "convnet8",
        "resnet9",
        "resnet18",
        "resnet50",
        "densenet100",
        "inception",
        "mobilenet_v3_small",
        "tests.support.networks:with_dropout",
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_architecture_takes_small_grey_and_colour_images(name, channels):
    check_model(NamedModel(name=name), (channels, 32, 32), 7)


@pytest.mark.parametrize("size", [8, 7])
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), 0.0])
def test_pooling_with_relu_equals_torchs_to_the_bit(size, odd):
    from memtail.trainers.images.cpu.maxpool_relu import pool_relu

    images = (torch.randn(3, 5, size, size) * 2).round().div(2).contiguous(memory_format=torch.channels_last)  # with many ties
    images[0, 0, 0, 0] = odd
    ours, torchs = images.clone().requires_grad_(), images.clone().requires_grad_()
    pooled, expected = pool_relu(ours), F.relu(F.max_pool2d(torchs, 2))
    torch.testing.assert_close(pooled, expected, rtol=0, atol=0, equal_nan=True)
    gradient = torch.randn_like(expected)
    pooled.backward(gradient)
    expected.backward(gradient)
    assert torch.equal(ours.grad, torchs.grad) or np.isnan(odd)
    with torch.no_grad():
        torch.testing.assert_close(pool_relu(images), expected, rtol=0, atol=0, equal_nan=True)


def test_the_sgd_defaults_are_those_of_the_example():
    assert Sgd() == Sgd(lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)


def test_compiled_steps_for_many_classes_and_batches_of_unequal_size_equal_those_of_torch():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(27, 8), nn.ReLU(), nn.Linear(8, 20))
    layers = dense_layers(stack_networks([copy.deepcopy(network)]))
    shift, scale = torch.tensor([-120.0, -130.0, -140.0]), torch.tensor([0.01, 0.011, 0.012])
    dense = DenseStack(layers, (3, 3, 3), shift, scale, Sgd(), 0.0)
    pixels, labels = torch.randint(0, 256, (1, 27, 3, 3, 3), dtype=torch.uint8), torch.randint(0, 20, (1, 27))
    images = ((pixels + shift) * scale).movedim(-1, -3)
    bounds = [(0, 12), (12, 24), (24, 27)]
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    for _ in range(5):
        dense.train_steps(pixels, labels, bounds, [0.1] * 3)
        for start, stop in bounds:
            optimizer.zero_grad()
            F.cross_entropy(network(images[0, start:stop]), labels[0, start:stop]).backward()
            optimizer.step()
    torch.testing.assert_close(dense(images)[0], network(images[0]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("compiled_first", [False, True])
def test_a_checkpoint_of_another_implementation_of_the_step_is_dropped(declare, monkeypatch, compiled_first):
    """As between a GPU and a CPU, whose stacks have other states."""
    monkeypatch.setattr(shard_module, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(shard_module, "_CHECKPOINT_SHARE", math.inf)
    experiment = declare(3, model={"name": "mlp", "hidden": [16]}, dataset={"name": "digits", "max_train": 300})
    dataset, checkpoints = prepare(experiment.dataset), Interrupted(stop_at=2)

    def choose(compiled):
        monkeypatch.setattr(stack_trainer, "dense_layers", dense_layers if compiled else lambda stack: None)

    choose(not compiled_first)
    expected = train_shard(experiment, dataset, range(3), CPU)
    choose(compiled_first)
    with pytest.raises(Interrupted.StopError):
        train_shard(experiment, dataset, range(3), CPU, checkpoints=checkpoints)
    choose(not compiled_first)
    resumed = train_shard(experiment, dataset, range(3), CPU, checkpoints=checkpoints)
    assert same_bits([expected], [resumed])


@pytest.mark.parametrize("made_by", [{"device": "cuda"}, {"precision": "tf32"}, {"torch": "2.0.0"}, {"stack": "Other"}])
def test_no_trial_is_trained_partly_elsewhere_though_the_checkpoint_fits(declare, monkeypatch, capfd, made_by):
    monkeypatch.setattr(shard_module, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(shard_module, "_CHECKPOINT_SHARE", math.inf)
    monkeypatch.setattr(stack_width, "_DENSE", {"cpu": 2})
    experiment = declare(4, dataset={"name": "digits", "max_train": 300})
    dataset, checkpoints, whole = prepare(experiment.dataset), Interrupted(), Interrupted()
    expected = train_shard(experiment, dataset, range(4), CPU, checkpoints=whole)
    checkpoints.stop_at = whole.saves - 1  # in the second stack
    with pytest.raises(Interrupted.StopError):
        train_shard(experiment, dataset, range(4), CPU, checkpoints=checkpoints)
    state = torch.load(io.BytesIO(checkpoints.state), weights_only=True)
    assert len(state["finished"]) == 1
    state["stack"].setdefault("made_by", {}).update(made_by)
    elsewhere = io.BytesIO()
    torch.save(state, elsewhere)
    checkpoints.state, checkpoints.saves = elsewhere.getvalue(), 0
    assert same_bits([expected], [train_shard(experiment, dataset, range(4), CPU, checkpoints=checkpoints)])
    assert checkpoints.saves == whole.saves // 2  # the finished stack stays
    shown = "".join(capfd.readouterr())
    assert "checkpoint does not fit, starting over" in shown
    assert next(iter(made_by.values())) in shown


@pytest.mark.parametrize("model", [{"name": "mlp", "hidden": [16]}, {"name": "resnet9", "options": {"width": 2}}])
def test_outcomes_after_an_epoch_are_those_of_a_training_that_ends_there(declare, model):
    parts = {"model": model, "dataset": {"name": "digits", "max_train": 200}}
    training = {"epochs": 3, "schedule": {"name": "constant"}, "augmentation": "crop-flip"}
    plain, recording = declare(5, training=training, **parts), declare(5, training=training, record={"snapshots": [1, 2, 3]}, **parts)
    dataset = prepare(plain.dataset)
    expected, batch = (train_shard(experiment, dataset, range(5), CPU) for experiment in (plain, recording))
    assert same_bits([expected], [batch])
    assert expected.snapshot_epochs is None
    assert batch.snapshot_epochs.tolist() == [1, 2, 3]
    assert (batch.snapshot_correct[2] == batch.train_correct).all()
    for epoch in (1, 2):
        shorter = train_shard(declare(5, training={**training, "epochs": epoch}, **parts), dataset, range(5), CPU)
        assert (batch.snapshot_correct[epoch - 1] == shorter.train_correct).all()


@pytest.mark.parametrize("stop_at", range(1, 18, 3))
def test_outcomes_by_epoch_survive_an_interruption_anywhere(declare, monkeypatch, stop_at):
    monkeypatch.setattr(shard_module, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(shard_module, "_CHECKPOINT_SHARE", math.inf)
    monkeypatch.setattr(stack_width, "_DENSE", {"cpu": 2})
    monkeypatch.setattr(stack_trainer, "_PIXELS_AT_ONCE", 1)
    parts = {"training": {"epochs": 3}, "dataset": {"name": "digits", "max_train": 200}}
    experiment = declare(4, record={"snapshots": [1, 2]}, **parts)
    dataset, checkpoints = prepare(experiment.dataset), Interrupted(stop_at)
    expected = train_shard(experiment, dataset, range(4), CPU)
    with pytest.raises(Interrupted.StopError):
        train_shard(experiment, dataset, range(4), CPU, checkpoints=checkpoints)
    other = declare(4, record={"snapshots": [1, 2, 3]}, **parts)  # of one fingerprint
    held = Interrupted()
    held.state = checkpoints.state
    resumed = train_shard(experiment, dataset, range(4), CPU, checkpoints=checkpoints)
    assert same_bits([expected], [resumed])
    assert (resumed.snapshot_correct == expected.snapshot_correct).all()
    more = train_shard(other, dataset, range(4), CPU, checkpoints=held)
    assert same_bits([expected], [more])
    assert (more.snapshot_correct[:2] == expected.snapshot_correct).all()
    plain = Interrupted(stop_at)
    with pytest.raises(Interrupted.StopError):
        train_shard(declare(4, **parts), dataset, range(4), CPU, checkpoints=plain)
    assert (train_shard(experiment, dataset, range(4), CPU, checkpoints=plain).snapshot_correct == expected.snapshot_correct).all()
