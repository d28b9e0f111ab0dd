"""Files of numpy, read in processes with threads."""

import io
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

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


def read_archive(source: bytes | Path) -> dict[str, Any]:
    """Return the arrays of an .npz file, given its bytes or its path; as `read_calmly`. Errors are numpy's."""

    def read() -> dict[str, Any]:
        with np.load(io.BytesIO(source) if isinstance(source, bytes) else source, allow_pickle=False) as archive:
            return dict(archive)

    return read_calmly(read)
