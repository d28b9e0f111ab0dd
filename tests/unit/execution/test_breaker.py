"""Errors that the first shards of an experiment have in common."""

from memtail.execution.breaker import common_error


def test_errors_alike_but_for_numbers_are_common_from_the_given_number_on():
    errors = ["KeyError: 3", "ValueError: no image 17", "KeyError: 12", "KeyError: 0"]
    assert common_error(errors, 3) == "KeyError: 3"
    assert common_error(errors, 4) is None
    assert common_error([], 1) is None
