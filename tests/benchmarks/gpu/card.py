"""Ceilings of a card, and the floors that follow from them: the least seconds of some work by its operations and by its bytes.

What work costs at least is counted here alone: of training a network and of a step of fully connected ones.
"""

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

# Bytes per second of copies, read and written, and bfloat16 operations per second of products: measured, as sheets promise more.
_KNOWN = {"H100": (3.0e12, 790e12), "H200": (4.3e12, 790e12)}
# Times that the output of a convolution and its normalisation passes through memory in bfloat16, if what lies between is fused: written,
# read for the statistics, read and written to normalise, read by the next layer; nine times backward.
_PASSES = 14


@dataclass(frozen=True)
class Floor:
    """Least seconds of some work.

    Attributes:
        by_operations, by_bytes: seconds that its operations take, and its bytes; the larger is the floor.
    """

    by_operations: float
    by_bytes: float

    @property
    def seconds(self) -> float:
        """The floor."""
        return max(self.by_operations, self.by_bytes)


@dataclass(frozen=True)
class Card:
    """A GPU, or in a dry run the CPU.

    Attributes:
        name: of the card.
        device: torch's name of it.
        software: versions of torch, CUDA and the driver.
        bytes_per_second: of copies, reads and writes together.
        operations_per_second: of products in bfloat16; TF32 has half of it, 8-bit integers twice.
        measured: what a short test of this card found, in TB/s and TFLOP/s.
    """

    name: str
    device: str
    software: str
    bytes_per_second: float
    operations_per_second: float
    measured: dict[str, float] = field(default_factory=dict)

    def floor(self, operations: float, moved: float, speed: float = 1.0) -> Floor:
        """Return the floor of work: operations at `speed` times the rate of bfloat16, bytes that are read or written."""
        return Floor(operations / (speed * self.operations_per_second), moved / self.bytes_per_second)

    def training(self, network: nn.Module, image_shape: tuple[int, ...], images: int) -> Floor:
        """Return the floor of training a convolutional network on a number of images, in bfloat16."""
        sizes: list[int] = []
        handles = [
            layer.register_forward_hook(lambda _, __, output: sizes.append(output[0].numel()))
            for layer in network.modules()
            if isinstance(layer, nn.Conv2d)
        ]
        with FlopCounterMode(display=False) as counter:
            logits = network.train()(torch.zeros(2, *image_shape))
            F.cross_entropy(logits, torch.zeros(2, dtype=torch.int64)).backward()
        for handle in handles:
            handle.remove()
        return self.floor(counter.get_total_flops() / 2 * images, 2 * _PASSES * sum(sizes) * images)

    def dense_training(self, widths: list[int], batch: int, steps: int) -> Floor:
        """Return the floor of steps of fully connected networks, in TF32, of `widths` [input, hidden ..., classes].

        Weights are read forward and, but for the first layer's, backward; the update reads and writes them and their momenta.
        """
        layers = [before * after for before, after in pairwise(widths)]
        parameters = sum(layers) + sum(widths[1:])
        operations = 2 * batch * (3 * sum(layers) - layers[0])
        return self.floor(steps * operations, steps * (20 * parameters + 4 * sum(layers[1:])), speed=0.5)


def find_card(device: str) -> Card:
    """Measure a card, and return what is known of it, else what was measured.

    Raises:
        RuntimeError: there is no such device.
    """
    where = torch.device(device)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "CPU (dry run)"
    small = where.type == "cpu"
    size, side = (1 << 20, 64) if small else (1 << 31, 8192)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=where) for _ in range(2))
    rate = 2 * size / seconds_of(lambda: target.copy_(source), where)
    left, right = (torch.randn(side, side, device=where, dtype=torch.bfloat16) for _ in range(2))
    product = 2 * side**3 / seconds_of(lambda: left @ right, where)
    known = next((ceilings for kind, ceilings in _KNOWN.items() if kind in name), (rate, product))
    software = f"torch {torch.__version__}, CUDA {torch.version.cuda}, driver {_driver()}"
    return Card(name, device, software, *known, {"copy TB/s": round(rate / 1e12, 3), "bfloat16 TFLOP/s": round(product / 1e12, 2)})


def seconds_of(work: Callable[[], object], device: torch.device, calls: int = 10) -> float:
    """Return the seconds of a call."""
    for _ in range(3):
        work()
    finish(device)
    began = time.perf_counter()
    for _ in range(calls):
        work()
    finish(device)
    return (time.perf_counter() - began) / calls


def finish(device: torch.device) -> None:
    """Wait until a device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"
