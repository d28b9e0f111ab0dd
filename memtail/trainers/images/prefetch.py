"""Rows of an array in host memory on a device: they are gathered and copied while the device computes."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def prefetched(source: Tensor, indices: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Yield rows of an array on a device; a thread fetches those of the next index meanwhile.

    On CUDA they pass through page-locked memory on a stream of their own, so that neither the host nor the device waits for a copy.

    Args:
        source: [n, ...], in host memory.
        indices: int64 [b] each, in host memory.
        device: where the rows go.

    Yields:
        The rows of each index, in order: [b, ...].
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def fetch(index: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        if stream is None:
            return source.index_select(0, index).to(device), None
        with torch.cuda.stream(stream):  # also allocate on its device
            rows = torch.empty((len(index), *source.shape[1:]), dtype=source.dtype, pin_memory=True)
            torch.index_select(source, 0, index, out=rows)
            return rows.to(device, non_blocking=True), stream.record_event()

    with ThreadPoolExecutor(1, "prefetch") as thread:
        following = [thread.submit(fetch, index) for index in indices[:1]]
        for place in range(len(indices)):
            rows, copied = following.pop().result()
            if place + 1 < len(indices):
                following.append(thread.submit(fetch, indices[place + 1]))
            if copied is not None:
                current = torch.cuda.current_stream(device)
                current.wait_event(copied)
                rows.record_stream(current)
            yield rows
