"""What a user's function returns as a dataset: the examples and labels of both splits, in one of these forms.

* A dict or a named tuple of `train_images`, `train_labels`, `test_images`, `test_labels`, where `texts` or `features` may stand for
  `images`; or of Keras' `x_train`, `y_train`, `x_test`, `y_test`. `train_ids` and `test_ids` name the examples, `classes` the classes, and
  `feature_names` the features.
* Two torch `Dataset`s, for training and test, or other sequences of pairs of an example and its label. Names of the classes are taken from
  the attribute `classes` of the first one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from memtail.datasets.arrays import _images
from memtail.datasets.item_examples import described
from memtail.datasets.items import Items
from memtail.errors import DatasetError

_SPLITS = ("train", "test")
# Training examples and labels, test examples and labels.
_NAMES = (
    *((f"train_{kind}", "train_labels", f"test_{kind}", "test_labels") for kind in ("images", "texts", "features")),
    ("x_train", "y_train", "x_test", "y_test"),
)
_OPTIONAL = ("train_ids", "test_ids", "classes", "feature_names")


@dataclass(frozen=True)
class Parts:
    """What a function has returned.

    Attributes:
        items: pairs of an example and its label, by split.
        ids: names of the examples, by split, if they have any.
        classes: names of the classes.
        features: names of the features.
    """

    items: dict[str, Items]
    ids: dict[str, list[str]] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    features: tuple[str, ...] | None = None


def parts_of(source: str, returned: Any) -> Parts:
    """Return the parts of what a function has returned.

    Args:
        source: name of the function in messages.
        returned: two datasets, or named examples and labels.

    Raises:
        DatasetError: it is something else; or names are missing or unknown, or lengths differ.
    """
    return _pair(source, returned) or _columns(source, returned)


@dataclass(frozen=True)
class _Columns:
    """Items of examples and labels that are apart."""

    examples: Any
    labels: Any

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.examples[index], self.labels[index]


def _pair(source: str, returned: Any) -> Parts | None:
    """Return the items of two torch `Dataset`s; None if something else was returned."""
    if hasattr(returned, "_asdict") or not isinstance(returned, tuple | list) or len(returned) != 2:
        return None
    if all(isinstance(each, tuple | list) and len(each) == 2 and hasattr(each[0], "shape") for each in returned):
        return _columns(source, dict(zip(_NAMES[-1], (*returned[0], *returned[1]), strict=True)))  # as Keras returns them
    for name, each in zip(_SPLITS, returned, strict=True):
        if not (hasattr(each, "__len__") and hasattr(each, "__getitem__")) or isinstance(each, str | Mapping):
            raise DatasetError(
                f"{source} returned {described(each)} for {name}, needed is a torch Dataset with a length, or a list of pairs"
            )
    classes = getattr(returned[0], "classes", None) or ()
    named = isinstance(classes, list | tuple) and all(isinstance(name, str) for name in classes)
    return Parts(dict(zip(_SPLITS, returned, strict=True)), classes=tuple(classes) if named and classes else None)


def _columns(source: str, returned: Any) -> Parts:
    """Return the items of named examples and labels."""
    held = returned._asdict() if hasattr(returned, "_asdict") else returned
    known = " or ".join(", ".join(names) for names in _NAMES)
    if not isinstance(held, Mapping):
        raise DatasetError(f"{source} returned {described(returned)}, needed are two torch Datasets, or a dict of {known}")
    names = next((names for names in _NAMES if set(names) <= held.keys()), None)
    if names is None:
        raise DatasetError(f"{source} returned {', '.join(map(str, held)) or 'nothing'}, needed are {known}")
    if unknown := held.keys() - {*names, *_OPTIONAL}:
        raise DatasetError(f"{source} returned {', '.join(sorted(map(str, unknown)))}: known beside {names[0]} are {', '.join(_OPTIONAL)}")
    items: dict[str, Items] = {}
    ids = {split: [str(name) for name in held[f"{split}_ids"]] for split in _SPLITS if held.get(f"{split}_ids") is not None}
    for split, (examples, labels) in zip(_SPLITS, (names[:2], names[2:]), strict=True):
        items[split] = _Columns(_examples(f"{source}: {examples}", held[examples]), held[labels])
        for name, column in ((labels, held[labels]), (f"{split}_ids", ids.get(split))):
            if column is not None and len(column) != len(held[examples]):
                raise DatasetError(f"{source}: {len(column)} {name} for {len(held[examples])} {examples}: return one for each")
    if len(ids) == 1:
        raise DatasetError(f"{source} returned {next(iter(ids))}_ids only: return train_ids and test_ids, or none")
    named = {key: tuple(map(str, held[key])) for key in ("classes", "feature_names") if held.get(key) is not None}
    return Parts(items, ids, named.get("classes"), named.get("feature_names"))


def _examples(what: str, examples: Any) -> Any:
    """Return examples, which are images if they are one array of three or four dimensions."""
    shape = getattr(examples, "shape", ())
    if len(shape) < 3:
        return examples
    images = np.asarray(examples.detach().cpu() if hasattr(examples, "detach") else examples)
    if images.dtype.kind == "f" and images.size and images.min() >= 0 and images.max() <= 1:
        images = np.rint(images * 255).astype(np.uint8)
    try:
        return _images(what, images)
    except DatasetError as error:  # the conversions are those of a file
        raise DatasetError(str(error).replace(": save ", ": return ")) from None
