"""A function of the user's as a dataset: what it returns (see `memtail.datasets.returned`) is prepared like any other dataset.

It runs in a child of the process that prepares the dataset; workers get the prepared dataset.
"""

import importlib
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from memtail import logs
from memtail.datasets.items import ItemError, ItemSplit, write_items
from memtail.datasets.prepared import OnProgress
from memtail.datasets.returned import parts_of
from memtail.errors import DatasetError
from memtail.processes import check_script, follow_parent
from memtail.spec import FunctionDataset
from memtail.spec.trainer import code_digest
from memtail.user_code import describe_fault

#: Version of the interpretation of what a function returns; raised when the same value gives another dataset.
FUNCTION_VERSION = 1


def function_identity(spec: FunctionDataset) -> list[Any]:
    """Return JSON values that change with the function's code and options. Raises: SpecError: the code is missing."""
    limits = [spec.max_train, spec.max_test, spec.resolution]
    options = spec.model_dump(mode="json").get("options", {})  # with dates as text
    return ["function", FUNCTION_VERSION, spec.function, code_digest(spec, sys.path), options, limits]


def prepare_function(spec: FunctionDataset, target: Path, unusable: Path, on_progress: OnProgress | None) -> Path:
    """Call the function in a child process, and write the prepared dataset there.

    Args:
        spec: the declaration.
        target: the folder of all prepared datasets.
        unusable: is not written: every example must be usable.
        on_progress: is not called, since the function is called as a whole.

    Returns:
        The dataset's folder below `target`.

    Raises:
        DatasetError: the function fails, or returns what is no dataset.
        SpecError: the script starts a run when the child imports it.
        OSError: the dataset cannot be written.
    """
    del unusable, on_progress
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_begin) as child:
        try:
            return child.submit(_load, spec, target).result()
        except BrokenProcessPool:
            check_script(child)
            raise DatasetError(
                f"dataset.function '{spec.function}': its process ended or was killed, as for want of memory: fix it, or load less"
            ) from None


def _begin() -> None:
    follow_parent()
    os.dup2(2, 1)  # what the function prints is no output of the command
    logs.configure()


def _load(spec: FunctionDataset, target: Path) -> Path:
    name, _, function = spec.function.partition(":")
    sys.path.insert(0, str(spec.folder or Path.cwd()))
    try:
        loader = getattr(importlib.import_module(name), function, None)
        if not callable(loader):
            raise DatasetError(f"dataset.function: module '{name}' has no function '{function}'")
        returned = loader(**spec.options)
    except DatasetError:
        raise
    except (Exception, SystemExit) as error:
        raise _failed(spec, "", error) from None
    try:
        return _write(spec, returned, target)
    except ItemError as error:
        raise _failed(spec, f" in reading {error}", error.__cause__ or error) from None


def _failed(spec: FunctionDataset, when: str, error: BaseException) -> DatasetError:
    """Describe an exception of the user's code, and its last place there, in one line."""
    return DatasetError(f"dataset.function '{spec.function}' failed{when}: {describe_fault(error, spec.folder or Path.cwd())}")


def _write(spec: FunctionDataset, returned: Any, target: Path) -> Path:
    parts = parts_of(spec.function, returned)
    limits = {"train": spec.max_train, "test": spec.max_test}
    splits = {name: ItemSplit(items, limits[name], parts.ids.get(name)) for name, items in parts.items.items()}
    return write_items(
        spec.function,
        splits,
        target,
        labelled=parts.labelled,
        classes=parts.classes,
        features=parts.features,
        resolution=spec.resolution,
    )
