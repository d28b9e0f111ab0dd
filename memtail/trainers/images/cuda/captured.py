"""Functions of tensors that a CUDA device repeats as one graph of kernels, without Python between these."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


class Captured:
    """A function that is captured in a CUDA graph at its first call, and replayed from then on; on another device it is called as it is.

    A step consists of dozens or hundreds of kernels, many of which run for less time than Python takes to launch them.

    Args:
        state: tensors that the function changes, at least one: it runs once before it is captured, which is undone.
        pool: memory that the graphs of functions share which do not run at once, from `torch.cuda.graph_pool_handle`.
    """

    def __init__(self, state: Sequence[Tensor], pool: Any = None) -> None:
        self._state, self._pool = state, pool
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, function: Callable[[], object]) -> None:
        """Call the function, or replay it.

        Args:
            function: the same one at every call. It works on tensors that exist as long as this object, always the same ones, and must not
                wait for the device. It is not kept: functions refer to whoever keeps this object, and whose memory is to be freed at once.
        """
        if not self._state[0].is_cuda:
            function()
            return
        if self._graph is None:
            self._graph = self._capture(function)
        self._graph.replay()

    def _capture(self, function: Callable[[], object]) -> torch.cuda.CUDAGraph:
        with torch.cuda.device(self._state[0].device):
            self._warm_up(function)
            graph = torch.cuda.CUDAGraph()
            # by default a capture fails when another thread allocates page-locked memory meanwhile, as for the next batch
            with torch.cuda.graph(graph, pool=self._pool, stream=_stream(self._state[0].device), capture_error_mode="thread_local"):
                function()
        return graph

    def _warm_up(self, function: Callable[[], object]) -> None:
        """Have libraries choose their kernels and allocate workspaces, neither of which can be captured."""
        before = [tensor.detach().clone() for tensor in self._state]
        stream, current = _stream(self._state[0].device), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            function()
        current.wait_stream(stream)
        with torch.no_grad():
            for tensor, value in zip(self._state, before, strict=True):
                tensor.copy_(value)


@lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of a device on which functions are captured: torch's own one is of the device that was first."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
