"""Distribution of tests over the processes of pytest-xdist."""

import pytest

from tests.conftest import pytest_runtest_logreport


@pytest.mark.xdist_group("together")
def test_pytest_xdist_is_told_the_group_of_a_test(request):
    """It is told by the end of the id, and only in its own processes."""
    assert request.node.nodeid.endswith("@together") or not hasattr(request.config, "workerinput")


@pytest.mark.parametrize("name", ["a.py::test_a", "a.py::test_a[x@y]", "tests/a.py::TestA::test_a[0.0-False]"])
def test_reports_name_tests_as_a_run_without_pytest_xdist_does(name, monkeypatch):
    """A run of `--last-failed` in one process would else not find them, and pass without them."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    for group in ("", "@living", "@integration/test_a.py"):
        report = pytest.TestReport(name + group, ("a.py", 0, "a"), {}, "failed", None, "call")
        pytest_runtest_logreport(report)
        assert report.nodeid == name
