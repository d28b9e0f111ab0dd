"""Outcomes after some epochs: exact sums in any order, of the epochs that all trials have recorded."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtail.estimators.memorization import from_counts
from memtail.explorer.opened import Opened
from memtail.explorer.views import _by_epoch
from memtail.scores.files import _write_snapshots
from memtail.statistics import Statistics
from memtail.trials import pack
from tests.support.batches import batch_of, random_bits

N, Q, T = 21, 5, 70


def batches(epochs=(2, 5), diverged=()):
    """Return batches of one trial each, and M [t, n] and the outcomes by epoch [e, t, n]."""
    M, C, test = random_bits(1, T, N, Q)
    outcomes = np.random.default_rng(2).random((len(epochs), T, N)) < 0.5
    made = []
    for k in range(T):
        batch = batch_of(k, M[k : k + 1], C[k : k + 1], test[k : k + 1], diverged=diverged)
        packed = np.stack([pack(outcomes[e, k : k + 1]) for e in range(len(epochs))])
        made.append(replace(batch, snapshot_epochs=np.array(epochs, np.int32), snapshot_correct=packed))
    return made, M, outcomes


def accumulated(made):
    statistics = Statistics(N, Q)
    for batch in made:
        statistics.accumulate(batch)
    return statistics


@given(order=st.permutations(range(T)))
@settings(max_examples=10, deadline=None)
def test_sums_are_those_of_the_counted_trials_in_any_order(order):
    made, M, outcomes = batches(diverged=(3, 64))
    counted = [k for k in range(T) if k not in (3, 64)]
    statistics = accumulated([made[k] for k in order])
    assert list(statistics.by_epoch) == [2, 5]
    for e, sums in enumerate(statistics.by_epoch.values()):
        assert (sums[0] == (M & outcomes[e])[counted].sum(0)).all()
        assert (sums[1] == outcomes[e][counted].sum(0)).all()
    assert statistics.digest() == accumulated(made).digest()


@pytest.mark.parametrize("place", [0, 40, T - 1])
def test_an_epoch_that_a_trial_has_not_recorded_is_left_out(place):
    made, _, _ = batches()
    less = replace(made[place], snapshot_epochs=made[place].snapshot_epochs[:1], snapshot_correct=made[place].snapshot_correct[:1])
    assert list(accumulated([*made[:place], less, *made[place + 1 :]]).by_epoch) == [2]
    none = replace(made[place], snapshot_epochs=None, snapshot_correct=None)
    assert accumulated([*made[:place], none, *made[place + 1 :]]).by_epoch == {}


def test_another_outcome_of_an_epoch_makes_another_digest():
    made, _, _ = batches()
    other = replace(made[7], snapshot_correct=made[7].snapshot_correct ^ np.uint8(1))
    assert accumulated(made).digest() != accumulated([*made[:7], other, *made[8:]]).digest()


@pytest.fixture
def published(tmp_path):
    """Memorization by epoch as it is published: statistics, the file, and what the explorer opens."""
    statistics = accumulated(batches()[0])
    _write_snapshots(tmp_path / "snapshots.parquet", statistics)
    table = pyarrow.parquet.read_table(tmp_path / "snapshots.parquet")
    columns = {name: table[name].to_numpy() for name in table.column_names}
    scores = SimpleNamespace(snapshots=columns, selected_pairs=None, statistics=statistics.packed(), summary=SimpleNamespace(n_train=N))
    return statistics, tmp_path / "snapshots.parquet", Opened(None, scores, None, "")


def test_memorization_by_epoch_is_published_one_epoch_at_a_time(published):
    statistics, path, opened = published
    assert pyarrow.parquet.ParquetFile(path).num_row_groups == 2
    table = opened.scores.snapshots
    assert table["epoch"].dtype == np.int32
    np.testing.assert_array_equal(table["index"], np.tile(np.arange(N), 2))
    np.testing.assert_array_equal(table["epoch"], np.repeat([2, 5], N))
    for epoch, (correct_in, correct) in statistics.by_epoch.items():
        mem = from_counts(statistics.k_in, statistics.k_out, correct_in, correct - correct_in)
        np.testing.assert_array_equal(table["mem"][table["epoch"] == epoch], mem.value)
        np.testing.assert_array_equal(table["mem_se"][table["epoch"] == epoch], mem.standard_error)
        for column, ends in zip(("mem_lo", "mem_hi"), mem.interval, strict=True):
            np.testing.assert_array_equal(table[column][table["epoch"] == epoch], ends)


def test_the_explorer_finds_the_rows_of_an_example_and_counts_the_bytes_of_all(published):
    _, _, opened = published
    table = opened.scores.snapshots
    for example in (0, 7, N - 1):
        rows = np.flatnonzero(table["index"] == example)
        np.testing.assert_array_equal(_by_epoch(opened, example), np.stack([table[name][rows] for name in ("epoch", "mem", "mem_se")], 1))
    size = opened.size
    opened.scores.snapshots = None
    assert size - opened.size == sum(column.nbytes for column in table.values()) == 2 * N * 44
    assert _by_epoch(opened, 0) == []
