"""Baselines of the benchmarks: careful implementations of the same work, without the trainer of memtail."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset


@dataclass(frozen=True)
class Recipe:
    """A workload: the training recipe of a network. `schedule` is "constant" or "cosine" (with 10% linear warm-up).

    AdamW takes neither `momentum` nor `nesterov`.
    """

    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    nesterov: bool
    schedule: str
    optimizer: str = "sgd"


@dataclass(frozen=True)
class Data:
    """Normalised float images [N, C, H, W] and labels of both splits."""

    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor


def factor(recipe: Recipe, step: int, steps: int) -> float:
    """The learning rate's multiplier at a step."""
    if recipe.schedule == "constant":
        return 1.0
    warmup = 0.1 * steps
    if step + 1 < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + np.cos(np.pi * (step - warmup + 1) / (steps - warmup + 1)))


def with_dataloader(model: nn.Module, recipe: Recipe, data: Data, member: np.ndarray) -> tuple[float, float]:
    """(a) One model in plain PyTorch with DataLoaders; returns in-subset and test accuracy."""
    train, test = TensorDataset(data.train, data.train_labels), TensorDataset(data.test, data.test_labels)
    loader = DataLoader(Subset(train, np.flatnonzero(member).tolist()), recipe.batch_size, shuffle=True)
    optimizer = _optimizer(model, recipe, fused=False)
    steps, step = recipe.epochs * len(loader), 0
    model.train()
    for _ in range(recipe.epochs):
        for images, labels in loader:
            _set_lr(optimizer, recipe.lr * factor(recipe, step, steps))
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    model.eval()

    def right(split: TensorDataset) -> np.ndarray:
        with torch.no_grad():
            return torch.cat([model(images).argmax(1) == labels for images, labels in DataLoader(split, 512)]).numpy()

    return float(right(train)[member].mean()), float(right(test).mean())


def in_memory(model: nn.Module, recipe: Recipe, data: Data, member: np.ndarray, compiled: nn.Module | None = None) -> tuple[float, float]:
    """(b) The same without a DataLoader: tensors in memory, fused optimizer; `compiled` is the model through `torch.compile`."""
    forward = compiled or model
    optimizer = _optimizer(model, recipe, fused=True)
    subset = torch.from_numpy(np.flatnonzero(member))
    steps, step = recipe.epochs * -(-len(subset) // recipe.batch_size), 0
    model.train()
    for _ in range(recipe.epochs):
        for batch in _batches(subset, recipe.batch_size):
            _set_lr(optimizer, recipe.lr * factor(recipe, step, steps))
            loss = F.cross_entropy(forward(data.train[batch]), data.train_labels[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
    model.eval()
    with torch.no_grad():
        train = torch.cat([model(images).argmax(1) for images in data.train.split(512)]) == data.train_labels
        test = torch.cat([model(images).argmax(1) for images in data.test.split(512)]) == data.test_labels
    return float(train.numpy()[member].mean()), float(test.float().mean())


def masked_products(membership: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """(c) Influence as in the authors' demo: two float32 products of masked 0/1 matrices [t, n] and [t, q]."""
    mask, inverse = membership.astype(np.float32), (~membership).astype(np.float32)
    right = correct.astype(np.float32)
    inside = mask.T @ right / np.maximum(mask.sum(0), 1e-8)[:, None]
    outside = inverse.T @ right / np.maximum(inverse.sum(0), 1e-8)[:, None]
    return inside - outside


def _batches(subset: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    return iter(subset[torch.randperm(len(subset))].split(size))


def _optimizer(model: nn.Module, recipe: Recipe, fused: bool) -> torch.optim.Optimizer:
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), recipe.lr, weight_decay=recipe.weight_decay, fused=fused)
    return torch.optim.SGD(
        model.parameters(), recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, nesterov=recipe.nesterov, fused=fused
    )


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
