"""Overlap of two runs, from the halves of one, and the trials that an overlap needs."""

from itertools import combinations

import numpy as np
import pytest

from memtail.estimators.overlap import (
    SPLITS,
    Needed,
    Overlaps,
    expected_pair_overlap,
    halves,
    jaccard,
    pair_selection,
    sizes,
    trials_for_overlap,
)
from memtail.statistics import Statistics
from tests.support.planted import PlantedPairs

LABELS = PlantedPairs.train_labels, PlantedPairs.test_labels


def statistics_of(*batches):
    statistics = Statistics(*PlantedPairs.size)
    for batch in batches:
        statistics.accumulate(batch)
    return statistics.packed()


def test_halves_are_disjoint_and_those_of_equal_trials_in_any_order():
    world = PlantedPairs(0)
    first, second = world.batch(0, 40), world.batch(40, 30)
    packed, other = (statistics_of(*batches) for batches in ((first, second), (second, first)))
    one, two = halves(packed, 30, 1)
    assert (one.trials, two.trials) == (30, 30)
    assert not np.intersect1d(one.counted_trials, two.counted_trials).size
    assert [half.counted_trials.tolist() for half in halves(other, 30, 1)] == [one.counted_trials.tolist(), two.counted_trials.tolist()]
    assert halves(packed, 30, 2)[0].counted_trials.tolist() != one.counted_trials.tolist()
    assert expected_pair_overlap(packed, *LABELS) == expected_pair_overlap(other, *LABELS)


def test_the_overlap_expected_from_one_run_is_that_of_two():
    runs = [PlantedPairs(seed).statistics(120).packed() for seed in range(4)]
    chosen = [pair_selection(run, *LABELS) for run in runs]
    measured = np.mean([jaccard(one, other) for one, other in combinations(chosen, 2)])
    assert np.mean([expected_pair_overlap(run, *LABELS) for run in runs]) == pytest.approx(measured, abs=0.05)


@pytest.mark.parametrize("trials", [0, 1, 3, 100])
def test_without_any_pair_there_is_no_overlap(trials):
    assert expected_pair_overlap(PlantedPairs(0, effect=0.0).statistics(trials).packed(), *LABELS) == 0


def test_overlaps_are_jaccard_coefficients():
    assert jaccard(np.array([3, 1, 7]), np.array([7, 3])) == pytest.approx(2 / 3)
    assert jaccard(np.array([3]), np.array([], np.int64)) == 0
    assert jaccard(np.array([], np.int64), np.array([], np.int64)) is None


def test_halves_are_measured_down_to_fifty_trials():
    assert sizes(99) == []
    assert sizes(100) == [50]
    assert sizes(1000) == [500, 250, 125, 62]


@pytest.mark.parametrize(
    ("overlaps", "overlap", "needed"),
    [
        ({800: 0.95, 400: 0.93, 200: 0.7}, 0.9, Needed(400, measured=True)),
        ({800: 0.95, 400: 0.952}, 0.9, Needed(400, measured=True)),
        ({800: 1.0, 400: 1.0, 200: 0.9}, 0.95, Needed(400, measured=True)),
        ({800: 0.5, 400: 0.95}, 0.9, Needed(beyond=6400)),  # the overlap falls with more trials
        ({800: 0.8, 400: 0.6, 200: 0.2}, 0.9, Needed(1600, None, 1600, 1600)),  # 1 - J halves as t doubles
        ({400: [0.5, 0.6, 0.6, 0.6, 0.7], 200: [0.0, 0.2, 0.2, 0.2, 0.4]}, 0.8, Needed(800, None, 600, 1000)),
        ({800: 0.31, 400: 0.3}, 0.9, Needed(beyond=6400)),
        ({800: 0.5}, 0.9, Needed()),
        ({800: None, 400: None}, 0.9, Needed()),
    ],
)
def test_trials_for_an_overlap_are_measured_or_extrapolated_by_a_power_law(overlaps, overlap, needed):
    measured = [Overlaps(trials, each if isinstance(each, list) else [each] * SPLITS) for trials, each in overlaps.items()]
    estimate = trials_for_overlap(overlap, measured)
    assert (estimate.measured, estimate.beyond) == (needed.measured, needed.beyond)
    for own, expected in zip((estimate.trials, estimate.fewest, estimate.most), (needed.trials, needed.fewest, needed.most), strict=True):
        assert own is expected is None or own == pytest.approx(expected, abs=1)
