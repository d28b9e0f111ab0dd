"""Numbers as text."""

import math

import pytest

from memtail.figures.numbers import fixed, percent


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(0.125, 3, "0.125"), (-0.25, 2, "−0.25"), (-0.001, 2, "0.00"), (1234.5, 1, "1234.5"), (math.nan, 2, "none")],
)
def test_numbers_have_fixed_decimals_and_a_true_minus_sign(value, digits, text):
    assert fixed(value, digits) == text


@pytest.mark.parametrize(("share", "text"), [(0.0367, "3.67%"), (-0.5, "−50.00%"), (None, "–"), (math.nan, "–")])
def test_shares_are_formatted_as_percentages(share, text):
    assert percent(share, 2, "–") == text
