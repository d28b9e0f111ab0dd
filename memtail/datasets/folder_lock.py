"""Lock of a folder of the cache, for processes and machines that share it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from memtail.errors import DatasetError


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock within the block; the folder is made.

    Raises:
        DatasetError: the folder, or a file that the block writes, cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            yield
    except OSError as error:
        raise DatasetError(f"{folder} cannot be written ({error.strerror or error}): set MEMTAIL_CACHE to another folder") from None
