"""Trial batches: what one shard of trials leaves behind, and its wire format (an uncompressed .npz that plain numpy reads).

Schema 1: `trial` int32 [k]; `membership`, `train_correct` uint8 [k, ceil(n/8)] and `test_correct` uint8 [k, ceil(q/8)], packed in
numpy's little bit order; `train_mistakes` uint16 [w], the classes given to the training examples that were got wrong, trial by trial in
the order of the examples, diverged trials left out (missing in batches of memtail's first versions); with margins recorded `train_margin`
float16 [k, n] and `test_margin` float16 [k, q]; `shape` int64 [2] (n, q); `metrics` (a list with one entry per trial) and `provenance` as
JSON text.
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

SCHEMA = 1

Bits = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Shard:
    """The consecutive trials `first` to `last`, both inclusive: the unit of work."""

    first: int
    last: int

    @property
    def trials(self) -> range:
        """The trials' indices."""
        return range(self.first, self.last + 1)

    @property
    def span(self) -> str:
        """`FIRST-LAST`."""
        return f"{self.first}-{self.last}"

    def __str__(self) -> str:
        return f"trials {self.span}"


@dataclass(frozen=True)
class TrialMetrics:
    """How one trial came out. Accuracies are fractions; `loss` is the mean training loss of the last epoch (None if not finite)."""

    trial: int
    diverged: bool
    loss: float | None
    in_subset_accuracy: float
    held_out_accuracy: float | None
    test_accuracy: float


@dataclass(frozen=True)
class Provenance:
    """Origin of a trial batch; what is None is left out of the batch.

    Attributes:
        fingerprint: of the experiment.
        memtail, torch, python: versions of the software.
        host: name of the machine.
        device: name of the device.
        started: ISO 8601, UTC.
        seconds: wall-clock time of the shard.
        phases: seconds by phase of the training, of profiled shards.
    """

    fingerprint: str | None = None
    memtail: str | None = None
    torch: str | None = None
    python: str | None = None
    host: str | None = None
    device: str | None = None
    started: str | None = None
    seconds: float | None = None
    phases: dict[str, float] | None = None

    def to_json(self) -> str:
        """The text in a batch: an object with sorted keys."""
        return json.dumps({name: value for name, value in asdict(self).items() if value is not None}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the text; unknown keys are ignored.

        Raises:
            ValueError: the text is no JSON object.
        """
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("its provenance is no JSON object")
        return cls(**{field.name: content[field.name] for field in fields(cls) if field.name in content})


@dataclass(frozen=True)
class TrialBatch:
    """The outcome of k trials on n training and q test examples. Immutable; arrays as in the module's schema."""

    trial: npt.NDArray[np.int32]
    membership: Bits
    train_correct: Bits
    test_correct: Bits
    n_train: int
    n_test: int
    metrics: Sequence[TrialMetrics]
    provenance: Provenance = Provenance()
    train_margin: npt.NDArray[np.float16] | None = None
    test_margin: npt.NDArray[np.float16] | None = None
    train_mistakes: npt.NDArray[np.uint16] | None = None

    def __post_init__(self) -> None:
        k = len(self.trial)
        expected = {
            "membership": (k, -(-self.n_train // 8)),
            "train_correct": (k, -(-self.n_train // 8)),
            "test_correct": (k, -(-self.n_test // 8)),
            "train_margin": (k, self.n_train),
            "test_margin": (k, self.n_test),
        }
        for name, shape in expected.items():
            array = getattr(self, name)
            kind = np.float16 if name.endswith("margin") else np.uint8
            if array is not None and (array.shape != shape or array.dtype != kind):
                raise ForeignObjectError(
                    f"trial batch: {name} is {array.dtype} {list(array.shape)}, expected is {np.dtype(kind)} {list(shape)}"
                )
        if [entry.trial for entry in self.metrics] != self.trial.tolist():
            raise ForeignObjectError(f"trial batch: its metrics are not those of its {k} trials")
        self._check_mistakes()

    def _check_mistakes(self) -> None:
        if self.train_mistakes is None:
            return
        array, wrong = self.train_mistakes, int(self.mistaken().sum())
        if array.shape != (wrong,) or array.dtype != np.uint16:
            raise ForeignObjectError(f"trial batch: train_mistakes is {array.dtype} {list(array.shape)}, expected is uint16 [{wrong}]")

    def mistaken(self) -> npt.NDArray[np.bool_]:
        """Bool [k, n]: the training examples whose classes are in `train_mistakes`."""
        diverged = np.array([entry.diverged for entry in self.metrics], np.bool_)
        return ~unpack(self.train_correct, self.n_train) & ~diverged[:, None]

    @property
    def shard(self) -> Shard:
        """The span of its trials."""
        return Shard(int(self.trial[0]), int(self.trial[-1]))

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the experiment that it belongs to."""
        return self.provenance.fingerprint or ""

    def to_bytes(self) -> bytes:
        """The batch in its wire format; equal batches give equal bytes."""
        arrays: dict[str, Any] = {
            "schema": np.int64(SCHEMA),
            "trial": self.trial,
            "membership": self.membership,
            "train_correct": self.train_correct,
            "test_correct": self.test_correct,
            "shape": np.array([self.n_train, self.n_test], dtype=np.int64),
            "metrics": json.dumps([asdict(entry) for entry in self.metrics]),
            "provenance": self.provenance.to_json(),
        }
        if self.train_mistakes is not None:
            arrays["train_mistakes"] = self.train_mistakes
        if self.train_margin is not None and self.test_margin is not None:
            arrays |= {"train_margin": self.train_margin, "test_margin": self.test_margin}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "trial batch") -> "TrialBatch":
        """Read the wire format.

        Raises:
            ForeignObjectError: the bytes are truncated, corrupt or of a schema this version does not know; names `source`.
        """
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as entries:
                if sum(entry.file_size for entry in entries.infolist()) > len(data):
                    raise ValueError("it would grow when it is unpacked")
            with np.load(io.BytesIO(data), allow_pickle=False) as archive:
                arrays = dict(archive)
            schema = int(arrays.pop("schema"))
            if schema != SCHEMA:
                raise ForeignObjectError(f"{source}: is of schema {schema}, this memtail reads {SCHEMA}: use the memtail that wrote it")
            n_train, n_test = (int(size) for size in arrays.pop("shape"))
            metrics = [TrialMetrics(**entry) for entry in json.loads(str(arrays.pop("metrics")))]
            provenance = Provenance.from_json(str(arrays.pop("provenance")))
            return cls(n_train=n_train, n_test=n_test, metrics=metrics, provenance=provenance, **arrays)
        except ForeignObjectError:
            raise
        except Exception as error:  # whatever hostile bytes make the parsers raise
            raise ForeignObjectError(f"{source}: is truncated or corrupt ({error}): delete it, then run again") from None


def largest_batch(trials: int, n_train: int, n_test: int) -> int:
    """Bytes that a batch may have at most: everything recorded, and a page of text for each trial."""
    return trials * (5 * (n_train + n_test) + 4096) + (1 << 20)


def pack(bits: npt.NDArray[np.bool_]) -> Bits:
    """Bool [k, n] -> uint8 [k, ceil(n/8)], little bit order, padded with zeros."""
    return np.packbits(bits, axis=1, bitorder="little")


def unpack(packed: Bits, count: int) -> npt.NDArray[np.bool_]:
    """uint8 [k, ceil(count/8)] -> bool [k, count]; the inverse of `pack`."""
    return np.unpackbits(packed, axis=1, count=count, bitorder="little").view(np.bool_)
