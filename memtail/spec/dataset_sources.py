"""The `dataset` part of an experiment: a named dataset, or one that a key of its own declares, such as a user's function."""

from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Field, Tag

from memtail.spec.base import Part
from memtail.spec.dataset import DatasetSpec
from memtail.spec.trainer import UserFunction


class FunctionDataset(UserFunction):
    """A Python function that loads the examples and labels of both splits (see `memtail.datasets.function`).

    Attributes:
        function: the function, as `package.module:function`.
        options: keyword arguments of the function.
        code: files, as patterns relative to `folder`, after whose change the function is called again: its code, and the data that it
            reads; by default the function's source file.
        folder: folder in which the function is searched before the Python path; by default that of the experiment file.
        max_train: use at most this many training examples: the first ones.
        max_test: likewise, test examples.
        resolution: side in pixels to which images are resized and cropped; required if they differ in size.
    """

    part: ClassVar[str] = "dataset"

    max_train: Annotated[int, Field(ge=2)] | None = None
    max_test: Annotated[int, Field(ge=1)] | None = None
    resolution: Annotated[int, Field(ge=1)] | None = None

    @property
    def name(self) -> str:
        """Name of the dataset in messages."""
        return self.function


def _kind(value: Any) -> str:
    keys = value if isinstance(value, dict) else type(value).model_fields if isinstance(value, Part) else ()
    return next((key for key in ("function",) if key in keys), "named")


AnyDataset = Annotated[
    Annotated[DatasetSpec, Tag("named")] | Annotated[FunctionDataset, Tag("function")],
    Discriminator(_kind),
]


def with_absolute_paths(dataset: AnyDataset, base: Path) -> AnyDataset:
    """Return a declaration whose paths, and the folder of its code, start from a folder.

    Args:
        dataset: the declaration.
        base: the folder.
    """
    paths = {key: path for key in type(dataset).model_fields if isinstance(path := getattr(dataset, key), Path)}
    if isinstance(dataset, UserFunction):
        paths.setdefault("folder", Path())
    return dataset.model_copy(update={key: (base / path.expanduser()).resolve() for key, path in paths.items()})
