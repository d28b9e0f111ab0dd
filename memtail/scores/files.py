"""Writes one version of the scores into a folder.

* `memorization.parquet`, `.csv`: `index`, `label`, `mem`, `mem_se`, `mem_lo`, `mem_hi`, `p_in`, `p_out`, `k_in`, `k_out`. `other` and
  `p_other`: the most frequent misclassification by models trained without the example, and the share of these models that predict it; -1
  and 0 if there is none, and no columns if a trial has not recorded predicted classes. `margin_in` and `margin_out`, mean logit margins,
  if recorded.
  `mem_p`, `mem_p_se`, `score_in` and `score_out`, memorization of scores and mean scores, if all trials have recorded scores.
  `filename` if the dataset has file names; in the csv, one that begins like a formula has a leading apostrophe (`memtail.scores.csv`).
* `infl_matrix.npz`, the schema of the paper's authors: `tr_mem`, `tr_labels`, `tt_labels`, and for each class K `infl_matrix_class{K}`
  float32 [train, test], `tr_classidx_{K}` and `tt_classidx_{K}`, all in original order. As in theirs, scores without an estimate are 0;
  `tr_mem_defined` bool [train] says which have one.
* `snapshots.parquet`, if outcomes by epoch are recorded: `index`, `epoch`, `mem`, `mem_se`, `mem_lo`, `mem_hi`; one row for each training
  example and epoch.
* `high_infl_pairs_infl0.15_mem0.25.npz`: `tr_idx`, `tt_idx`, `infl`, `mem`; also as parquet, with standard errors, with `infl_p` and
  `infl_p_se`, influence on scores, if all trials have recorded scores, and with `infl_lo` and `infl_hi`, the 95% interval of influence.
* `pairs.parquet`, the pairs selected by adjusted influence (`memtail.estimators.adjusted`), which is the more stable selection:
  `tr_idx`, `tt_idx`, `infl_adjusted`, falling, its `z`, and `q_value`, the false discovery rate at which the pair is kept; `confirmed`,
  whether influence, too, is above 0 (Fisher's exact test, mid-p at most 0.05; of scores Welch's); `infl`, `infl_se`, and `infl_lo` and
  `infl_hi`, its 95% interval; `mem`, `mem_se`.
* `statistics.npz`: the arrays of `memtail.statistics.accumulator.PackedTrials`.
* `index.npz`, for datasets with file names: `tr_filenames`, `tt_filenames`, base names as the authors have them, or paths in a split where
  two base names are equal; `tr_paths`, `tt_paths`, `tr_labels`, `tt_labels`, `tr_mem`, `tr_mem_defined`.
* Where only scores are recorded, there is no correctness: the tables have `mem_p`, `mem_p_se`, `score_in`, `score_out`, `infl_p` and
  `infl_p_se` in the places of `mem`, `mem_se`, `p_in`, `p_out`, `infl` and `infl_se`, and the authors' files are not written but for
  `index.npz`, which holds names and labels without memorization.
* `summary.json`: see `memtail.scores.summary`.

Without test examples the arrays of test examples and of pairs are there and empty, and so are the tables of pairs. Without labels there are
no labels in any file, and no influence matrices: one of all pairs would have n q values, and readers compute any part of it from
`statistics.npz`.

Equal statistics give equal bytes.
"""

import json
import zipfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet

from memtail.datasets import DatasetLabels
from memtail.datasets.dataset import Names
from memtail.estimators import Memorization, Pairs, high_influence_pairs, influence_blocks, memorization
from memtail.estimators.binomial import normal_interval, share
from memtail.estimators.influence import correct_in_at, influence_interval
from memtail.estimators.memorization import from_counts
from memtail.estimators.pairs import INFL_THRESHOLD, MEM_THRESHOLD
from memtail.estimators.soft import soft_influence_at, soft_memorization
from memtail.scores.csv import write_csv
from memtail.scores.names import (
    INDEX,
    INFLUENCE_MATRIX,
    MEMORIZATION,
    MEMORIZATION_CSV,
    PAIRS,
    PAIRS_TABLE,
    SELECTED_PAIRS,
    SNAPSHOTS,
    STATISTICS,
    SUMMARY,
)
from memtail.scores.selected import selected_pairs
from memtail.scores.summary import ACCURACIES, MEM_STEPS, SCHEMA, SE_QUANTILES, PairSummary, ScoreSummary, SelectionSummary
from memtail.statistics import Statistics
from memtail.statistics.accumulator import PackedTrials


def write_scores(
    folder: Path,
    name: str,
    fingerprint: str,
    statistics: Statistics,
    dataset: DatasetLabels,
    progress: Callable[[], object] = lambda: None,
    extendable: bool = True,
) -> ScoreSummary:
    """Write all files of a version into a folder, with memory for the statistics and one block of influences.

    Args:
        folder: exists.
        name: of the experiment.
        fingerprint: of the experiment.
        statistics: of its trials.
        dataset: labels and names of the experiment's dataset.
        progress: called after each piece of work.
        extendable: whether the experiment takes more trials.

    Returns:
        The summary.
    """
    packed = statistics.packed()
    mem = memorization(statistics)
    pairs = high_influence_pairs(packed, mem, dataset.train_labels, dataset.test_labels)
    progress()
    _write_memorization(folder, mem, statistics, dataset)
    if statistics.by_epoch:
        _write_snapshots(folder / SNAPSHOTS, statistics)
    if statistics.scores_only:
        _write_soft_pairs(folder, pairs)
    else:
        _write_influence_matrix(folder / INFLUENCE_MATRIX, packed, mem, dataset, progress)
        _write_pairs(folder, pairs, packed)
    selected, selection = selected_pairs(packed, mem, dataset.train_labels, dataset.test_labels, progress)
    pyarrow.parquet.write_table(pa.table(selected), folder / SELECTED_PAIRS)
    progress()
    arrays = {field.name: getattr(packed, field.name) for field in fields(packed)}
    np.savez(folder / STATISTICS, **{name: array for name, array in arrays.items() if array is not None})
    _write_index(folder / INDEX, None if statistics.scores_only else mem, dataset)
    summary = summarize(name, fingerprint, statistics, mem, pairs, selection, extendable)
    (folder / SUMMARY).write_text(json.dumps(summary.to_dict(), indent=1))
    return summary


def summarize(
    name: str,
    fingerprint: str,
    statistics: Statistics,
    mem: Memorization,
    pairs: Pairs,
    selected: SelectionSummary,
    extendable: bool,
) -> ScoreSummary:
    """Summarize a version.

    Args:
        name: of the experiment.
        fingerprint: of the experiment.
        statistics: of its trials.
        mem: memorization, estimated from them.
        pairs: high-influence pairs at the paper's thresholds.
        selected: summary of the selected pairs.
        extendable: whether the experiment takes more trials.
    """
    defined = mem.value[~np.isnan(mem.value)]
    errors = mem.standard_error[~np.isnan(mem.standard_error)]
    accuracies = {attribute: mean_accuracy(statistics, attribute) for attribute in ACCURACIES}
    return ScoreSummary(
        schema=SCHEMA,
        experiment=name,
        fingerprint=fingerprint,
        trials=statistics.trials,
        diverged=statistics.diverged,
        n_train=statistics.n_train,
        n_test=statistics.n_test,
        without_estimate=mem.undefined,
        **accuracies,
        accuracy_se={attribute: _accuracy_se(statistics, attribute) for attribute in ACCURACIES},
        mem_mean=float(defined.mean()) if len(defined) else None,
        mem_share_at_least={f"{step:g}": float((defined >= step).mean()) if len(defined) else None for step in MEM_STEPS},
        mem_se_quantiles={f"{q:g}": float(np.quantile(errors, q)) if len(errors) else None for q in SE_QUANTILES},
        pairs=PairSummary(
            mem_threshold=MEM_THRESHOLD,
            infl_threshold=INFL_THRESHOLD,
            count=len(pairs),
            train_examples=len(np.unique(pairs.train)),
            test_examples=len(np.unique(pairs.test)),
        ),
        selected_pairs=selected,
        outcome="score" if statistics.scores_only else "correct",
        extendable=extendable,
        conditions={condition: dict(sorted(counts.items())) for condition, counts in statistics.conditions.items()},
    )


def mean_accuracy(statistics: Statistics, attribute: str) -> float | None:
    """Return the mean of one of `ACCURACIES` over the trials that count; None if no trial has it."""
    values = _accuracies(statistics, attribute)
    return float(np.mean(values)) if values else None


def _accuracy_se(statistics: Statistics, attribute: str) -> float | None:
    """The standard error of that mean; None for fewer than two trials."""
    values = _accuracies(statistics, attribute)
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def _accuracies(statistics: Statistics, attribute: str) -> list[float]:
    counted = [statistics.metrics[trial] for trial in sorted(statistics.metrics) if not statistics.metrics[trial].diverged]
    return [value for entry in counted if (value := getattr(entry, attribute)) is not None]


def _write_memorization(folder: Path, mem: Memorization, statistics: Statistics, dataset: DatasetLabels) -> None:
    columns: dict[str, Any] = {"index": np.arange(dataset.n_train)}
    if dataset.labelled:
        columns["label"] = dataset.train_labels
    if not statistics.scores_only:
        columns |= {"mem": mem.value, "mem_se": mem.standard_error, "mem_lo": mem.interval[0], "mem_hi": mem.interval[1]}
        columns |= {"p_in": mem.p_in, "p_out": mem.p_out}
    columns |= {"k_in": mem.k_in, "k_out": mem.k_out}
    if statistics.held_out_misclassifications is not None:
        other, count = statistics.held_out_misclassifications.most_frequent(dataset.n_train)
        columns |= {"other": np.where(other < len(dataset.classes), other, -1), "p_other": share(count, mem.k_out)}
    if statistics.margin_in is not None and statistics.margin_out is not None:
        with np.errstate(invalid="ignore", divide="ignore"):
            columns["margin_in"] = statistics.margin_in / 2**24 / mem.k_in
            columns["margin_out"] = statistics.margin_out / 2**24 / mem.k_out
    if (soft := soft_memorization(statistics)) is not None:
        columns |= {"mem_p": soft.value, "mem_p_se": soft.standard_error, "score_in": soft.score_in, "score_out": soft.score_out}
    if dataset.train_files is not None:
        columns["filename"] = [name.decode(errors="replace") for name in dataset.train_files.tolist()]
    table = pa.table(columns)
    pyarrow.parquet.write_table(table, folder / MEMORIZATION)
    write_csv(table, folder / MEMORIZATION_CSV)


def _write_snapshots(path: Path, statistics: Statistics) -> None:
    index = np.arange(statistics.n_train)
    estimates = dict.fromkeys(("mem", "mem_se", "mem_lo", "mem_hi"), pa.float64())
    schema = pa.schema({"index": pa.int64(), "epoch": pa.int32(), **estimates})
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for epoch, (correct_in, correct) in statistics.by_epoch.items():  # one at a time, since all together take much memory
            mem = from_counts(statistics.k_in, statistics.k_out, correct_in, correct - correct_in)
            columns = {"index": index, "epoch": np.full(len(index), epoch, np.int32), "mem": mem.value, "mem_se": mem.standard_error}
            columns |= {"mem_lo": mem.interval[0], "mem_hi": mem.interval[1]}
            writer.write_table(pa.table(columns, schema))


def _write_influence_matrix(
    path: Path, packed: PackedTrials, mem: Memorization, dataset: DatasetLabels, progress: Callable[[], object]
) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:

        def add(name: str, array: npt.NDArray[Any]) -> None:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)

        add("tr_mem", np.nan_to_num(mem.value))
        add("tr_mem_defined", ~np.isnan(mem.value))
        if dataset.labelled:
            add("tr_labels", np.asarray(dataset.train_labels))
            add("tt_labels", np.asarray(dataset.test_labels))
        for label in range(len(dataset.classes)):
            train, test = np.flatnonzero(dataset.train_labels == label), np.flatnonzero(dataset.test_labels == label)
            add(f"tr_classidx_{label}", train)
            add(f"tt_classidx_{label}", test)
            with archive.open(f"infl_matrix_class{label}.npy", "w", force_zip64=True) as member:
                header = {"descr": "<f4", "fortran_order": False, "shape": (len(train), len(test))}
                np.lib.format.write_array_header_1_0(member, header)
                for _, block in influence_blocks(packed, train, test):
                    member.write(np.nan_to_num(block.value, copy=False).astype("<f4").tobytes())
                    progress()


def base_names(paths: Names) -> Names:
    """Return the last parts of paths, bytes [N]; the paths themselves if two are equal."""
    names = np.array([path.rpartition(b"/")[2] for path in paths.tolist()], dtype=np.bytes_)
    return names if len(np.unique(names)) == len(names) else paths


def _write_index(path: Path, mem: Memorization | None, dataset: DatasetLabels) -> None:
    """Write the names, labels and memorization of a dataset with file names; without memorization also of one with labels only."""
    arrays: dict[str, Any] = {}
    if dataset.train_files is not None and dataset.test_files is not None:
        arrays |= {"tr_filenames": base_names(dataset.train_files), "tt_filenames": base_names(dataset.test_files)}
        arrays |= {"tr_paths": dataset.train_files, "tt_paths": dataset.test_files}
    if dataset.labelled and (arrays or mem is None):
        arrays |= {"tr_labels": dataset.train_labels, "tt_labels": dataset.test_labels}
    if arrays and mem is not None:
        arrays |= {"tr_mem": np.nan_to_num(mem.value), "tr_mem_defined": ~np.isnan(mem.value)}
    if arrays:
        np.savez(path, **arrays)


def _write_soft_pairs(folder: Path, pairs: Pairs) -> None:
    columns = {"tr_idx": pairs.train, "tt_idx": pairs.test, "infl_p": pairs.influence, "infl_p_se": pairs.influence_se}
    low, high = normal_interval(pairs.influence, pairs.influence_se)
    columns |= {"mem_p": pairs.mem, "mem_p_se": pairs.mem_se, "infl_lo": low, "infl_hi": high}
    pyarrow.parquet.write_table(pa.table(columns), folder / PAIRS_TABLE)


def _write_pairs(folder: Path, pairs: Pairs, packed: PackedTrials) -> None:
    np.savez(folder / PAIRS, tr_idx=pairs.train, tt_idx=pairs.test, infl=pairs.influence, mem=pairs.mem)
    columns = {
        "tr_idx": pairs.train,
        "tt_idx": pairs.test,
        "infl": pairs.influence,
        "infl_se": pairs.influence_se,
        "mem": pairs.mem,
        "mem_se": pairs.mem_se,
    }
    if (soft := soft_influence_at(packed, pairs.train, pairs.test)) is not None:
        columns |= {"infl_p": soft[0], "infl_p_se": soft[1]}
    both = correct_in_at(packed, pairs.train, pairs.test)
    low, high = influence_interval(both, packed.k_in[pairs.train], packed.correct_on_test[pairs.test], packed.trials)
    columns |= {"infl_lo": low, "infl_hi": high}
    pyarrow.parquet.write_table(pa.table(columns), folder / PAIRS_TABLE)
