"""Functions of tensors that a CUDA device repeats as one graph of kernels, without Python between these."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Captured:
    """A function that is captured in a CUDA graph at its first call, and replayed from then on; on another device it is called as it is.

    A step of small networks consists of dozens of kernels that run for less time than Python takes to launch them.

    Args:
        function: works on tensors that exist as long as this object, always the same ones. It must not wait for the device.
        state: tensors that it changes, at least one: the function runs once before it is captured, which is undone.
        pool: memory that the graphs of functions share which do not run at once, from `torch.cuda.graph_pool_handle`.
    """

    def __init__(self, function: Callable[[], None], state: Sequence[Tensor], pool: Any = None) -> None:
        self._function, self._state, self._pool = function, state, pool
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Call the function, or replay it."""
        if not self._state[0].is_cuda:
            self._function()
            return
        if self._graph is None:
            self._graph = self._capture()
        self._graph.replay()

    def _capture(self) -> torch.cuda.CUDAGraph:
        with torch.cuda.device(self._state[0].device):
            self._warm_up()
            graph = torch.cuda.CUDAGraph()
            # threads that prepare further work may allocate meanwhile
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._function()
        return graph

    def _warm_up(self) -> None:
        """Have libraries choose their kernels and allocate workspaces, neither of which can be captured."""
        before = [tensor.clone() for tensor in self._state]
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            self._function()
        current.wait_stream(stream)
        for tensor, value in zip(self._state, before, strict=True):
            tensor.copy_(value)
