"""Embedded runs that train in this process: no process is started, none imports torch."""

from collections.abc import Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any

from memtail.execution import pool


class InlineExecutor(Executor):
    """Stands for a pool of one process: runs what is submitted at once."""

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


def _inline(workers: pool.Workers) -> InlineExecutor:
    pool._reports = workers._reports
    return InlineExecutor()


def train_here(here: bool) -> None:
    """Have embedded runs train in this process from now on, or in processes as they do by themselves."""
    pool.Workers._pool = _inline if here else _processes  # type: ignore[method-assign, assignment]


@contextmanager
def training() -> Iterator[None]:
    """Embedded runs train in this process meanwhile."""
    before = pool.Workers._pool
    train_here(True)
    try:
        yield
    finally:
        pool.Workers._pool = before  # type: ignore[method-assign]
