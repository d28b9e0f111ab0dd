"""A lock around compiled loops that use all cores.

numba's simplest threading layer, its choice where the system has no other, ends the process if two threads are in such loops at a time.
Waiting costs nothing, since one call already uses all cores.
"""

import threading
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_lock = threading.Lock()


def with_numba_lock(loop: Callable[P, T]) -> Callable[P, T]:
    """Decorate a compiled loop so that all loops decorated with this run one at a time."""

    @wraps(loop)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with _lock:
            return loop(*args, **kwargs)

    return call
