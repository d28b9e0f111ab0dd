"""Contract of a study: how it is declared, prepared, trained and evaluated.

A study's module has a function `prepare(store, ...) -> Prepared`. Its parameters after the store, annotated for typer (see
`memtail.studies.options`), are the arguments and options of the study's command. Equal arguments on equal scores declare the same models,
so running a study again resumes it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from memtail.datasets import Dataset
    from memtail.spec import Experiment
    from memtail.studies.result import StudyResult


@dataclass(frozen=True)
class Training:
    """Models that a study needs.

    Attributes:
        experiment: the experiment that trains them.
        dataset: opens the dataset they are trained on.
    """

    experiment: "Experiment"
    dataset: "Callable[[], Dataset]"


@dataclass(frozen=True)
class Prepared:
    """A study ready to run.

    Attributes:
        evaluate: measures, writes the result to the store and returns it; to be called once the models are trained.
        training: the models to train first; None if there are none.
    """

    evaluate: "Callable[[], StudyResult]"
    training: Training | None = None


@dataclass(frozen=True)
class Study:
    """An entry of `memtail.studies.STUDIES`.

    Attributes:
        module: module with the study's `prepare`, imported when the study is used.
        help: help text of the command; listings show its first sentence.
        trains: whether the study trains models, so that the services can train them, under names derived from the study's name.
    """

    module: str
    help: str
    trains: bool = False

    def load(self) -> Callable[..., Prepared]:
        """Import the module and return its `prepare`."""
        return cast(Callable[..., Prepared], import_module(self.module).prepare)
