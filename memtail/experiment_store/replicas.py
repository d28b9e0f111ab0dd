"""Replicas: second trainings of committed shards, compared with the batches that count."""

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

from memtail.trials import Provenance, Shard, TrialBatch


@dataclass(frozen=True)
class Replica:
    """Comparison of two trainings of a shard. Equal trials give equal bits on devices of one kind, with one version of torch.

    Attributes:
        shard: the shard.
        trials: number of trials that differ: in a bit, a margin, a score or a predicted class.
        bits: number of different bits of membership and correctness.
        margins: number of different margins and scores.
        committed: origin of the committed batch.
        replica: origin of the other one, which is not kept.
        when: time in UTC, ISO 8601.
    """

    shard: Shard
    trials: int
    bits: int
    margins: int
    committed: Provenance
    replica: Provenance
    when: str

    @property
    def differs(self) -> bool:
        """Whether the two trainings gave different outcomes."""
        return self.trials > 0

    @property
    def alike(self) -> bool:
        """Whether both were trained on one kind of device with one version of torch, so that they should be equal."""
        return _conditions(self.committed) == _conditions(self.replica)

    def __str__(self) -> str:
        verdict = f"differ in {self.trials} trials, {self.bits} bits" if self.differs else "are equal"
        places = f"{_place(self.committed)} (counts) and {_place(self.replica)}"
        return f"{self.shard}: two trainings {verdict}: on {places}"


def unverified(fingerprint: str, share: float, committed: Iterable[Shard], trained_twice: Collection[Shard]) -> list[Shard]:
    """List the shards that are to be trained a second time (`execution.verify`) and have not been.

    Args:
        fingerprint: of the experiment; it decides which shards are chosen, so that all processes choose the same.
        share: of the shards.
        committed: the shards with a trial batch.
        trained_twice: the shards with a comparison.
    """
    return [shard for shard in committed if shard not in trained_twice and _is_chosen(fingerprint, shard, share)]


def _is_chosen(fingerprint: str, shard: Shard, share: float) -> bool:
    digest = hashlib.sha256(f"{fingerprint} {shard.span}".encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


def compare(committed: TrialBatch, replica: TrialBatch) -> Replica:
    """Compare a training of a shard with its committed batch, which has the same trials."""
    bits = _differences(committed, replica, "membership", "train_correct", "test_correct") + _differences_by_epoch(committed, replica)
    margins = _differences(committed, replica, "train_margin", "test_margin", "train_score", "test_score")
    predicted = np.zeros(len(bits), np.bool_)
    if (ours := committed.mistakes()) is not None and (theirs := replica.mistakes()) is not None:
        predicted[:] = [not np.array_equal(one, other) for (_, one), (_, other) in zip(ours, theirs, strict=True)]
    return Replica(
        committed.shard,
        int(((bits > 0) | (margins > 0) | predicted).sum()),
        int(bits.sum()),
        int(margins.sum()),
        committed.provenance,
        replica.provenance,
        datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _differences(one: TrialBatch, other: TrialBatch, *names: str) -> npt.NDArray[np.int64]:
    """Count the different bits, or different numbers, of each trial; arrays that a batch lacks are not compared."""
    count = np.zeros(len(one.trial), np.int64)
    for name in names:
        first, second = getattr(one, name), getattr(other, name)
        if first is not None and second is not None:
            # as integers, in which NaN equals itself
            changed = first.view(f"u{first.itemsize}") ^ second.view(f"u{second.itemsize}")
            numbers = name.endswith(("_margin", "_score"))
            count += (changed != 0 if numbers else np.bitwise_count(changed)).sum(1, dtype=np.int64)
    return count


def _differences_by_epoch(one: TrialBatch, other: TrialBatch) -> npt.NDArray[np.int64]:
    """Count the different bits of each trial after the epochs that both batches have."""
    count = np.zeros(len(one.trial), np.int64)
    first, second = _by_epoch(one), _by_epoch(other)
    for epoch in first.keys() & second.keys():
        count += np.bitwise_count(first[epoch] ^ second[epoch]).sum(1, dtype=np.int64)
    return count


def _by_epoch(batch: TrialBatch) -> dict[int, npt.NDArray[np.uint8]]:
    if batch.snapshot_epochs is None or batch.snapshot_correct is None:
        return {}
    return dict(zip(batch.snapshot_epochs.tolist(), batch.snapshot_correct, strict=True))


def _conditions(origin: Provenance) -> tuple[str, str | None]:
    return origin.kind, origin.torch


def _place(origin: Provenance) -> str:
    return f"{origin.host or 'an unknown host'} ({origin.kind}, torch {origin.torch}, memtail {origin.memtail})"
