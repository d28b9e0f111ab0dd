"""What a user's function returns as a dataset: the examples and labels of both splits, in one of these forms.

* A dict or a named tuple of `train_images`, `train_labels`, `test_images`, `test_labels`, where `texts` or `features` may stand for
  `images`; or of Keras' `x_train`, `y_train`, `x_test`, `y_test`. `train_ids` and `test_ids` name the examples, `classes` the classes, and
  `feature_names` the features.
* Two torch `Dataset`s, for training and test, or other sequences of pairs of an example and its label. Names of the classes are taken from
  the attribute `classes` of the first one.

Test examples may be missing, or be None; and so may labels, where examples and labels have names.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from memtail.datasets.arrays import checked_images
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
        items: pairs of an example and its label, or examples, by split; without a test set only `train`.
        labelled: whether there are labels.
        ids: names of the examples, by split, if they have any.
        classes: names of the classes.
        features: names of the features.
    """

    items: dict[str, Items]
    labelled: bool
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
    given = [each for each in returned if each is not None]
    if given and all(isinstance(each, tuple | list) and len(each) == 2 and hasattr(each[0], "shape") for each in given):
        arrays = [array for pair in given for array in pair]  # as Keras returns them
        return _columns(source, dict(zip(_NAMES[-1], arrays, strict=False)))
    items = {name: each for name, each in zip(_SPLITS, returned, strict=True) if each is not None or name == "train"}
    for name, each in items.items():
        if not (hasattr(each, "__len__") and hasattr(each, "__getitem__")) or isinstance(each, str | Mapping):
            raise DatasetError(
                f"{source} returned {described(each)} for {name}, needed is a torch Dataset with a length, or a list of pairs"
            )
    classes = getattr(returned[0], "classes", None) or ()
    named = isinstance(classes, list | tuple) and all(isinstance(name, str) for name in classes)
    return Parts(items, True, classes=tuple(classes) if named and classes else None)


def _columns(source: str, returned: Any) -> Parts:
    """Return the items of named examples and labels."""
    held = returned._asdict() if hasattr(returned, "_asdict") else returned
    known = " or ".join(", ".join(names) for names in _NAMES)
    if not isinstance(held, Mapping):
        raise DatasetError(f"{source} returned {described(returned)}, needed are two torch Datasets, or a dict of {known}")
    given = {name: value for name, value in held.items() if value is not None}
    names = next((names for names in _NAMES if names[0] in given), None)
    if names is None:
        raise DatasetError(f"{source} returned {', '.join(map(str, given)) or 'nothing'}, needed are {known}")
    if unknown := given.keys() - {*names, *_OPTIONAL}:
        known = ", ".join((*names[1:], *_OPTIONAL))
        raise DatasetError(f"{source} returned {', '.join(sorted(map(str, unknown)))}: known beside {names[0]} are {known}")
    if names[2] not in given and (lone := given.keys() & {names[3], "test_ids"}):
        raise DatasetError(f"{source} returned {', '.join(sorted(lone))} without {names[2]}: return the test examples too, or neither")
    splits = {"train": names[:2], "test": names[2:]} if names[2] in given else {"train": names[:2]}
    labelled, items = names[1] in given, {}
    ids = {split: [str(name) for name in given[f"{split}_ids"]] for split in splits if f"{split}_ids" in given}
    for split, (examples, labels) in splits.items():
        if (labels in given) != labelled:
            raise DatasetError(f"{source} returned labels of one split only: return both {names[1]} and {names[3]}, or neither")
        if (f"{split}_ids" in given) != ("train_ids" in given):
            raise DatasetError(f"{source} returned ids of one split only: return train_ids and test_ids, or neither")
        for name, column in ((labels, given.get(labels)), (f"{split}_ids", ids.get(split))):
            if column is not None and len(column) != len(given[examples]):
                raise DatasetError(f"{source}: {len(column)} {name} for {len(given[examples])} {examples}: return one for each")
        held_examples = _examples(f"{source}: {examples}", given[examples])
        items[split] = _Columns(held_examples, given[labels]) if labelled else held_examples
    named = {key: tuple(map(str, given[key])) for key in ("classes", "feature_names") if key in given}
    return Parts(items, labelled, ids, named.get("classes"), named.get("feature_names"))


def _examples(what: str, examples: Any) -> Any:
    """Return examples, which are images if they are one array of three or four dimensions."""
    shape = getattr(examples, "shape", ())
    if len(shape) < 3:
        return examples
    images = np.asarray(examples.detach().cpu() if hasattr(examples, "detach") else examples)
    if images.dtype.kind == "f" and images.size and images.min() >= 0 and images.max() <= 1:
        images = np.rint(images * 255).astype(np.uint8)
    try:
        return checked_images(what, images)
    except DatasetError as error:  # the conversions are those of a file
        raise DatasetError(str(error).replace(": save ", ": return ")) from None
