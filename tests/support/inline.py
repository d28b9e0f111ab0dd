"""Embedded runs that train in this process, and checks of models in it: no process is started, none imports torch."""

from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

from memtail.execution import declare, pool


class InlineExecutor(Executor):
    """Stands for a pool of one process: runs what is submitted at once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    _processes: dict[int, Any] = {}  # noqa: RUF012 - none, as a pool whose processes have ended

    def submit(self, function: Any, /, *arguments: Any, **options: Any) -> "Future[Any]":
        """Call a function; the future holds what it returned or raised."""
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments, **options))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Nothing runs."""


_processes = pool.Workers._pool
_here = False


def _inline(workers: pool.Workers) -> InlineExecutor:
    pool._reports = workers._reports
    return InlineExecutor()


def train_here(here: bool) -> None:
    """Have embedded runs train and models be checked in this process from now on, or in processes as it is by itself."""
    global _here  # noqa: PLW0603 - as the names that are replaced
    _here = here
    pool.Workers._pool = _inline if here else _processes  # type: ignore[assignment]
    setattr(declare, "ProcessPoolExecutor", InlineExecutor if here else ProcessPoolExecutor)  # noqa: B010 - a name that it imports


@contextmanager
def training() -> Iterator[None]:
    """Meanwhile embedded runs train in this process."""
    before = _here
    train_here(True)
    try:
        yield
    finally:
        train_here(before)
