"""Networks of a stack with their initial weights, drawn in any thread."""

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from memtail.models import InputShape, build_model
from memtail.randomness import Purpose, torch_seed
from memtail.spec import Experiment
from memtail.trainers.images.stack import Single, Stacked, stack_networks

#: Held by whoever draws from torch's generator of the CPU, or saves and restores it, as torch's compiler does: all threads share it.
GENERATOR = threading.Lock()


class InitialStack(NamedTuple):
    """Networks of a stack before training.

    Attributes:
        network: the first of them, as it was built.
        stack: all of them, in host memory.
    """

    network: nn.Module
    stack: Stacked | Single


def draw_stack(experiment: Experiment, input_shape: InputShape, classes: int, trials: Sequence[int], *, pin: bool) -> InitialStack:
    """Build the networks of a stack. No draw of another thread may come between, except of those that call this function.

    Args:
        experiment: the declaration.
        input_shape: of an example.
        classes: number of classes.
        trials: the stack's trials.
        pin: whether to put the weights into page-locked memory, from which they are copied to a device without waiting.
    """
    with GENERATOR, torch.random.fork_rng(devices=[]):
        networks = []
        for trial in trials:
            # drawn on the CPU, so that every device starts from the same weights
            torch.default_generator.manual_seed(torch_seed(experiment.subsets.seed, Purpose.WEIGHTS, trial))
            networks.append(build_model(experiment.model, input_shape, classes))
        stack = stack_networks(networks)
    for tensor in [*stack.parameters(), *stack.buffers()] if pin else ():
        tensor.data = tensor.data.pin_memory()
    return InitialStack(networks[0], stack)
