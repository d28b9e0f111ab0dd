"""Reads trials that were trained elsewhere, in the formats of other tools. Each holds t trials on n training and q test examples.

* The authors' folders: below the given folder, `aux_arrays.npz` of each trial with `subsample_idx`, and `correctness_SPLIT` and
  `index_SPLIT` for the splits `train`, `removed` and `test`.
* datamodels: `masks.npy` bool [t, n], `margins.npy` [t, q] and `train_margins.npy` [t, n]; trials that `_completed.npy` lacks are left out.
* Membership inference (LiRA): a folder `experiment...` of each trial with `keep.npy` bool [n] and `scores/EPOCH.npy` [n, augmentations],
  the log-odds of the label, of which the last epoch counts; `y_train.npy` beside them.
* One `.npz` of all trials: `trainset_mask`, `trainset_correctness` and `testset_correctness`; or `membership`, `train_correct` and
  `test_correct`, with `train_score`, `test_score`, `train_margin`, `test_margin`, `train_labels` and `test_labels` if there are any. With
  `membership`, `train_score` and `test_score` alone, all estimates are of scores.

A margin or log-odds above 0 means that the label has more than half of the probability, and counts as correct; a label that wins with less
counts as wrong.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from memtail.errors import OutcomeError
from memtail.statistics.soft import quantized
from memtail.trials import recorded_margins

_Bools = npt.NDArray[np.bool_]
_Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ForeignTrial:
    """The outcomes of one trial; arrays as of `memtail.trials.TrialBatch`, unpacked.

    Attributes:
        members, train_correct: bool [n]; correctness is None of trials that have scores only.
        test_correct: bool [q], or None.
        train_margin, test_margin: float16 [n] and [q], or None.
        train_score, test_score: uint8 [n] and [q], scores in 255ths, or None.
    """

    members: _Bools
    train_correct: _Bools | None
    test_correct: _Bools | None
    train_margin: npt.NDArray[np.float16] | None = None
    test_margin: npt.NDArray[np.float16] | None = None
    train_score: npt.NDArray[np.uint8] | None = None
    test_score: npt.NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class ForeignTrials:
    """Trials that were trained elsewhere, read one by one.

    Attributes:
        path: of their file or folder.
        origin: name of their format.
        count: number of trials, t.
        n_train, n_test: n and q; 0 if there are no test examples.
        recorded: names of the outcomes that they have, such as `train_score`.
        read: reads a trial by its place.
        train_labels, test_labels: int64 [n] and [q]; None if the files have none.
    """

    path: Path
    origin: str
    count: int
    n_train: int
    n_test: int
    recorded: frozenset[str]
    read: Callable[[int], ForeignTrial]
    train_labels: _Labels | None = None
    test_labels: _Labels | None = None

    def __iter__(self) -> Iterator[ForeignTrial]:
        """Read all trials.

        Raises:
            OutcomeError: a trial is damaged, has other examples than the first, an empty subset, or values that are no outcomes.
        """
        for place in range(self.count):
            with _reading(self.path):
                trial = self.read(place)
            for name, values in vars(trial).items():
                expected = self.n_test if name.startswith("test") else self.n_train
                if values is not None and values.shape != (expected,):
                    raise OutcomeError(
                        f"{self.path}: trial {place} has {name} {list(values.shape)}, expected is [{expected}]: give the trials of one "
                        "experiment"
                    )
            if not trial.members.any():
                raise OutcomeError(f"{self.path}: trial {place} has an empty subset: leave it out")
            yield trial


def read_foreign(path: Path) -> ForeignTrials:
    """Open the trials in a file or folder; its content tells the format.

    Args:
        path: of the file or folder.

    Raises:
        OutcomeError: it holds no trials in a known format, or is damaged.
    """
    if path.suffix == ".npy" and path.is_file():
        raise OutcomeError(f"{path}: is one array of several: give the folder that holds them")
    if path.is_file():
        return _read_archive(path)
    if not path.is_dir():
        raise OutcomeError(f"{path}: there is no such file or folder: give the trials' file, or the folder that holds them")
    if (path / "masks.npy").exists():
        return _read_datamodels(path)
    if folders := sorted(path.glob("experiment*/keep.npy"), key=_numbers):
        return _read_lira(path, [each.parent for each in folders])
    if files := sorted(path.rglob("aux_arrays.npz"), key=_numbers):
        return _read_authors(files)
    raise OutcomeError(
        f"{path}: holds no trials that memtail reads: aux_arrays.npz below it, masks.npy and margins.npy, or experiment*/keep.npy"
    )


def _read_authors(files: Sequence[Path]) -> ForeignTrials:
    def read(place: int) -> ForeignTrial:
        path = files[place]
        with _reading(path), np.load(path, allow_pickle=False) as arrays:
            held = {name: arrays[name] for name in arrays.files}
            size = len(held["index_train"]) + len(held["index_removed"])
            members, correct = np.zeros(size, np.bool_), np.zeros(size, np.bool_)
            members[held["subsample_idx"]] = True
            for split in ("train", "removed"):
                correct[held[f"index_{split}"]] = _bits(path, f"correctness_{split}", held[f"correctness_{split}"])
            test = np.zeros(len(held["index_test"]), np.bool_)
            test[held["index_test"]] = _bits(path, "correctness_test", held["correctness_test"])
            return ForeignTrial(members, correct, test)

    return _opened(files[0].parent, "aux_arrays", len(files), read)


def _read_datamodels(folder: Path) -> ForeignTrials:
    for name in ("margins", "train_margins"):
        if not (folder / f"{name}.npy").exists():
            raise OutcomeError(f"{folder}: has masks.npy, and no {name}.npy: memorization needs margins of training and test examples")
    masks, test, train = (_map(folder / f"{name}.npy") for name in ("masks", "margins", "train_margins"))
    completed = folder / "_completed.npy"
    rows = np.flatnonzero(_map(completed)) if completed.exists() else np.arange(len(masks))

    def read(place: int) -> ForeignTrial:
        row = rows[place]
        margins = _margins(folder, train[row]), _margins(folder, test[row])
        return ForeignTrial(_bits(folder / "masks.npy", "masks", masks[row]), margins[0] > 0, margins[1] > 0, *margins)

    return _opened(folder, "datamodels", len(rows), read)


def _read_lira(root: Path, folders: Sequence[Path]) -> ForeignTrials:
    def read(place: int) -> ForeignTrial:
        folder = folders[place]
        scores = sorted((folder / "scores").glob("*.npy"), key=_numbers)
        if not scores:
            raise OutcomeError(f"{folder}: has no scores/EPOCH.npy: run the tool's score.py, or remove the folder")
        values = _map(scores[-1])
        if values.ndim != 2:
            raise OutcomeError(f"{scores[-1]}: is {list(values.shape)}, expected is [n, augmentations]")
        odds = np.asarray(values, np.float64).mean(-1)
        margins, members = _margins(scores[-1], odds), _bits(folder / "keep.npy", "keep", _map(folder / "keep.npy"))[: len(odds)]
        none = np.zeros(0, np.bool_)
        return ForeignTrial(members, odds > 0, none, margins, none.astype(np.float16), _probabilities(odds), none.astype(np.uint8))

    opened = _opened(root, "lira", len(folders), read)
    path = root / "y_train.npy"
    if not path.exists():
        return opened
    labels = _class_labels(path, "y_train", _map(path)[: opened.n_train], opened.n_train)
    return replace(opened, train_labels=labels, test_labels=np.zeros(0, np.int64))


def _read_archive(path: Path) -> ForeignTrials:
    with _reading(path), np.load(path, allow_pickle=False) as arrays:
        names = dict.fromkeys(arrays.files)
        theirs = ("trainset_mask", "trainset_correctness", "testset_correctness")
        ours = ("membership", "train_correct", "test_correct")
        bits = theirs if theirs[0] in names else ours
        scores_only = bits is ours and ours[1] not in names and "train_score" in names
        if missing := [name for name in bits[:2] if name not in names and not (scores_only and name == ours[1])]:
            raise OutcomeError(f"{path}: has no array {missing[0]}, there are {', '.join(names) or 'none'}: see the guide on exchange")
        held = {name: arrays[name] for name in names if name in (*bits, *_OPTIONAL, *_LABELS)}
    for name in held.keys() - set(_LABELS):
        if held[name].ndim != 2 or len(held[name]) != len(held[bits[0]]):
            raise OutcomeError(f"{path}: {name} is {list(held[name].shape)}, and {bits[0]} {list(held[bits[0]].shape)}: one row a trial")
    if scores_only and ours[2] in held:
        raise OutcomeError(f"{path}: has test_correct without train_correct: give both, or scores alone")
    test = held.get("test_score" if scores_only else bits[2], np.zeros((len(held[bits[0]]), 0), np.bool_))
    for train_name, test_name in (_OPTIONAL[:2], _OPTIONAL[2:], _LABELS):
        if (train_name in held) != (test_name in held):
            if test.shape[1] or train_name not in held:
                raise OutcomeError(f"{path}: has {train_name} or {test_name} alone: give both, or none")
            held[test_name] = np.zeros(0, np.int64) if test_name in _LABELS else np.zeros((len(test), 0), np.float16)

    def read(place: int) -> ForeignTrial:
        further = {name: held[name][place] for name in _OPTIONAL if name in held}
        for name, values in further.items():
            further[name] = _margins(path, values) if name.endswith("_margin") else _scores(path, name, values)
        members = _bits(path, bits[0], held[bits[0]][place])
        if scores_only:
            return ForeignTrial(members, None, None, **further)
        return ForeignTrial(members, _bits(path, bits[1], held[bits[1]][place]), _bits(path, bits[2], test[place]), **further)

    sizes = (held[bits[0]].shape[1], test.shape[1])
    labels = (_class_labels(path, name, held[name], size) if name in held else None for name, size in zip(_LABELS, sizes, strict=True))
    return _opened(path, "arrays", len(held[bits[0]]), read, *labels)


_OPTIONAL = ("train_margin", "test_margin", "train_score", "test_score")
_LABELS = ("train_labels", "test_labels")


def _class_labels(path: Path, name: str, values: npt.NDArray[Any], size: int) -> _Labels:
    if values.shape != (size,) or values.dtype.kind not in "iu" or values.min(initial=0) < 0:
        raise OutcomeError(
            f"{path}: {name} is {values.dtype} {list(values.shape)}: labels are whole numbers from 0, one for each of {size}"
        )
    return values.astype(np.int64)


def _opened(
    path: Path,
    origin: str,
    count: int,
    read: Callable[[int], ForeignTrial],
    train_labels: _Labels | None = None,
    test_labels: _Labels | None = None,
) -> ForeignTrials:
    if not count:
        raise OutcomeError(f"{path}: holds no complete trial")
    with _reading(path):
        first = read(0)
        recorded = frozenset(name for name in (*_OPTIONAL, "train_correct") if getattr(first, name) is not None)
        test = first.test_score if first.test_correct is None else first.test_correct
        n_test = 0 if test is None else len(test)
        return ForeignTrials(path, origin, count, len(first.members), n_test, recorded, read, train_labels, test_labels)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OutcomeError:
        raise
    except Exception as error:  # damaged bytes make numpy raise anything
        raise OutcomeError(f"{path}: cannot be read ({type(error).__name__}: {error}): give the file as its tool wrote it") from None


def _map(path: Path) -> npt.NDArray[Any]:
    with _reading(path):
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        return array


def _bits(path: Path, name: str, values: npt.NDArray[Any]) -> _Bools:
    if values.dtype != np.bool_ and not (values.dtype.kind in "iuf" and np.isin(values, (0, 1)).all()):
        raise OutcomeError(f"{path}: {name} is {values.dtype} with other values than 0 and 1")
    return values.astype(np.bool_)


def _margins(path: Path, values: npt.NDArray[Any]) -> npt.NDArray[np.float16]:
    if values.dtype.kind not in "iuf" or np.isnan(values).any():
        raise OutcomeError(f"{path}: holds margins that are not numbers ({values.dtype}): leave out trials that diverged")
    return recorded_margins(values)


def _probabilities(odds: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    return quantized(1 / (1 + np.exp(-np.clip(odds, -50, 50))))


def _scores(path: Path, name: str, values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    if not (values.dtype.kind == "f" and ((values >= 0) & (values <= 1)).all()):
        raise OutcomeError(f"{path}: {name} is {values.dtype}: scores are floats from 0 to 1")
    return quantized(values)


def _numbers(path: Path) -> list[int | str]:
    """Sort key in which 10 follows 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]
