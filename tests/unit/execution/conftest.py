"""Fixtures of the tests of execution."""

import pytest

from tests.unit.execution.test_aggregation import Trained


@pytest.fixture
def trained(tmp_path, declare, digits):
    """An experiment of two shards, both committed."""
    made = Trained(tmp_path / "store", declare, digits, 16)
    made.commit(0)
    made.commit(8)
    return made
