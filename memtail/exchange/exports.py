"""Writes trials and scores of an experiment in the formats of other tools; they hold the trials that count, in the order of their indices.

* `authors`: the files of Feldman and Zhang: `NAME_infl_matrix.npz`, the pairs, `NAME_index.npz` for datasets of files, and the trials as
  `NAME/FRACTION/TRIAL/aux_arrays.npz`, with `correctness_SPLIT`, `index_SPLIT` (splits `train`, `removed` and `test`) and `subsample_idx`.
* `infl-mem`: one file of the authors' demonstration: `memorization` float32 [n] and `influence` float32 [q, n].
* `cscores`: held-out accuracy as the consistency score of Jiang et al. (2021): `scores`, `labels` if there are any, and for datasets of
  files `filenames`, base names where they are unique, and `paths`.
* `datamodels`: `masks.npy` bool [t, n] and `margins.npy` float16 [t, q], as Ilyas et al. (2022) train on; `train_margins.npy` beside it.
* `lira`: for each trial a folder `experiment-K_T` with `keep.npy` bool [n] and `scores/0000000000.npy` [n, 1], the log-odds of the label,
  as the code of Carlini et al. (2022) has them; `y_train.npy` beside them.
* `zenodo`: one file with the bits of all trials, `trainset_mask` and `trainset_correctness` bool [t, n], `testset_correctness` bool [t, q],
  `memorization` and `influence`.

Scores without an estimate are 0, as in the authors' files. Arrays of all pairs are written in blocks, and never held in memory.

Where only scores are recorded, `infl-mem` has memorization and influence of scores, and `cscores` mean held-out scores; `authors` and
`zenodo`, which consist of correctness, are refused.
"""

import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.filesize import decimal

from memtail.errors import ScoresError
from memtail.experiment_store import ExperimentStore, Record
from memtail.scores.fetch import open_scores
from memtail.scores.files import base_names
from memtail.scores.names import INDEX, INFLUENCE_MATRIX, PAIRS
from memtail.scores.reader import Scores
from memtail.scores.summary import ScoreSummary
from memtail.statistics.accumulator import PackedTrials, Words
from memtail.storage import ObjectStore

# Influences that are computed at once, which bounds memory.
_PAIRS_AT_ONCE = 1 << 23
_BITS = 64


@dataclass(frozen=True)
class _Source:
    """What is exported."""

    record: Record
    scores: Scores
    experiment_store: ExperimentStore

    @property
    def name(self) -> str:
        return self.record.experiment.name

    @property
    def packed(self) -> PackedTrials:
        return self.scores.statistics


#: Is called with the number of bytes that were written since the last call.
_Wrote = Callable[[int], None]


@dataclass(frozen=True)
class _Format:
    """A writer, and the bytes that it will write, but for the headers of arrays."""

    write: Callable[[_Source, Path, _Wrote], list[Path]]
    size: Callable[[_Source], int]


@dataclass(frozen=True)
class Export:
    """An export that is to be written.

    Attributes:
        form: the key of `FORMATS`.
        bytes: that it will take, but for the headers of arrays.
    """

    form: str
    bytes: int
    _source: _Source

    @property
    def summary(self) -> ScoreSummary:
        """Of the scores that are exported."""
        return self._source.scores.summary

    def write(self, folder: Path, on_progress: Callable[[int, int], None] = lambda done, size: None) -> list[Path]:
        """Write the files.

        Args:
            folder: to write to; made if it is missing. Files in it of the same names are replaced.
            on_progress: is called with the bytes written, and all bytes.

        Returns:
            The files and folders written.

        Raises:
            ScoresError: the folder's disk has not the room; or margins, which the format needs, are not in the store any more.
            StoreError: the store cannot be read.
            OSError: the folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(folder).free) < self.bytes:
            raise ScoresError(
                f"'{self._source.name}' as {self.form} takes {decimal(self.bytes)}, and {folder} has {decimal(free)} free: give a folder "
                "on another disk by --out"
            )
        done = 0

        def wrote(size: int) -> None:
            nonlocal done
            done += size
            on_progress(min(done, self.bytes), self.bytes)

        return FORMATS[self.form].write(self._source, folder, wrote)


def planned(store: ObjectStore, name: str, form: str) -> Export:
    """Open the published trials and scores of an experiment, to be written in the format of another tool.

    Args:
        store: with the experiment.
        name: of the experiment.
        form: a key of `FORMATS`.

    Raises:
        ScoresError: there are no scores, or what the format needs was not recorded.
        StoreError: the store cannot be read.
    """
    experiment_store = ExperimentStore(store, name)
    source = _Source(experiment_store.read_record(), open_scores(store, name), experiment_store)
    if form in _OF_MARGINS and not source.record.experiment.record.margins:
        raise ScoresError(f"experiment '{name}' has no margins, which this format consists of: declare record: {{margins: true}}")
    if form in _OF_CORRECTNESS and source.scores.scores_only:
        raise ScoresError(
            f"experiment '{name}' has scores only, and this format consists of correctness: choose infl-mem, or declare record: "
            "{scores: true}"
        )
    return Export(form, FORMATS[form].size(source), source)


def _published(source: _Source) -> list[Path]:
    """Return the published files that are in the authors' schema."""
    return [path for path in (source.scores.folder / file for file in (INFLUENCE_MATRIX, PAIRS, INDEX)) if path.exists()]


def _authors(source: _Source, folder: Path, wrote: _Wrote) -> list[Path]:
    name, written = source.name, []
    for path in _published(source):
        written += [shutil.copyfile(path, folder / f"{name}_{path.name}")]
        wrote(path.stat().st_size)
    packed = source.packed
    trials = folder / name / f"{packed.k_in.mean() / packed.trials:.2g}"
    for trial, (members, train, test) in _bits(packed.counted_trials, *_outcomes(source)):
        path = trials / str(trial) / "aux_arrays.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        inside, outside = np.flatnonzero(members), np.flatnonzero(~members)
        arrays: dict[str, Any] = {
            "correctness_train": train[inside],
            "index_train": inside,
            "correctness_removed": train[outside],
            "index_removed": outside,
            "correctness_test": test,
            "index_test": np.arange(packed.n_test),
            "subsample_idx": inside,
        }
        np.savez(path, **arrays)
        wrote(sum(array.nbytes for array in arrays.values()))
    return [*written, trials]


def _authors_size(source: _Source) -> int:
    packed = source.packed
    of_trials = 9 * packed.trials * (packed.n_train + packed.n_test) + 8 * int(packed.k_in.sum())
    return sum(path.stat().st_size for path in _published(source)) + of_trials


def _infl_mem(source: _Source, folder: Path, wrote: _Wrote) -> list[Path]:
    path = folder / f"{source.name}_infl_mem.npz"
    with _archive(path) as archive:
        _write_scores(archive, source, wrote)
    return [path]


def _scores_size(source: _Source) -> int:
    return 4 * source.packed.n_train * (1 + source.packed.n_test)


def _cscores_arrays(source: _Source) -> dict[str, Any]:
    table = source.scores.memorization
    arrays: dict[str, Any] = {"scores": np.nan_to_num(table[source.scores.names.p_out])}
    if source.scores.labelled:
        arrays["labels"] = table["label"]
    if "filename" in table:
        paths = np.array([name.encode() for name in table["filename"]], np.bytes_)
        arrays |= {"filenames": base_names(paths), "paths": paths}
    return arrays


def _cscores(source: _Source, folder: Path, wrote: _Wrote) -> list[Path]:
    path = folder / f"{source.name}-cscores-orig-order.npz"
    np.savez(path, **_cscores_arrays(source))
    wrote(_cscores_size(source))
    return [path]


def _cscores_size(source: _Source) -> int:
    return sum(array.nbytes for array in _cscores_arrays(source).values())


def _datamodels(source: _Source, folder: Path, wrote: _Wrote) -> list[Path]:
    packed = source.packed
    shapes = {"margins": (packed.trials, packed.n_test), "train_margins": (packed.trials, packed.n_train)}
    paths = {name: folder / f"{name}.npy" for name in ("masks", *shapes)}
    masks = np.lib.format.open_memmap(paths["masks"], "w+", np.bool_, (packed.trials, packed.n_train))
    arrays = {name: np.lib.format.open_memmap(paths[name], "w+", np.float16, shape) for name, shape in shapes.items()}
    for row, (_, (members,)) in enumerate(_bits(packed.counted_trials, packed.membership)):
        masks[row] = members
        wrote(members.nbytes)
    for row, train, test in _margins(source):
        arrays["train_margins"][row], arrays["margins"][row] = train, test
        wrote(train.nbytes + test.nbytes)
    return list(paths.values())


def _datamodels_size(source: _Source) -> int:
    return source.packed.trials * (3 * source.packed.n_train + 2 * source.packed.n_test)


def _lira(source: _Source, folder: Path, wrote: _Wrote) -> list[Path]:
    packed = source.packed
    written = [folder / f"experiment-{row}_{packed.trials}" for row in range(packed.trials)]
    if others := sorted(set(folder.glob("experiment*")) - set(written)):
        raise ScoresError(f"{others[0]} is of another export, and tools read all trials of a folder: give another folder by --out")
    for place, (_, (members,)) in zip(written, _bits(packed.counted_trials, packed.membership), strict=True):
        (place / "scores").mkdir(parents=True, exist_ok=True)
        np.save(place / "keep.npy", members)
        wrote(members.nbytes)
    for row, train, _ in _margins(source):
        np.save(written[row] / "scores" / "0000000000.npy", odds := train.astype(np.float32)[:, None])
        wrote(odds.nbytes)
    if source.scores.labelled:
        np.save(folder / "y_train.npy", labels := source.scores.memorization["label"])
        wrote(labels.nbytes)
    return [folder]


def _lira_size(source: _Source) -> int:
    return (5 * source.packed.trials + 8 * source.scores.labelled) * source.packed.n_train


def _zenodo(source: _Source, folder: Path, wrote: _Wrote) -> list[Path]:
    path = folder / f"{source.name}_trials.npz"
    with _archive(path) as archive:
        for name, words in zip(("trainset_mask", "trainset_correctness", "testset_correctness"), _outcomes(source), strict=True):
            shape = source.packed.trials, words.shape[1]
            _write(archive, name, "|b1", shape, (bits for _, (bits,) in _bits(source.packed.counted_trials, words)), wrote)
        _write_scores(archive, source, wrote)
    return [path]


def _zenodo_size(source: _Source) -> int:
    return source.packed.trials * (2 * source.packed.n_train + source.packed.n_test) + _scores_size(source)


#: Formats by name.
FORMATS = {
    "authors": _Format(_authors, _authors_size),
    "infl-mem": _Format(_infl_mem, _scores_size),
    "cscores": _Format(_cscores, _cscores_size),
    "datamodels": _Format(_datamodels, _datamodels_size),
    "lira": _Format(_lira, _lira_size),
    "zenodo": _Format(_zenodo, _zenodo_size),
}
_OF_MARGINS = ("datamodels", "lira")
_OF_CORRECTNESS = ("authors", "zenodo")


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an .npz file, which gets its name when it is complete, and is removed if it is not."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive:
            yield archive
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _write_scores(archive: zipfile.ZipFile, source: _Source, wrote: _Wrote) -> None:
    """Write `memorization` float32 [n], and `influence` float32 [q, n], block by block."""
    packed = source.packed
    _write(archive, "memorization", "<f4", (packed.n_train,), [np.nan_to_num(source.scores.memorization[source.scores.names.mem])], wrote)
    size = max(1, _PAIRS_AT_ONCE // packed.n_train)
    places = (slice(first, first + size) for first in range(0, packed.n_test, size))
    blocks = (np.nan_to_num(source.scores.estimated(test=place).value).T for place in places)
    _write(archive, "influence", "<f4", (packed.n_test, packed.n_train), blocks, wrote)


def _write(
    archive: zipfile.ZipFile, name: str, dtype: str, shape: tuple[int, ...], parts: Iterable[npt.NDArray[Any]], wrote: _Wrote
) -> None:
    """Write an array in parts, one after the other."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, {"descr": dtype, "fortran_order": False, "shape": shape})
        for part in parts:
            content = part.astype(dtype).tobytes()
            member.write(content)
            wrote(len(content))


def _outcomes(source: _Source) -> tuple[Words, Words, Words]:
    """Return the packed subsets and correctness of the trials."""
    return source.packed.membership, source.packed.correctness("train"), source.packed.correctness("test")


def _bits(trials: npt.NDArray[np.int64], *packed: Words) -> Iterator[tuple[int, list[npt.NDArray[np.bool_]]]]:
    """Yield each index of a trial, and its bits in each of several packed arrays."""
    for trial in trials.tolist():
        word, bit = divmod(trial, _BITS)
        yield trial, [(words[word] >> np.uint64(bit) & np.uint64(1)).astype(np.bool_) for words in packed]


def _margins(source: _Source) -> Iterator[tuple[int, npt.NDArray[np.float16], npt.NDArray[np.float16]]]:
    """Yield the place of each trial that counts among them, and its margins [n] and [q]. Raises: ScoresError: there are none."""
    places = {trial: place for place, trial in enumerate(source.packed.counted_trials.tolist())}
    for shard in source.experiment_store.committed():
        if not any(trial in places for trial in shard.trials):
            continue
        batch = source.experiment_store.batch(shard, source.record)
        if batch.train_margin is None or batch.test_margin is None:
            raise ScoresError(f"{batch.shard} has no margins, which this format consists of: declare record: {{margins: true}}")
        for row, trial in enumerate(batch.trial.tolist()):
            if trial in places:
                yield places.pop(trial), batch.train_margin[row], batch.test_margin[row]
    if places:
        raise ScoresError(f"the batches of {len(places)} trials are not in the store any more, and margins are only there")
