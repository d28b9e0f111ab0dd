"""Files of numpy, read in processes with threads."""

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

_Read = TypeVar("_Read")

_TRIES = 5


def read_calmly(read: Callable[[], _Read]) -> _Read:
    """Return what a function reads with numpy, and call it again where Python's parser failed.

    numpy has Python parse the header of an array. While other threads parse, CPython 3.11 and 3.12 raise at random `SystemError: AST
    constructor recursion depth mismatch` (python/cpython#106905), which says nothing about the file.

    Args:
        read: may be called several times.
    """
    for _ in range(_TRIES - 1):
        with suppress(SystemError):
            return read()
    return read()
