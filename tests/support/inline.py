"""Embedded runs and checks of models in this process, and one process that decodes the images of all tests.

Starting processes that import torch would take seconds, and a process for each folder of images half a second.
"""

from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

from memtail.datasets import folder
from memtail.execution import declare, pool


class InlineExecutor(Executor):
    """Replaces a pool of one process; runs submitted functions immediately."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    _processes: dict[int, Any] = {}  # noqa: RUF012 - empty, like that of a pool without processes

    def submit(self, function: Any, /, *arguments: Any, **options: Any) -> "Future[Any]":
        """Call a function; the future holds its result or exception."""
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments, **options))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End what functions left running."""
        pool.end_trainers()


class _Decoder(ProcessPoolExecutor):
    """The process that decodes; it stays for the next preparation."""

    def __exit__(self, *_: object) -> None:
        pass


def _decoder(processes: int, mp_context: Any, initializer: Any) -> ProcessPoolExecutor:
    """Replaces the pool of a preparation, except of one that begins its processes in its own way."""
    global _decodes  # noqa: PLW0603 - one for all tests
    if initializer is not _begin_to_decode:
        return ProcessPoolExecutor(processes, mp_context, initializer)
    if _decodes is None:
        _decodes = _Decoder(1, mp_context, initializer)
    return _decodes


def end_decoder() -> None:
    """End the process that decodes."""
    global _decodes  # noqa: PLW0603 - likewise
    if _decodes is not None:
        _decodes.shutdown()
        _decodes = None


_decodes: _Decoder | None = None
_begin_to_decode = folder._begin_to_decode
_processes = pool.Workers._pool
_here = False


def _inline(workers: pool.Workers, index: int) -> InlineExecutor:
    pool._reports = workers._reports
    return InlineExecutor()


def train_here(here: bool) -> None:
    """Make embedded runs train, and models be checked, in this process, and one process decode; or, if `here` is False, all as usual."""
    global _here  # noqa: PLW0603 - global like the names that are replaced
    _here = here
    pool.Workers._pool = _inline if here else _processes  # type: ignore[assignment]
    setattr(declare, "ProcessPoolExecutor", InlineExecutor if here else ProcessPoolExecutor)  # noqa: B010 - `declare` only imports the name
    setattr(folder, "ProcessPoolExecutor", _decoder if here else ProcessPoolExecutor)  # noqa: B010 - likewise


@contextmanager
def training() -> Iterator[None]:
    """Make embedded runs train in this process within the block."""
    before = _here
    train_here(True)
    try:
        yield
    finally:
        train_here(before)
