"""A Python function of the user's as a trainer. Runs in a trainer process."""

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from memtail.errors import SpecError
from memtail.spec import FunctionTrainer
from memtail.trainers.task import TrainingTask


class Function:
    """The function, or `train_many` of its module if there is one.

    Args:
        trainer: the declaration.
        folder: folder in which the module is searched before the Python path.

    Raises:
        SpecError: the module has no such function.
        Exception: whatever the module raises when it is imported.
    """

    def __init__(self, trainer: FunctionTrainer, folder: Path) -> None:
        name, _, function = trainer.function.partition(":")
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
        module = importlib.import_module(name)
        many: Callable[[Sequence[TrainingTask]], Sequence[object]] | None = getattr(module, "train_many", None)
        one: Callable[[TrainingTask], object] | None = getattr(module, function, None)
        if not callable(one):
            raise SpecError(f"trainer.function: module '{name}' has no function '{function}'")
        self.takes_many = callable(many)
        self._many, self._one = many, one

    def __call__(self, tasks: Sequence[TrainingTask]) -> Sequence[object]:
        """Train trials. Raises: whatever the function raises."""
        return self._many(tasks) if self._many is not None else [self._one(task) for task in tasks]
