"""Work of the host that is done while the device computes: that it is, and that no bit depends on it."""

import threading
import weakref

import pytest
import torch

from memtail import subsets as subsets_module
from memtail.datasets import prepare
from memtail.trainers.images import prefetch, stack_trainer, train_shard
from memtail.trainers.images import shard as shard_module
from memtail.trainers.images.batches import draw_epoch
from memtail.trainers.images.images import device_images
from memtail.trainers.images.initial import draw_stack
from memtail.trainers.images.prefetch import prefetched
from memtail.trainers.images.stack import is_stackable
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
    for module in (prefetch, shard_module):
        monkeypatch.setattr(module, "runs_ahead", lambda device: True)


@pytest.fixture
def two_wide(monkeypatch):
    """Stacks of two trials."""
    monkeypatch.setattr(shard_module, "stack_width", lambda network, *rest: 2 if is_stackable(network) else 1)


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
def test_memory_is_held_by_whoever_uses_the_result_alone():
    for made in prefetched(lambda item, to_device: [to_device(torch.ones(2))], [1, 2, 3], CPU):
        tensor = weakref.ref(made.pop())
        assert tensor() is None


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


@pytest.mark.usefixtures("two_wide")
@pytest.mark.parametrize("resident", [True, False], ids=["resident", "in host memory"])
@pytest.mark.parametrize("model", NETWORKS, ids=lambda model: model["name"])
def test_no_bit_depends_on_work_ahead(declare, few, request, model, resident):
    experiment = declare(5, model=model, training={"augmentation": "crop-flip", "epochs": 2}, record={"margins": True, "scores": True})
    trials = range(5) if model["name"] == "mlp" else range(3)
    expected = train_shard(experiment, few, trials, CPU)
    request.getfixturevalue("ahead")
    device_images(few, CPU).resident = resident
    assert same_bits([expected], [train_shard(experiment, few, trials, CPU)], recorded=True)
    assert not threads()


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("model", NETWORKS, ids=lambda model: model["name"])
def test_the_next_epoch_is_drawn_while_this_one_is_computed(declare, few, monkeypatch, model):
    drawn, waited = [threading.Event() for _ in range(3)], []
    draw, train = draw_epoch, StackedRun._train_epoch

    def noted(augmentation, seed, trials, epoch, *rest):
        result = draw(augmentation, seed, trials, epoch, *rest)
        drawn[epoch].set()
        return result

    def slow(self, *args):
        waited.append(self.epoch == 2 or drawn[self.epoch + 1].wait(PATIENCE))
        train(self, *args)

    monkeypatch.setattr("memtail.trainers.images.stack_trainer.draw_epoch", noted)
    monkeypatch.setattr(StackedRun, "_train_epoch", slow)
    train_shard(declare(2, model=model, training={"epochs": 3}), few, range(1), CPU)
    assert waited == [True, True, True]


def weights(stack):
    return torch.cat([tensor.flatten() for place in range(2) for tensor in stack.tensors_of(place)])


@pytest.mark.usefixtures("ahead", "two_wide")
@pytest.mark.parametrize("model", NETWORKS[:2], ids=lambda model: model["name"])
def test_the_networks_of_the_next_stack_are_drawn_while_this_one_is_computed(declare, few, monkeypatch, model):
    drawn, waited = [threading.Event() for _ in range(4)], []
    prepare_stack, train = shard_module._ShardTraining._prepare, StackedRun._train_epoch

    def noted(self, stack, to_device):
        prepare_stack(self, stack, to_device)
        drawn[stack.rows[0] // 2].set()
        return stack

    def slow(self, *args):
        waited.append(drawn[self.trials[0] // 2 + 1].wait(PATIENCE) if self.trials[0] < 6 else True)
        train(self, *args)

    monkeypatch.setattr(shard_module._ShardTraining, "_prepare", noted)
    monkeypatch.setattr(StackedRun, "_train_epoch", slow)
    train_shard(declare(8, model=model, training={"epochs": 1}), few, range(8), CPU)
    assert waited == [True] * 4


def test_weights_do_not_depend_on_draws_of_other_stacks_in_other_threads(declare):
    experiment = declare(8, model=NETWORKS[1])
    expected = {first: weights(draw_stack(experiment, (1, 8, 8), 10, [first, first + 1], pin=False).stack) for first in range(0, 8, 2)}
    got, before = {}, torch.get_rng_state()

    def draw(first):
        for _ in range(5):
            got.setdefault(first, []).append(weights(draw_stack(experiment, (1, 8, 8), 10, [first, first + 1], pin=False).stack))

    drawing = [threading.Thread(target=draw, args=(first,)) for first in expected]
    for thread in drawing:
        thread.start()
    for thread in drawing:
        thread.join()
    assert all(torch.equal(each, expected[first]) for first in expected for each in got[first])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("ahead")
def test_nothing_is_drawn_ahead_of_a_network_that_may_draw_in_training(declare, few, monkeypatch):
    monkeypatch.setattr(shard_module._ShardTraining, "_prepare", lambda *args: pytest.fail("drawn ahead"))
    experiment = declare(3, model={"name": "tests.support.networks:with_dropout"}, training={"epochs": 1})
    batch = train_shard(experiment, few, range(3), CPU)
    alone = [train_shard(experiment, few, [trial], CPU) for trial in range(3)]
    assert same_bits([batch], alone)


@pytest.mark.usefixtures("two_wide")
@pytest.mark.parametrize("model", NETWORKS, ids=lambda model: model["name"])
def test_training_interrupted_within_an_epoch_reaches_the_same_bits(declare, few, request, monkeypatch, model):
    monkeypatch.setattr(shard_module, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(shard_module, "_CHECKPOINT_SHARE", 1e9)
    experiment = declare(5, model=model, training={"epochs": 2, "batch_size": 16, "augmentation": "crop-flip"}, record={"margins": True})
    trials = range(5) if model["name"] == "mlp" else range(3)
    monkeypatch.setattr(stack_trainer, "_PIXELS_AT_ONCE", 1)
    expected = train_shard(experiment, few, trials, CPU)
    request.getfixturevalue("ahead")
    interrupted = Interrupted(20)  # within the first stack's last epoch, or the second's first
    with pytest.raises(Interrupted.StopError):
        train_shard(experiment, few, trials, CPU, checkpoints=interrupted)
    assert not threads()
    interrupted.stop_at = None
    assert same_bits([expected], [train_shard(experiment, few, trials, CPU, checkpoints=interrupted)])


@pytest.mark.usefixtures("ahead", "two_wide")
def test_a_stack_that_does_not_fit_is_drawn_again_in_halves(declare, few, monkeypatch):
    experiment = declare(6, model=NETWORKS[0], training={"epochs": 1})
    train = StackedRun.train

    def cramped(self, between_steps):
        if list(self.trials) == [2, 3]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return train(self, between_steps)

    expected = train_shard(experiment, few, range(6), CPU)
    monkeypatch.setattr(StackedRun, "train", cramped)
    assert same_bits([expected], [train_shard(experiment, few, range(6), CPU)])


def noted_draws(monkeypatch):
    """Return the first trials of all stacks that are drawn, in order; it grows."""
    drawn = []

    def noted(experiment, shape, classes, trials, **pin):
        drawn.append(trials[0])
        return draw_stack(experiment, shape, classes, trials, **pin)

    monkeypatch.setattr("memtail.trainers.images.shard.draw_stack", noted)
    return drawn


@pytest.mark.usefixtures("ahead", "two_wide")
def test_the_first_stack_of_the_next_shard_is_drawn_while_the_last_one_of_this_is_computed(declare, few, monkeypatch):
    recipe = {"epochs": 1, "augmentation": "crop-flip"}
    experiment = declare(8, model=NETWORKS[0], training=recipe, record={"margins": True, "scores": True})
    expected = [train_shard(experiment, few, range(4), CPU), train_shard(experiment, few, range(4, 8), CPU)]
    drawn, asked, members, train = noted_draws(monkeypatch), [], [], StackedRun._train_epoch
    begun = threading.Event()

    def membership(subsets, labels, trials):
        members.append(list(trials))
        if trials[0] == 4:
            begun.set()
        return subsets_module.membership(subsets, labels, trials)

    def slow(self, *args):
        if self.trials[0] == 2:
            assert begun.wait(PATIENCE)
        train(self, *args)

    def following():
        asked.append(list(drawn))
        return range(4, 8)

    monkeypatch.setattr(shard_module, "membership", membership)
    monkeypatch.setattr(StackedRun, "_train_epoch", slow)
    first = train_shard(experiment, few, range(4), CPU, following=following)
    assert (drawn, asked) == ([0, 2, 4], [[0, 2]])
    second = train_shard(experiment, few, range(4, 8), CPU)
    assert drawn == [0, 2, 4, 6]
    assert members == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert same_bits(expected, [first, second], recorded=True)
    assert not shard_module._kept


@pytest.mark.usefixtures("ahead", "two_wide")
def test_memory_that_is_full_while_a_stack_is_drawn_ahead_costs_nothing_but_time(declare, few, monkeypatch):
    experiment = declare(4, model=NETWORKS[0], training={"epochs": 1}, record={"margins": True, "scores": True})
    expected = train_shard(experiment, few, range(4), CPU)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(shard_module, "draw_epoch", full)
    assert same_bits([expected], [train_shard(experiment, few, range(4), CPU)], recorded=True)


@pytest.mark.usefixtures("ahead", "two_wide")
def test_a_next_shard_that_cannot_be_drawn_fails_by_itself(declare, few, monkeypatch):
    experiment = declare(8, model=NETWORKS[0], training={"epochs": 1})
    expected, own = train_shard(experiment, few, range(4), CPU), subsets_module.membership

    def broken(subsets, labels, trials):
        if trials[0] == 4:
            raise RuntimeError("no membership")
        return own(subsets, labels, trials)

    monkeypatch.setattr(shard_module, "membership", broken)
    assert same_bits([expected], [train_shard(experiment, few, range(4), CPU, following=lambda: range(4, 8))])
    with pytest.raises(RuntimeError, match="no membership"):
        train_shard(experiment, few, range(4, 8), CPU)


@pytest.mark.usefixtures("ahead", "two_wide")
def test_what_is_drawn_of_a_shard_is_used_for_no_other_training(declare, few, monkeypatch):
    parts = {"model": NETWORKS[0], "training": {"epochs": 1}}
    experiment, other = declare(8, **parts), declare(8, subsets={"seed": 5}, **parts)
    expected = {each.subsets.seed: train_shard(each, few, range(4, 8), CPU) for each in (experiment, other)}
    drawn = noted_draws(monkeypatch)
    for trained, trials in ((other, range(4, 8)), (experiment, range(2, 4)), (experiment, range(4, 6))):
        train_shard(experiment, few, range(2), CPU, following=lambda: range(4, 8))
        drawn.clear()
        batch = train_shard(trained, few, trials, CPU)
        assert drawn == [*trials[::2]]
        assert trials != range(4, 8) or same_bits([batch], [expected[trained.subsets.seed]])
        assert not shard_module._kept


@pytest.mark.usefixtures("ahead", "two_wide")
def test_a_resumed_shard_draws_the_stacks_that_are_left(declare, few, monkeypatch):
    monkeypatch.setattr(shard_module, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(shard_module, "_CHECKPOINT_SHARE", 1e9)
    experiment = declare(10, model=NETWORKS[0], training={"epochs": 2})
    expected, interrupted = train_shard(experiment, few, range(4, 10), CPU), Interrupted(3)
    with pytest.raises(Interrupted.StopError):
        train_shard(experiment, few, range(4, 10), CPU, checkpoints=interrupted)
    interrupted.stop_at = None
    train_shard(experiment, few, range(4), CPU, following=lambda: range(4, 10))
    assert same_bits([expected], [train_shard(experiment, few, range(4, 10), CPU, checkpoints=interrupted)])


def test_a_cpu_draws_nothing_of_the_next_shard(declare, few):
    train_shard(declare(4, training={"epochs": 1}), few, range(2), CPU, following=lambda: pytest.fail("asked"))
    assert not shard_module._kept
