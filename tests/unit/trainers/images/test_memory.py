"""Full memory of a device: what is given up for it, and that no trial changes."""

import threading

import pytest
import torch
from structlog.testing import capture_logs

from memtail.datasets import prepare
from memtail.errors import TrainingStopped
from memtail.trainers.images import images, prefetch, train_shard
from memtail.trainers.images import shard as shard_module
from memtail.trainers.images.images import DeviceImages, device_images
from memtail.trainers.images.stack_trainer import StackedRun
from tests.support.training import Interrupted, same_bits

pytestmark = pytest.mark.usefixtures("no_images")

CPU = torch.device("cpu")
NETWORKS = [{"name": "mlp", "hidden": [16]}, {"name": "resnet9", "options": {"width": 2}}]


@pytest.fixture
def few(declare):
    return prepare(declare(dataset={"name": "digits", "max_train": 150}).dataset)


def held_elsewhere(dataset):
    """Return the kept examples of a dataset as if an accelerator held them."""
    held = device_images(dataset, CPU)
    held.train, held.test = held.train.clone(), held.test.clone()
    return held


def full():
    return torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("model", NETWORKS, ids=lambda model: model["name"])
def test_a_full_device_in_an_evaluation_halves_its_batches_and_trains_nothing_again(declare, few, monkeypatch, model):
    experiment = declare(2, model=model, training={"epochs": 1}, record={"margins": True, "scores": True})
    expected, sizes = train_shard(experiment, few, range(2), CPU), []
    split = DeviceImages.split

    def cramped(self, name, start, stop):
        sizes.append(stop - start)
        if stop - start > 40:
            raise full()
        return split(self, name, start, stop)

    monkeypatch.setattr(DeviceImages, "split", cramped)
    trained = []
    between = shard_module._ShardTraining._between_steps
    monkeypatch.setattr(shard_module._ShardTraining, "_between_steps", lambda self, run: trained.append(run) or between(self, run))
    with capture_logs() as logs:
        got = train_shard(experiment, few, range(2), CPU)
    assert same_bits([expected], [got], recorded=True)
    assert len(set(map(id, trained))) == (1 if model["name"] == "mlp" else 2)
    assert sizes[:3] == [150, 75, 37]
    assert {entry["event"] for entry in logs} == {"out of device memory, halving the batches of the evaluation"}


def test_an_example_that_does_not_fit_alone_is_an_error(declare, few, monkeypatch):
    def never(self, name, start, stop):
        raise full()

    monkeypatch.setattr(DeviceImages, "split", never)
    with pytest.raises(torch.OutOfMemoryError):
        train_shard(declare(2, training={"epochs": 1}), few, range(1), CPU)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("model", NETWORKS, ids=lambda model: model["name"])
def test_a_checkpoint_takes_no_memory_of_the_device(declare, few, model, optimizer):
    experiment = declare(2, model=model, training={"optimizer": {"name": optimizer}, "precision": "bfloat16"})
    copied, to = [], torch.Tensor.to

    class Watched(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            assert function not in (torch.Tensor.clone, torch.Tensor.__deepcopy__)
            if function is to:
                copied.append(args[1:])
            return function(*args, **(kwargs or {}))

    states = []

    def look(run):
        with Watched():
            states.append((run, run.state()))
        raise Interrupted.StopError

    subsets = torch.arange(100)[None].numpy()
    run = StackedRun(experiment, DeviceImages(few, CPU), few.input_shape, len(few.classes), [0], subsets)
    with pytest.raises(Interrupted.StopError):
        run.train(look)
    ((_, state),) = states
    assert set(copied) == {("cpu",)}
    own = {value.untyped_storage().data_ptr() for value in run.stack.state_dict().values()}
    assert not own & {value.untyped_storage().data_ptr() for value in state["stack"].values()}
    assert {value.device.type for value in state["stack"].values()} == {"cpu"}


def test_a_trial_that_does_not_fit_beside_the_dataset_reads_it_from_host_memory(declare, few, monkeypatch):
    experiment = declare(3, training={"augmentation": "crop-flip", "epochs": 1})
    expected, held = train_shard(experiment, few, range(3), CPU), held_elsewhere(few)
    train, widths = StackedRun.train, []

    def cramped(self, between_steps):
        widths.append(len(self.trials))
        if held.resident:
            raise full()
        return train(self, between_steps)

    monkeypatch.setattr(StackedRun, "train", cramped)
    assert same_bits([expected], [train_shard(experiment, few, range(3), CPU)])
    assert widths == [3, 1, 1, 2]
    assert not held.resident
    assert device_images(few, CPU) is held  # the next shard does not try again


def test_the_dataset_of_another_experiment_is_released_first(declare, few, digits, monkeypatch):
    made = []

    class Counted(DeviceImages):
        def __init__(self, dataset, device):
            made.append(len(images._kept))
            super().__init__(dataset, device)

    monkeypatch.setattr(images, "DeviceImages", Counted)
    first = device_images(few, CPU)
    assert device_images(few, CPU) is first
    assert device_images(digits, CPU) is not first
    assert made == [0, 0]


@pytest.mark.parametrize("model", NETWORKS, ids=lambda model: model["name"])
def test_examples_in_host_memory_give_the_same_bits(declare, few, model):
    experiment = declare(2, model=model, training={"augmentation": "crop-flip", "epochs": 2}, record={"margins": True, "scores": True})
    expected = train_shard(experiment, few, range(2), CPU)
    device_images(few, CPU).resident = False
    assert same_bits([expected], [train_shard(experiment, few, range(2), CPU)], recorded=True)


def test_no_thread_is_left_when_training_stops_within_an_epoch(declare, few, monkeypatch):
    monkeypatch.setattr(prefetch, "runs_ahead", lambda device: True)
    device_images(few, CPU).resident = False
    experiment = declare(2, model=NETWORKS[1])
    with pytest.raises(TrainingStopped):
        train_shard(experiment, few, range(1), CPU, stop=lambda: True)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_losses_become_float64_in_host_memory_as_mps_has_none(declare, few, monkeypatch):
    places = []

    class Watched(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function in (torch.Tensor.double, torch.Tensor.cpu):
                places.append(function)
            return function(*args, **(kwargs or {}))

    subsets = torch.arange(100)[None].numpy()
    experiment = declare(2, training={"epochs": 1})
    run = StackedRun(experiment, DeviceImages(few, CPU), few.input_shape, len(few.classes), [0], subsets)
    with Watched():
        run.train(lambda run: None)
    place = places.index(torch.Tensor.double)
    assert places[place - 1] is torch.Tensor.cpu
