"""Distribution of tests over the processes of pytest-xdist."""

import pytest


@pytest.mark.xdist_group("together")
def test_pytest_xdist_is_told_the_group_of_a_test(request):
    """It is told by the end of the id, and only in its own processes."""
    assert request.node.nodeid.endswith("@together") or not hasattr(request.config, "workerinput")
