"""Generated table of values in the chart's README."""

import runpy
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[3]
CHART = PROJECT / "helm" / "memtail"


@pytest.fixture(scope="module")
def tool():
    return runpy.run_path(str(PROJECT / "tools" / "chart-values.py"))


def test_the_readme_is_up_to_date(tool):
    readme = (CHART / "README.md").read_text()
    assert readme == tool["with_table"](readme, (CHART / "values.yaml").read_text()), "run python tools/chart-values.py"


def test_the_table_has_each_value_with_its_default_and_its_description(tool):
    text = '# A file.\na:\n  # -- how many\n  b: 1\n  # -- as in a pod\n  c:\n    d: {e: "2"}\nf:\n  # -- none\n  g: []\n'
    assert tool["rows"](text) == [("a.b", 1, "how many"), ("a.c", {"d": {"e": "2"}}, "as in a pod"), ("f.g", [], "none")]


@pytest.mark.parametrize(
    "text", ["a: 1\n", "# -- one\na: 1\nb: 2\n", "# not a meaning\na: {}\n", "a:\n  # -- one\n  b:\n    c: 1\n  d: 2\n"]
)
def test_a_value_without_a_description_is_refused(tool, text):
    with pytest.raises(ValueError, match="has no description"):
        tool["rows"](text)
