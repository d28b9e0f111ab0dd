"""Trial batches, the outcomes of one shard of trials, and their wire format: an uncompressed .npz that plain numpy reads.

Schema 1, for k trials on n training and q test examples:

* `schema` int64 and `shape` int64 [2], which is (n, q).
* `trial` int32 [k], the trials' indices.
* `membership`, `train_correct` uint8 [k, ceil(n/8)] and `test_correct` uint8 [k, ceil(q/8)], bits packed in numpy's little order.
  The latter two are missing where only scores are recorded.
* `train_mistakes` uint16 [w], the predicted classes of the misclassified training examples, trial by trial in the order of the examples,
  without diverged trials. Batches of memtail's first versions lack it.
* `train_margin` float16 [k, n] and `test_margin` float16 [k, q], where margins are recorded.
* `train_score` uint8 [k, n] and `test_score` uint8 [k, q], scores in 255ths, where scores are recorded.
* `snapshot_epochs` int32 [s] and `snapshot_correct` uint8 [s, k, ceil(n/8)], packed as `train_correct`: outcomes after s epochs, ascending,
  where they are recorded.
* `metrics`, a list of one object per trial, and `provenance`, an object, both as JSON text.
"""

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from memtail.errors import ForeignObjectError
from memtail.numpy_files import read_archive

SCHEMA = 1

_UNKNOWN = "unknown"

Bits = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Shard:
    """The consecutive trials `first` to `last`, both included: the unit of work."""

    first: int
    last: int

    @property
    def trials(self) -> range:
        """Indices of the trials."""
        return range(self.first, self.last + 1)

    @property
    def span(self) -> str:
        """The text `FIRST-LAST`."""
        return f"{self.first}-{self.last}"

    def __str__(self) -> str:
        return f"trials {self.span}"


@dataclass(frozen=True)
class TrialMetrics:
    """Metrics of one trial.

    Attributes:
        trial: its index.
        diverged: whether its loss or an output is not finite; a diverged trial does not count.
        loss: mean training loss of the last epoch; None if not finite.
        in_subset_accuracy, held_out_accuracy, test_accuracy: fractions of the training examples inside and outside its subset and of the
            test examples that are classified correctly; mean scores where only scores are recorded. None if no training example is outside,
            or there is no test set.
        further: numbers that training code of the user's own returned; written only where there are any.
    """

    trial: int
    diverged: bool
    loss: float | None
    in_subset_accuracy: float
    held_out_accuracy: float | None
    test_accuracy: float | None
    further: dict[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The entry in a batch."""
        return {name: value for name, value in asdict(self).items() if name != "further" or value}


@dataclass(frozen=True)
class Provenance:
    """Origin of a trial batch; what is None is left out of the batch.

    Attributes:
        fingerprint: of the experiment.
        memtail, torch, python: versions of the software.
        host: name of the machine.
        device: name of the device.
        cpu: kind of processor: its model, and the instructions that torch uses on it.
        devices: kinds of all devices in the order of use, of a shard that was resumed on another one.
        started: ISO 8601, UTC.
        seconds: wall-clock time of the shard.
        phases: seconds by phase of the training; none of training code of the user's own.
        compared: labels and ids that training code of the user's own returned with every outcome, and that were the dataset's.
    """

    fingerprint: str | None = None
    memtail: str | None = None
    torch: str | None = None
    python: str | None = None
    host: str | None = None
    device: str | None = None
    cpu: str | None = None
    devices: tuple[str, ...] | None = None
    started: str | None = None
    seconds: float | None = None
    phases: dict[str, float] | None = None
    compared: tuple[str, ...] | None = None

    @property
    def kind(self) -> str:
        """Device and processor. Equal trials have equal bits on devices of one kind, with one version of torch."""
        return ", ".join(str(part) for part in (self.device, self.cpu) if part) or _UNKNOWN

    def conditions(self) -> dict[str, str]:
        """Return what the bits may depend on beside the experiment: the devices, and the versions of torch and memtail."""
        device = ", then ".join(map(str, self.devices or [self.kind]))
        return {"device": device, "torch": str(self.torch or _UNKNOWN), "memtail": str(self.memtail or _UNKNOWN)}

    def to_json(self) -> str:
        """The text in a batch: an object with sorted keys."""
        return json.dumps({name: value for name, value in asdict(self).items() if value is not None}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the text; unknown keys are ignored.

        Raises:
            ValueError: the text is not a JSON object.
        """
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("its provenance is not a JSON object")
        known = {field.name: content[field.name] for field in fields(cls) if field.name in content}
        return cls(**known | {name: tuple(known[name]) for name in ("devices", "compared") if known.get(name)})


@dataclass(frozen=True)
class TrialBatch:
    """The outcomes of k trials on n training and q test examples; immutable.

    Attributes:
        trial, membership, train_correct, test_correct, train_margin, test_margin, train_mistakes, train_score, test_score, snapshot_epochs,
            snapshot_correct: arrays of the module's schema.
        n_train, n_test: n and q.
        metrics: of each trial, in the order of `trial`.
        provenance: of the batch.

    Raises:
        ForeignObjectError: an array has another shape or type, there is neither correctness nor a score, or the metrics belong to other
            trials.
    """

    trial: npt.NDArray[np.int32]
    membership: Bits
    train_correct: Bits | None
    test_correct: Bits | None
    n_train: int
    n_test: int
    metrics: Sequence[TrialMetrics]
    provenance: Provenance = Provenance()
    train_margin: npt.NDArray[np.float16] | None = None
    test_margin: npt.NDArray[np.float16] | None = None
    train_mistakes: npt.NDArray[np.uint16] | None = None
    train_score: npt.NDArray[np.uint8] | None = None
    test_score: npt.NDArray[np.uint8] | None = None
    snapshot_epochs: npt.NDArray[np.int32] | None = None
    snapshot_correct: Bits | None = None

    def __post_init__(self) -> None:
        k = len(self.trial)
        expected = {
            "membership": (k, -(-self.n_train // 8)),
            "train_correct": (k, -(-self.n_train // 8)),
            "test_correct": (k, -(-self.n_test // 8)),
            "train_margin": (k, self.n_train),
            "test_margin": (k, self.n_test),
            "train_score": (k, self.n_train),
            "test_score": (k, self.n_test),
        }
        for name, shape in expected.items():
            array = getattr(self, name)
            dtype = np.dtype(np.float16 if name.endswith("margin") else np.uint8)
            if array is not None and (array.shape != shape or array.dtype != dtype):
                raise ForeignObjectError(f"trial batch: {name} is {array.dtype} {list(array.shape)}, expected is {dtype} {list(shape)}")
        if self.scores_only and (self.train_score is None or self.test_score is None):
            raise ForeignObjectError("trial batch: it has neither correctness nor scores of both splits")
        if [entry.trial for entry in self.metrics] != self.trial.tolist():
            raise ForeignObjectError(f"trial batch: its metrics are not those of its {k} trials")
        self._check_mistakes()
        self._check_snapshots()

    def _check_mistakes(self) -> None:
        if self.train_mistakes is None:
            return
        array, count = self.train_mistakes, int(self.misclassified().sum())
        if array.shape != (count,) or array.dtype != np.uint16:
            raise ForeignObjectError(f"trial batch: train_mistakes is {array.dtype} {list(array.shape)}, expected is uint16 [{count}]")

    def _check_snapshots(self) -> None:
        epochs, correct = self.snapshot_epochs, self.snapshot_correct
        if epochs is None and correct is None:
            return
        if epochs is None or epochs.dtype != np.int32 or epochs.ndim != 1 or (np.diff(epochs) <= 0).any():
            raise ForeignObjectError("trial batch: snapshot_epochs is not int32 in ascending order")
        shape = (len(epochs), len(self.trial), -(-self.n_train // 8))
        if correct is None or correct.dtype != np.uint8 or correct.shape != shape:
            raise ForeignObjectError(f"trial batch: snapshot_correct is not uint8 {list(shape)}")

    @property
    def scores_only(self) -> bool:
        """Whether the trials have scores in place of correctness."""
        return self.train_correct is None or self.test_correct is None

    def correctness(self) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Return bool [k, n] and [k, q], whether each training and test example is classified correctly.

        Raises:
            ForeignObjectError: the trials have scores only.
        """
        if self.train_correct is None or self.test_correct is None:
            raise ForeignObjectError(f"{self.shard} have scores only, and correctness is needed: train them with record: {{scores: true}}")
        return unpack(self.train_correct, self.n_train), unpack(self.test_correct, self.n_test)

    def misclassified(self) -> npt.NDArray[np.bool_]:
        """Return bool [k, n], the places of the entries of `train_mistakes`: misclassified, in a trial that has not diverged."""
        diverged = np.array([entry.diverged for entry in self.metrics], np.bool_)
        return ~self.correctness()[0] & ~diverged[:, None]

    def mistakes(self) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.uint16]]] | None:
        """Return, of each trial, the indices of its misclassified training examples and the predicted classes; None if not recorded."""
        if self.train_mistakes is None:
            return None
        misclassified = self.misclassified()
        predicted = np.split(self.train_mistakes, np.cumsum(misclassified.sum(1))[:-1])
        return [(np.flatnonzero(row), classes) for row, classes in zip(misclassified, predicted, strict=True)]

    @property
    def shard(self) -> Shard:
        """The shard from the first to the last trial."""
        return Shard(int(self.trial[0]), int(self.trial[-1]))

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the experiment; empty if unknown."""
        return self.provenance.fingerprint or ""

    def to_bytes(self) -> bytes:
        """Write the wire format; equal batches give equal bytes."""
        arrays: dict[str, Any] = {
            "schema": np.int64(SCHEMA),
            "trial": self.trial,
            "membership": self.membership,
            **({} if self.scores_only else {"train_correct": self.train_correct, "test_correct": self.test_correct}),
            "shape": np.array([self.n_train, self.n_test], dtype=np.int64),
            "metrics": json.dumps([entry.to_dict() for entry in self.metrics]),
            "provenance": self.provenance.to_json(),
        }
        if self.train_mistakes is not None:
            arrays["train_mistakes"] = self.train_mistakes
        if self.train_margin is not None and self.test_margin is not None:
            arrays |= {"train_margin": self.train_margin, "test_margin": self.test_margin}
        if self.train_score is not None and self.test_score is not None:
            arrays |= {"train_score": self.train_score, "test_score": self.test_score}
        if self.snapshot_epochs is not None and self.snapshot_correct is not None:
            arrays |= {"snapshot_epochs": self.snapshot_epochs, "snapshot_correct": self.snapshot_correct}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "trial batch") -> "TrialBatch":
        """Read the wire format.

        Args:
            data: the bytes.
            source: where they come from, for error messages.

        Raises:
            ForeignObjectError: the bytes are truncated, corrupt, or of another schema.
        """
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as entries:
                if sum(entry.file_size for entry in entries.infolist()) > len(data):
                    raise ValueError("it would grow when it is unpacked")
            arrays = read_archive(data)
            schema = int(arrays.pop("schema"))
            if schema != SCHEMA:
                raise ForeignObjectError(f"{source}: is of schema {schema}, this memtail reads {SCHEMA}: use the memtail that wrote it")
            n_train, n_test = (int(size) for size in arrays.pop("shape"))
            metrics = [TrialMetrics(**entry) for entry in json.loads(str(arrays.pop("metrics")))]
            provenance = Provenance.from_json(str(arrays.pop("provenance")))
            correct = {"train_correct": None, "test_correct": None}
            return cls(n_train=n_train, n_test=n_test, metrics=metrics, provenance=provenance, **{**correct, **arrays})
        except ForeignObjectError:
            raise
        except Exception as error:  # hostile bytes make the parsers raise anything
            raise ForeignObjectError(f"{source}: is truncated or corrupt ({error}): delete it, then run again") from None


def largest_batch(trials: int, n_train: int, n_test: int) -> int:
    """Return the largest plausible size of a batch in bytes: all arrays of the schema, and a page of text per trial."""
    return trials * (10 * (n_train + n_test) + 4096) + (1 << 20)


def recorded_margins(values: npt.NDArray[Any]) -> npt.NDArray[np.float16]:
    """Round margins to float16, clipped to its range."""
    largest = float(np.finfo(np.float16).max)
    margins: npt.NDArray[np.float16] = np.clip(values, -largest, largest).astype(np.float16)
    return margins


def pack(bits: npt.NDArray[np.bool_]) -> Bits:
    """Pack bool [k, n] into uint8 [k, ceil(n/8)], in little bit order, padded with zeros."""
    return np.packbits(bits, axis=1, bitorder="little")


def unpack(packed: Bits, count: int) -> npt.NDArray[np.bool_]:
    """Unpack uint8 [k, ceil(count/8)] into bool [k, count], the inverse of `pack`."""
    return np.unpackbits(packed, axis=1, count=count, bitorder="little").view(np.bool_)
