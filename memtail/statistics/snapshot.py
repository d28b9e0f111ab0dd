"""Snapshots of statistics, from which a restarted aggregation continues: an uncompressed .npz that plain numpy reads.

Schema 1, for t accumulated trials of b batches on n training and q test examples, in W words of 64 trials:

* `header`, JSON text: `schema`, the experiment's `fingerprint`, and the `conditions` of the statistics.
* `first`, `last` int64 [b] and `tag` bytes [b]: the batches, with the store's tags of what was read.
* `membership`, `train_correct` uint64 [W, n], `test_correct` uint64 [W, q] and `counted` uint64 [W]: the arrays of `PackedTrials`. Where
  only scores are recorded, `train_score` uint64 [8, W, n] is in the place of `train_correct` and `test_correct`.
* `trial` int64 [t], `diverged` bool [t], and `values` float64 [t, 4], the other metrics of the trials; NaN for None.
* `misclassified` int64 and `frequency` int32: the arrays of `Misclassifications`, unless a trial has not recorded them.
* `margin_in`, `margin_out` int64 [n], where margins are recorded.
* `score_in`, `square_in`, `score_out`, `square_out` int64 [n], the arrays of `SoftSums`, and `test_score` uint64 [8, W, q], if all trials
  have scores.
* `epoch` int64 [e] and `by_epoch` int64 [e, 2, n], the sums of `Statistics.by_epoch`, where outcomes by epoch are recorded.
"""

import json
import math
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from memtail.errors import ForeignObjectError
from memtail.numpy_files import read_archive
from memtail.statistics.accumulator import PackedTrials, Statistics
from memtail.statistics.misclassifications import Misclassifications
from memtail.statistics.soft import PLANES, SoftSums
from memtail.trials import Shard, TrialMetrics

SCHEMA = 1

_CONDITIONS = TypeAdapter(dict[str, dict[str, int]])
_OUTCOMES = ("train_correct", "test_correct", "train_score")
_VALUES = ("loss", "in_subset_accuracy", "held_out_accuracy", "test_accuracy")


@dataclass(frozen=True)
class Snapshot:
    """Statistics and the batches they consist of.

    Attributes:
        fingerprint: of the experiment.
        statistics: of all trials of the batches.
        batches: the tag of each batch.
    """

    fingerprint: str
    statistics: Statistics
    batches: dict[Shard, str]

    def write(self, path: Path) -> None:
        """Write the file."""
        statistics, packed, metrics = self.statistics, self.statistics.packed(), self.statistics.metrics.values()
        arrays: dict[str, Any] = {
            "header": json.dumps({"schema": SCHEMA, "fingerprint": self.fingerprint, "conditions": statistics.conditions}),
            "first": np.array([shard.first for shard in self.batches], np.int64),
            "last": np.array([shard.last for shard in self.batches], np.int64),
            "tag": np.array([tag.encode() for tag in self.batches.values()], np.bytes_),
            "membership": packed.membership,
            "counted": packed.counted,
            **{name: words for name in _OUTCOMES if (words := getattr(packed, name)) is not None},
            "trial": np.array([entry.trial for entry in metrics], np.int64),
            "diverged": np.array([entry.diverged for entry in metrics], np.bool_),
            "values": np.array([[getattr(entry, name) for name in _VALUES] for entry in metrics], np.float64).reshape(-1, len(_VALUES)),
        }
        if statistics.held_out_misclassifications is not None:
            arrays["misclassified"], arrays["frequency"] = statistics.held_out_misclassifications.merged()
        if statistics.margin_in is not None and statistics.margin_out is not None:
            arrays |= {"margin_in": statistics.margin_in, "margin_out": statistics.margin_out}
        if statistics.soft is not None and packed.test_score is not None:
            arrays |= vars(statistics.soft) | {"test_score": packed.test_score}
        if statistics.by_epoch:
            arrays["epoch"] = np.array(list(statistics.by_epoch), np.int64)
            arrays["by_epoch"] = np.stack(list(statistics.by_epoch.values()))
        np.savez(path, **arrays)

    @classmethod
    def read(cls, path: Path, n_train: int, n_test: int) -> Self:
        """Read the file.

        Args:
            path: of the file.
            n_train: n.
            n_test: q.

        Raises:
            ForeignObjectError: it is damaged, of another schema, or of a dataset of another size.
        """
        try:
            return cls._from_arrays(read_archive(path), n_train, n_test)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, MemoryError, zipfile.BadZipFile) as error:
            raise ForeignObjectError(f"the snapshot is damaged or of another version ({error})") from None

    @classmethod
    def _from_arrays(cls, arrays: dict[str, npt.NDArray[Any]], n_train: int, n_test: int) -> Self:
        header = json.loads(str(arrays["header"]))
        if header["schema"] != SCHEMA:
            raise ValueError(f"schema {header['schema']}, this memtail reads {SCHEMA}")

        def array(name: str, dtype: Any, *shape: int) -> npt.NDArray[Any]:
            if (arrays[name].dtype, arrays[name].shape) != (np.dtype(dtype), shape):
                raise ValueError(f"{name} is {arrays[name].dtype} {list(arrays[name].shape)}, expected is {np.dtype(dtype)} {list(shape)}")
            return arrays[name]

        t, b, w, k = len(arrays["trial"]), len(arrays["first"]), len(arrays["counted"]), len(arrays.get("misclassified", ()))
        scores_only = "train_score" in arrays
        packed = PackedTrials(
            array("membership", np.uint64, w, n_train),
            None if scores_only else array("train_correct", np.uint64, w, n_train),
            None if scores_only else array("test_correct", np.uint64, w, n_test),
            array("counted", np.uint64, w),
            array("test_score", np.uint64, PLANES, w, n_test) if scores_only or "test_score" in arrays else None,
            array("train_score", np.uint64, PLANES, w, n_train) if scores_only else None,
        )
        trials, diverged = array("trial", np.int64, t).tolist(), array("diverged", np.bool_, t).tolist()
        values = array("values", np.float64, t, len(_VALUES)).tolist()
        metrics = []
        for trial, flag, row in zip(trials, diverged, values, strict=True):
            recorded: dict[str, Any] = {name: None if math.isnan(value) else value for name, value in zip(_VALUES, row, strict=True)}
            metrics.append(TrialMetrics(trial, flag, **recorded))
        if packed.trials != sum(not entry.diverged for entry in metrics):
            raise ValueError("its trials are not those of its bits")
        misclassifications, margins, soft, by_epoch = None, None, None, {}
        if "misclassified" in arrays:
            misclassifications = Misclassifications(array("misclassified", np.int64, k), array("frequency", np.int32, k))
        if "margin_in" in arrays:
            margins = array("margin_in", np.int64, n_train), array("margin_out", np.int64, n_train)
        if packed.test_score is not None:
            soft = SoftSums(*(array(field.name, np.int64, n_train) for field in fields(SoftSums)))
        elif w == 0:  # no trial counts yet
            soft = SoftSums.zeros(n_train)
        if "epoch" in arrays:
            epochs = array("epoch", np.int64, len(arrays["epoch"])).tolist()
            by_epoch = dict(zip(epochs, array("by_epoch", np.int64, len(epochs), 2, n_train), strict=True))
        shards = map(Shard, array("first", np.int64, b).tolist(), array("last", np.int64, b).tolist())
        batches = dict(zip(shards, (tag.decode() for tag in arrays["tag"].tolist()), strict=True))
        statistics = Statistics.restored(packed, metrics, misclassifications, margins, soft, by_epoch)
        statistics.conditions = _CONDITIONS.validate_python(header["conditions"])
        return cls(str(header["fingerprint"]), statistics, batches)
