"""The `dataset` part of an experiment: a named dataset, or one that a key of its own declares, such as a user's function."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from memtail.spec.base import Part
from memtail.spec.dataset import DatasetSpec, TableColumns
from memtail.spec.trainer import UserFunction

TorchvisionName = Literal[
    "CIFAR10",
    "CIFAR100",
    "CLEVRClassification",
    "Caltech101",
    "Caltech256",
    "Country211",
    "DTD",
    "EMNIST",
    "EuroSAT",
    "FER2013",
    "FGVCAircraft",
    "FakeData",
    "FashionMNIST",
    "Flowers102",
    "Food101",
    "GTSRB",
    "INaturalist",
    "ImageNet",
    "Imagenette",
    "KMNIST",
    "LFWPeople",
    "MNIST",
    "OxfordIIITPet",
    "PCAM",
    "Places365",
    "QMNIST",
    "RenderedSST2",
    "SEMEION",
    "STL10",
    "SUN397",
    "SVHN",
    "StanfordCars",
    "USPS",
]


class FunctionDataset(UserFunction):
    """A Python function that loads examples and labels. [Choose the dataset](../guides/own-data.md#a-python-function) says what it returns.

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


class TorchvisionDataset(Part):
    """A classification dataset of torchvision.

    Attributes:
        torchvision: its class in `torchvision.datasets`.
        options: further arguments of the class. One that names the split, such as `split`, replaces the training split.
        root: the folder that the class takes as `root`, and downloads to; `MEMTAIL_DATA` and the cache are searched too.
        max_train: use at most this many training examples, evenly spaced ones.
        max_test: likewise, test examples.
        resolution: side in pixels to which images are resized and cropped; required if they differ in size.
        orientation: `exif` turns photographs as their EXIF orientation says; `stored` takes the pixels as they are stored, as torchvision
            does.
        on_error: `skip` leaves damaged image files out and lists them; `stop` refuses the dataset, with a list of all of them.
    """

    torchvision: TorchvisionName
    options: dict[str, Any] = {}
    root: Path | None = None
    max_train: Annotated[int, Field(ge=2)] | None = None
    max_test: Annotated[int, Field(ge=1)] | None = None
    resolution: Annotated[int, Field(ge=1)] | None = None
    orientation: Literal["stored", "exif"] = "stored"
    on_error: Literal["stop", "skip"] = "stop"

    @property
    def name(self) -> str:
        """Name of the dataset in messages."""
        return self.torchvision


class HuggingFaceSplits(Part):
    """The splits of a Hugging Face dataset, by their names there, such as `train`, `validation` or `train[:10%]`.

    Attributes:
        train: the training examples.
        test: the test examples; without it there is no test set.
    """

    train: str
    test: str | None = None


class HuggingFaceDataset(Part):
    """A dataset in a format of Hugging Face's package `datasets`.

    Attributes:
        huggingface: a folder (of `save_to_disk`, or of Parquet, CSV, JSON lines or image files), or the name of a dataset on the hub.
        config: the configuration, of datasets that have several.
        splits: the names of the splits; by default `train` and `test`.
        columns: the columns.
        max_train: use at most this many training examples, evenly spaced ones.
        max_test: likewise, test examples.
        resolution: of images, the side in pixels to which they are resized and cropped; required if they differ in size.
    """

    huggingface: str
    config: str | None = None
    splits: HuggingFaceSplits = HuggingFaceSplits(train="train", test="test")
    columns: TableColumns
    max_train: Annotated[int, Field(ge=2)] | None = None
    max_test: Annotated[int, Field(ge=1)] | None = None
    resolution: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _columns_are_named(cls, value: Any) -> Any:
        if isinstance(value, dict) and "columns" not in value:
            raise ValueError(f"huggingface {value.get('huggingface')!r} needs columns, such as {{text: text, label: label}}")
        return value

    @model_validator(mode="after")
    def _splits_are_no_column(self) -> Self:
        if self.columns.split is not None:
            raise ValueError("columns.split is for dataset 'table': name the splits in splits")
        return self

    @property
    def name(self) -> str:
        """Name of the dataset in messages."""
        return self.huggingface


def _kind(value: Any) -> str:
    keys = value if isinstance(value, dict) else type(value).model_fields if isinstance(value, Part) else ()
    return next((key for key in ("function", "torchvision", "huggingface") if key in keys), "named")


AnyDataset = Annotated[
    Annotated[DatasetSpec, Tag("named")]
    | Annotated[FunctionDataset, Tag("function")]
    | Annotated[TorchvisionDataset, Tag("torchvision")]
    | Annotated[HuggingFaceDataset, Tag("huggingface")],
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
    resolved: dict[str, Path | str] = {key: (base / path.expanduser()).resolve() for key, path in paths.items()}
    if isinstance(dataset, HuggingFaceDataset):
        folder = (base / Path(dataset.huggingface).expanduser()).resolve()
        if folder.exists() or dataset.huggingface.startswith(("/", ".", "~")):  # else a name on the hub
            resolved["huggingface"] = str(folder)
    return dataset.model_copy(update=resolved)
