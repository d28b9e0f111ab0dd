"""Compiled loops that use all cores, called by several threads: one call after the other.

numba's simplest threading layer, which it takes where the system has no library of another, ends the process at a second call beside the
first. Nothing is lost by waiting: a call has all cores.
"""

import threading
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_running = threading.Lock()


def one_at_a_time(loop: Callable[P, T]) -> Callable[P, T]:
    """A function that waits until no other thread is in one made by this."""

    @wraps(loop)
    def call(*arguments: P.args, **named: P.kwargs) -> T:
        with _running:
            return loop(*arguments, **named)

    return call
