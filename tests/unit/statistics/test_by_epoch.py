"""Outcomes after some epochs: exact sums in any order, of the epochs that all trials have recorded."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
