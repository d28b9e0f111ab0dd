"""Work of the host for an accelerator, done by a thread while the accelerator computes."""

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")

#: Copies a tensor in host memory to the device.
ToDevice = Callable[[Tensor], Tensor]


def prefetched(make: Callable[[_Item, ToDevice], _Made], items: Iterable[_Item], device: torch.device) -> Generator[_Made, None, None]:
    """Yield what a function makes of each item; for an accelerator a thread makes that of the next item meanwhile.

    On CUDA its copies pass through page-locked memory on a stream of their own, so that neither the host nor the device waits for them. On
    a CPU there is no thread: its cores are busy already.

    Args:
        make: takes an item, and a function that copies a tensor to the device. It must not depend on what is done with the item before.
        items: of any kind; read by the caller's thread.
        device: where the results are used, on its current stream.

    Yields:
        The results, in the order of the items. An error of the function is raised where its result would be used.
    """
    if not runs_ahead(device):
        for item in items:
            yield make(item, lambda tensor: tensor.to(device))
        return
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def made(item: _Item) -> tuple[_Made, list[Tensor]]:
        copies: list[Tensor] = []

        def to_device(tensor: Tensor) -> Tensor:
            copies.append(tensor.to(device) if stream is None else tensor.pin_memory().to(device, non_blocking=True))
            return copies[-1]

        with torch.cuda.stream(stream) if stream else nullcontext():  # also allocate on its device
            return make(item, to_device), copies

    remaining = iter(items)
    with ThreadPoolExecutor(1, "prefetch") as thread:
        following = [thread.submit(made, item) for item in islice(remaining, 1)]
        while following:
            result, copies = following.pop().result()
            if stream:
                _hand_over(copies, stream, torch.cuda.current_stream(device))
            copies.clear()  # whoever uses the result decides how long its memory is held
            following = [thread.submit(made, item) for item in islice(remaining, 1)]
            yield result


def _hand_over(copies: list[Tensor], made_on: torch.cuda.Stream, used_on: torch.cuda.Stream) -> None:
    used_on.wait_stream(made_on)
    for copy in copies:
        copy.record_stream(used_on)


def runs_ahead(device: torch.device) -> bool:
    """Return whether the host prepares further work while the device computes."""
    return device.type != "cpu"
