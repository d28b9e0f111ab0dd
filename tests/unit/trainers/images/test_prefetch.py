"""Work of the host that is done while the device computes: that it is, and that no bit depends on it."""

import threading

import pytest
import torch

from memtail.datasets import prepare
from memtail.trainers.images import prefetch, stack_trainer, train_shard
from memtail.trainers.images.images import device_images
from memtail.trainers.images.prefetch import prefetched
from memtail.trainers.images.stack_trainer import StackedRun
from tests.support.training import Interrupted, same_bits

pytestmark = pytest.mark.usefixtures("no_images")

CPU = torch.device("cpu")
NETWORKS = [{"name": "mlp", "hidden": [16]}, {"name": "cnn", "channels": [4], "hidden": 8}, {"name": "resnet9", "options": {"width": 2}}]
# Seconds to wait for what another thread does.
PATIENCE = 30


@pytest.fixture
def few(declare):
    return prepare(declare(dataset={"name": "digits", "max_train": 150}).dataset)


@pytest.fixture
def ahead(monkeypatch):
    """Work ahead as for an accelerator."""
    monkeypatch.setattr(prefetch, "runs_ahead", lambda device: True)


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.usefixtures("ahead")
def test_the_next_item_is_made_while_the_one_before_is_used():
    begun = [threading.Event() for _ in range(4)]

    def make(item, to_device):
        begun[item].set()
        return to_device(torch.full((2,), float(item)))

    for place, made in enumerate(prefetched(make, iter(range(4)), CPU)):
        assert (made == place).all()
        assert all(event.wait(PATIENCE) for event in begun[: place + 2])
        assert not any(event.is_set() for event in begun[place + 2 :])
    assert not threads()


@pytest.mark.usefixtures("ahead")
def test_an_error_is_raised_where_its_result_would_be_used():
    made = prefetched(lambda item, to_device: 1 / item, [1, 0], CPU)
    assert next(made) == 1
    with pytest.raises(ZeroDivisionError):
        next(made)
    assert not threads()


def test_a_cpu_makes_each_item_when_it_is_used_without_a_thread():
    made = []
    items = prefetched(lambda item, to_device: made.append((item, threading.current_thread())), [1, 2], CPU)
    next(items)
    assert made == [(1, threading.current_thread())]


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "in host memory"])
@pytest.mark.parametrize("model", NETWORKS, ids=lambda model: model["name"])
def test_no_bit_depends_on_work_ahead(declare, few, request, model, resident):
    experiment = declare(5, model=model, training={"augmentation": "crop-flip", "epochs": 2}, record={"margins": True, "scores": True})
    trials = range(5) if model["name"] == "mlp" else range(2)
    expected = train_shard(experiment, few, trials, CPU)
    request.getfixturevalue("ahead")
    device_images(few, CPU).resident = resident
    assert same_bits([expected], [train_shard(experiment, few, trials, CPU)], recorded=True)
    assert not threads()


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("model", NETWORKS, ids=lambda model: model["name"])
def test_the_next_epoch_is_drawn_while_this_one_is_computed(declare, few, monkeypatch, model):
    drawn, waited = [threading.Event() for _ in range(3)], []
    draw, train = stack_trainer.draw_epoch, StackedRun._train_epoch

    def noted(augmentation, seed, trials, epoch, *rest):
        result = draw(augmentation, seed, trials, epoch, *rest)
        drawn[epoch].set()
        return result

    def slow(self, *args):
        waited.append(self.epoch == 2 or drawn[self.epoch + 1].wait(PATIENCE))
        train(self, *args)

    monkeypatch.setattr(stack_trainer, "draw_epoch", noted)
    monkeypatch.setattr(StackedRun, "_train_epoch", slow)
    train_shard(declare(2, model=model, training={"epochs": 3}), few, range(1), CPU)
    assert waited == [True, True, True]
