"""The `dataset` part of an experiment: its name, its location, and how much of it is used."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from memtail.spec.base import Part


class TableColumns(Part):
    """The columns of a table.

    Attributes:
        label: the label; texts or whole numbers, whose sorted values are the classes. Without it the examples have no labels.
        text: the example, a text.
        features: the example, as numbers; `all` are all columns that are not named otherwise.
        image: the example, the path of an image file, relative to the folder of the table.
        id: a name of the example, which score files and pages show; by default the path of an image.
        split: `train` or `test`, where one file has both splits.
    """

    label: str | None = None
    text: str | None = None
    features: Literal["all"] | Annotated[list[str], Field(min_length=1)] | None = None
    image: str | None = None
    id: str | None = None
    split: str | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if sum(kind is not None for kind in (self.text, self.features, self.image)) != 1:
            raise ValueError("name one of text, the column of the texts, features, the columns of numbers, and image, the column of paths")
        return self


class DatasetSpec(Part):
    """The dataset: its name, its location, and how much of it is used.

    Attributes:
        name: a named dataset, `folder` for a tree of images, `arrays` for an `.npz` file of images or features, or `table` for a file of
            texts or features.
        root: the folder, the file of `arrays`, or the file of `table` (CSV, JSON lines or Parquet); required for these. Other
            datasets are also searched in `MEMTAIL_DATA` and the cache.
        max_train: use at most this many training examples: the first ones; of a folder or a table, evenly spaced ones.
        max_test: likewise, test examples.
        resolution: of image files, the side in pixels to which images are resized and cropped; required if they differ in size.
        test: of a table, the file with the test examples. Without it and `columns.split` there is no test set.
        columns: of a table, its columns.
        orientation: of image files, `exif` turns photographs as their EXIF orientation says; `stored` takes the pixels as they are
            stored, as torchvision does.
        on_error: of image files, `skip` leaves damaged ones out and lists them; `stop` refuses the dataset, with a list of all of them.
    """

    name: Literal["digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "folder", "arrays", "table", "opaque"]
    root: Path | None = None
    max_train: Annotated[int, Field(ge=2)] | None = None
    max_test: Annotated[int, Field(ge=1)] | None = None
    resolution: Annotated[int, Field(ge=1)] | None = None
    test: Path | None = None
    columns: TableColumns | None = None
    orientation: Literal["stored", "exif"] = "stored"
    on_error: Literal["stop", "skip"] = "stop"

    @model_validator(mode="after")
    def _fits_the_kind(self) -> Self:
        if self.name in ("folder", "arrays", "table") and self.root is None:
            raise ValueError(f"dataset '{self.name}' needs a root: the path of the {self.name}")
        files = self.name == "folder" or (self.columns is not None and self.columns.image is not None)
        if self.resolution is not None and not files:
            raise ValueError(f"resolution is for image files, of dataset 'folder' or columns.image; '{self.name}' holds none")
        for key in ("test", "columns"):
            if getattr(self, key) is not None and self.name != "table":
                raise ValueError(f"{key} is for dataset 'table', not for '{self.name}'")
        if self.name == "table" and self.columns is None:
            raise ValueError("dataset 'table' needs columns: text, features or image, and label if there is one")
        if self.columns is not None and self.columns.split is not None and self.test is not None:
            raise ValueError("dataset 'table' has its test examples twice: in test, a second file, and by columns.split: remove one")
        if not files and (self.orientation, self.on_error) != ("stored", "stop"):
            raise ValueError(
                f"orientation and on_error are for image files, of dataset 'folder' or columns.image; '{self.name}' holds none"
            )
        return self
