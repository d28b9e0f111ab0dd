"""Trial batches of random outcomes."""

from typing import Any

import numpy as np

from memtail.experiment_store import ExperimentStore
from memtail.trials import Provenance, Shard, TrialBatch, TrialMetrics, pack

Bits = np.ndarray[Any, Any]


def random_bits(seed: int, t: int, n: int, q: int) -> tuple[Bits, Bits, Bits]:
    """Return M, C and T of t random trials."""
    rng = np.random.default_rng(seed)
    # some examples are always in or always out, so that k_out or k_in is 0
    M = rng.random((t, n)) < rng.choice([0.0, 0.5, 0.7, 1.0], n, p=[0.1, 0.4, 0.4, 0.1])
    return M, rng.random((t, n)) < 0.6, rng.random((t, q)) < 0.6


def batch_of(
    first: int, M: Bits, C: Bits, T: Bits, diverged: tuple[int, ...] = (), margins: Bits | None = None, predicted: Bits | None = None
) -> TrialBatch:
    """Make a batch of trials from `first` on; with `predicted` [t, n], the predicted classes, it also records misclassifications."""
    trials = np.arange(first, first + len(M), dtype=np.int32)
    metrics = [TrialMetrics(int(k), int(k) in diverged, 0.0, 1.0, 1.0, 1.0) for k in trials]
    mistakes = None if predicted is None else predicted[~C & ~np.isin(trials, list(diverged))[:, None]].astype(np.uint16)
    return TrialBatch(
        trials,
        pack(M),
        pack(C),
        pack(T),
        M.shape[1],
        T.shape[1],
        metrics,
        Provenance(),
        margins,
        None if margins is None else T.astype(np.float16),
        mistakes,
    )


def random_batch(
    k: int = 3, n: int = 13, q: int = 5, seed: int = 0, margins: bool = False, mistakes: bool = True
) -> tuple[TrialBatch, list[Bits]]:
    """Return a batch of trials 10 to 9 + k, and its M, C and T; with `margins` it also records scores."""
    rng = np.random.default_rng(seed)
    bits = [rng.random((k, size)) < 0.5 for size in (n, n, q)]
    metrics = [TrialMetrics(trial, False, 0.5, 1.0, None, 0.75) for trial in range(10, 10 + k)]
    train, test = (rng.normal(size=(k, size)).astype(np.float16) if margins else None for size in (n, q))
    scores = [rng.integers(0, 256, (k, size), np.uint8) if margins else None for size in (n, q)]
    wrong = rng.integers(0, 300, (~bits[1]).sum(), np.uint16) if mistakes else None
    packed = (pack(bits[0]), pack(bits[1]), pack(bits[2]))
    trial = np.arange(10, 10 + k, dtype=np.int32)
    return TrialBatch(trial, *packed, n, q, metrics, Provenance("f"), train, test, wrong, *scores), bits


def commit(experiment_store: ExperimentStore, *shards: Shard, diverged: bool = False) -> None:
    """Commit random trials."""
    record = experiment_store.read_record()
    for shard in shards:
        rng = np.random.default_rng(shard.first)
        count = len(shard.trials)
        members, train, test = (pack(rng.random((count, size)) < 0.5) for size in (record.n_train, record.n_train, record.n_test))
        metrics = [TrialMetrics(trial, diverged, 0.1, 1.0, 0.5, 0.75) for trial in shard.trials]
        trial, provenance = np.array(shard.trials, np.int32), Provenance(record.fingerprint)
        experiment_store.commit(
            TrialBatch(trial, members, train, test, record.n_train, record.n_test, metrics, provenance), record.fingerprint
        )
