"""Coverage of the intervals, by the benchmark's own functions on fewer draws, and the formulas of the intervals that were not chosen."""

import numpy as np
import pytest

from memtail.confidence import Z
from tests.benchmarks import coverage


@pytest.fixture(scope="module", params=["uniform", "balanced"])
def drawn(request):
    ((_, result),) = coverage.estimates(request.param, (64,), 40)
    return result


def test_intervals_of_64_trials_hold_the_truth_as_often_as_they_say(drawn):
    ours = coverage.coverage(coverage.agresti_caffo, drawn)
    assert coverage.MEAN[0] <= ours.mean <= coverage.MEAN[1]
    assert ours.lowest >= coverage.LOWEST
    assert ours.lowest_end >= coverage.LOWEST
    from_observed_rates = coverage.coverage(coverage.plug_in, drawn)
    assert from_observed_rates.lowest < coverage.LOWEST
    assert from_observed_rates.lowest_end < 0.7


def test_standard_errors_are_near_the_true_ones(drawn):
    ratios = coverage.error_ratios(drawn)
    assert 0.9 < ratios.min() < 1
    assert 1 < ratios.max() < 1.3


def test_newcombes_interval_is_the_published_one():
    # Newcombe (1998), table II, method 10: contrasts 56/70 - 48/80, 9/10 - 3/10, 10/10 - 0/20
    published = [(0.0524, 0.3339), (0.1705, 0.8090), (0.6791, 1.0)]
    p_in, k_in = np.array([56 / 70, 0.9, 1.0]), np.array([70, 10, 10])
    p_out, k_out = np.array([48 / 80, 0.3, 0.0]), np.array([80, 10, 20])
    np.testing.assert_allclose(np.transpose(coverage.newcombe_interval(p_in, k_in, p_out, k_out)), published, atol=6e-5)
    # 31 of 45 and 4 of 19, 640 of 700 and 150 of 300, by confint_proportions_2indep(..., method="newcomb") of statsmodels 0.15
    ends = coverage.newcombe_interval(np.array([31 / 45, 640 / 700]), np.array([45, 700]), np.array([4 / 19, 0.5]), np.array([19, 300]))
    np.testing.assert_allclose(ends, [[0.212227, 0.353518], [0.649105, 0.473485]], atol=1e-6)


@pytest.mark.parametrize(
    ("counts", "published"), [((56, 70, 48, 80), (0.0528, 0.3382)), ((9, 10, 3, 10), (0.1700, 0.8406)), ((10, 10, 0, 20), (0.7156, 1.0))]
)
def test_the_score_of_miettinen_and_nurminen_is_that_of_a_95_percent_interval_at_its_published_ends(counts, published):
    # Newcombe (1998), table II, method 6
    correct_in, k_in, correct_out, k_out = map(float, counts)
    low, high = (
        float(coverage.miettinen_nurminen_score(correct_in / k_in, k_in, correct_out / k_out, k_out, np.float64(end))) for end in published
    )
    assert low == pytest.approx(Z, abs=2e-3)
    if published[1] < 1:
        assert high == pytest.approx(-Z, abs=2e-3)


def test_kept_pairs_are_hardly_ever_false_and_those_of_thresholds_alone_mostly():
    null, planted = (coverage.discoveries("balanced", 128, influenced, 12) for influenced in (0, 20))
    assert null.false <= 0.2  # of 12 draws, nominally one in twenty has a false pair
    assert planted.false <= coverage.RATE
    assert planted.found > 0.5
    assert min(null.fixed, planted.fixed) > 0.7
