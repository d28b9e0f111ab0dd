"""A training function and a network that call memtail's own, so that the difference to it is the cost of the trainer process."""

import torch

import memtail
from memtail.models.plain import mlp
from memtail.trials import unpack


def network(image_shape, classes, hidden):
    return mlp(image_shape, classes, hidden)


def train(task):
    return train_many([task])[0]


def train_many(tasks):
    experiment, dataset = memtail.Experiment.parse(tasks[0].options["experiment"]), tasks[0].dataset
    batch = memtail.train_shard(experiment, dataset, [task.trial for task in tasks], torch.device(tasks[0].device))
    train_correct, test_correct = unpack(batch.train_correct, batch.n_train), unpack(batch.test_correct, batch.n_test)
    losses = [float("nan") if entry.loss is None else entry.loss for entry in batch.metrics]
    return [memtail.Outcome(train_correct[row], test_correct[row], metrics={"loss": loss}) for row, loss in enumerate(losses)]
