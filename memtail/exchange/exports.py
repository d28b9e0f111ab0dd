"""Writes trials and scores of an experiment in the formats of other tools; they hold the trials that count, in the order of their indices.

* `authors`: the files of Feldman and Zhang: `NAME_infl_matrix.npz`, the pairs, `NAME_index.npz` for datasets of files, and the trials as
  `NAME/FRACTION/TRIAL/aux_arrays.npz`, with `correctness_SPLIT`, `index_SPLIT` (splits `train`, `removed` and `test`) and `subsample_idx`.
* `infl-mem`: one file of the authors' demonstration: `memorization` float32 [n] and `influence` float32 [q, n].
* `cscores`: held-out accuracy as the consistency score of Jiang et al. (2021): `scores`, `labels` if there are any, and `filenames` for
  datasets of files.
* `datamodels`: `masks.npy` bool [t, n] and `margins.npy` float16 [t, q], as Ilyas et al. (2022) train on; `train_margins.npy` beside it.
* `lira`: for each trial a folder `experiment-K_T` with `keep.npy` bool [n] and `scores/0000000000.npy` [n, 1], the log-odds of the label,
  as the code of Carlini et al. (2022) has them; `y_train.npy` beside them.
* `zenodo`: one file with the bits of all trials, `trainset_mask` and `trainset_correctness` bool [t, n], `testset_correctness` bool [t, q],
  `memorization` and `influence`.

Scores without an estimate are 0, as in the authors' files.

Where only scores are recorded, `infl-mem` has memorization and influence of scores, and `cscores` mean held-out scores; `authors` and
`zenodo`, which consist of correctness, are refused.
"""

import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from memtail.errors import ScoresError
from memtail.experiment_store import ExperimentStore, Record
from memtail.scores.fetch import open_scores
from memtail.scores.names import INDEX, INFLUENCE_MATRIX, PAIRS
from memtail.scores.reader import Scores
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
    def packed(self) -> PackedTrials:
        return self.scores.statistics


def export(store: ObjectStore, name: str, form: str, folder: Path) -> list[Path]:
    """Write the published trials and scores of an experiment in the format of another tool.

    Args:
        store: with the experiment.
        name: of the experiment.
        form: a key of `FORMATS`.
        folder: to write to; made if it is missing. Files in it of the same names are replaced.

    Returns:
        The files and folders written.

    Raises:
        ScoresError: there are no scores, or what the format needs was not recorded.
        StoreError: the store cannot be read.
    """
    experiment_store = ExperimentStore(store, name)
    record = experiment_store.read_record()
    source = _Source(record, open_scores(store, name), experiment_store)
    folder.mkdir(parents=True, exist_ok=True)
    return FORMATS[form](source, folder)


def _authors(source: _Source, folder: Path) -> list[Path]:
    name, written, outcomes = source.record.experiment.name, [], _outcomes(source)
    for path in (source.scores.folder / file for file in (INFLUENCE_MATRIX, PAIRS, INDEX)):
        if path.exists():
            written += [shutil.copyfile(path, folder / f"{name}_{path.name}")]
    packed = source.packed
    trials = folder / name / f"{packed.k_in.mean() / packed.trials:.2g}"
    for trial, (members, train, test) in _bits(packed.counted_trials, *outcomes):
        path = trials / str(trial) / "aux_arrays.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        inside, outside = np.flatnonzero(members), np.flatnonzero(~members)
        np.savez(
            path,
            correctness_train=train[inside],
            index_train=inside,
            correctness_removed=train[outside],
            index_removed=outside,
            correctness_test=test,
            index_test=np.arange(packed.n_test),
            subsample_idx=inside,
        )
    return [*written, trials]


def _infl_mem(source: _Source, folder: Path) -> list[Path]:
    path = folder / f"{source.record.experiment.name}_infl_mem.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        _write_scores(archive, source)
    return [path]


def _cscores(source: _Source, folder: Path) -> list[Path]:
    path = folder / f"{source.record.experiment.name}-cscores-orig-order.npz"
    table = source.scores.memorization
    arrays: dict[str, Any] = {"scores": np.nan_to_num(table[source.scores.names.p_out])}
    if source.scores.labelled:
        arrays["labels"] = table["label"]
    if "filename" in table:
        arrays["filenames"] = np.array([name.encode() for name in table["filename"]], np.bytes_)
    np.savez(path, **arrays)
    return [path]


def _datamodels(source: _Source, folder: Path) -> list[Path]:
    _require_margins(source)
    packed = source.packed
    shapes = {"margins": (packed.trials, packed.n_test), "train_margins": (packed.trials, packed.n_train)}
    paths = {name: folder / f"{name}.npy" for name in ("masks", *shapes)}
    masks = np.lib.format.open_memmap(paths["masks"], "w+", np.bool_, (packed.trials, packed.n_train))
    arrays = {name: np.lib.format.open_memmap(paths[name], "w+", np.float16, shape) for name, shape in shapes.items()}
    for row, (_, (members,)) in enumerate(_bits(packed.counted_trials, packed.membership)):
        masks[row] = members
    for row, train, test in _margins(source):
        arrays["train_margins"][row], arrays["margins"][row] = train, test
    return list(paths.values())


def _lira(source: _Source, folder: Path) -> list[Path]:
    _require_margins(source)
    packed = source.packed
    written = [folder / f"experiment-{row}_{packed.trials}" for row in range(packed.trials)]
    if others := sorted(set(folder.glob("experiment*")) - set(written)):
        raise ScoresError(f"{others[0]} is of another export, and tools read all trials of a folder: give another folder by --out")
    for place, (_, (members,)) in zip(written, _bits(packed.counted_trials, packed.membership), strict=True):
        (place / "scores").mkdir(parents=True, exist_ok=True)
        np.save(place / "keep.npy", members)
    for row, train, _ in _margins(source):
        np.save(written[row] / "scores" / "0000000000.npy", train.astype(np.float32)[:, None])
    if source.scores.labelled:
        np.save(folder / "y_train.npy", source.scores.memorization["label"])
    return [folder]


def _zenodo(source: _Source, folder: Path) -> list[Path]:
    path, outcomes = folder / f"{source.record.experiment.name}_trials.npz", _outcomes(source)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, words in zip(("trainset_mask", "trainset_correctness", "testset_correctness"), outcomes, strict=True):
            shape = source.packed.trials, words.shape[1]
            _write(archive, name, "|b1", shape, (bits for _, (bits,) in _bits(source.packed.counted_trials, words)))
        _write_scores(archive, source)
    return [path]


#: Writers by the name of the format.
FORMATS: dict[str, Callable[[_Source, Path], list[Path]]] = {
    "authors": _authors,
    "infl-mem": _infl_mem,
    "cscores": _cscores,
    "datamodels": _datamodels,
    "lira": _lira,
    "zenodo": _zenodo,
}


def _write_scores(archive: zipfile.ZipFile, source: _Source) -> None:
    """Write `memorization` float32 [n], and `influence` float32 [q, n], block by block."""
    packed = source.packed
    _write(archive, "memorization", "<f4", (packed.n_train,), [np.nan_to_num(source.scores.memorization[source.scores.names.mem])])
    size = max(1, _PAIRS_AT_ONCE // packed.n_train)
    places = (slice(first, first + size) for first in range(0, packed.n_test, size))
    blocks = (np.nan_to_num(source.scores.estimated(test=place).value).T for place in places)
    _write(archive, "influence", "<f4", (packed.n_test, packed.n_train), blocks)


def _write(archive: zipfile.ZipFile, name: str, dtype: str, shape: tuple[int, ...], parts: Iterable[npt.NDArray[Any]]) -> None:
    """Write an array in parts, one after the other."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, {"descr": dtype, "fortran_order": False, "shape": shape})
        for part in parts:
            member.write(part.astype(dtype).tobytes())


def _outcomes(source: _Source) -> tuple[Words, Words, Words]:
    """Return the packed subsets and correctness of the trials. Raises: ScoresError: only scores are recorded."""
    if source.scores.scores_only:
        raise ScoresError(
            f"experiment '{source.record.experiment.name}' has scores only, and this format consists of correctness: choose infl-mem, or "
            "declare record: {scores: true}"
        )
    return source.packed.membership, source.packed.correctness("train"), source.packed.correctness("test")


def _bits(trials: npt.NDArray[np.int64], *packed: Words) -> Iterator[tuple[int, list[npt.NDArray[np.bool_]]]]:
    """Yield each index of a trial, and its bits in each of several packed arrays."""
    for trial in trials.tolist():
        word, bit = divmod(trial, _BITS)
        yield trial, [(words[word] >> np.uint64(bit) & np.uint64(1)).astype(np.bool_) for words in packed]


def _require_margins(source: _Source) -> None:
    if not source.record.experiment.record.margins:
        raise ScoresError(
            f"experiment '{source.record.experiment.name}' has no margins, which this format consists of: declare record: {{margins: true}}"
        )


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
