"""Generated pages of the documentation."""

import runpy
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from memtail.spec.experiment import Experiment

PROJECT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tool():
    return runpy.run_path(str(PROJECT / "tools" / "reference-pages.py"))


def test_each_key_of_the_experiment_file_has_a_row_with_a_meaning(tool):
    page = tool["experiment_page"]()
    schema = Experiment.model_json_schema()
    for name, part in {"Experiment": schema, **schema["$defs"]}.items():
        rows = page.partition(f"{{ #{name.lower()} }}")[2].partition("\n## ")[0].splitlines()
        keys = {row.split("`")[1]: row for row in rows if row.startswith("| `")}
        assert keys.keys() == part["properties"].keys(), name
        assert all(row.split("|")[-2].strip() for row in keys.values()), name


def test_a_key_has_its_bounds_and_its_default(tool):
    row = next(line for line in tool["experiment_page"]().splitlines() if line.startswith("| `batch_size`"))
    assert row.split("|")[2:4] == [" integer ≥ 1 ", " `64` "]


def test_parts_without_a_name_are_told_apart_by_their_key(tool):
    page = tool["experiment_page"]()
    assert "## `trainer`: `function` { #functiontrainer }" in page
    assert "## `model` { #namedmodel }" in page
    row = next(line for line in page.splitlines() if line.startswith("| `trainer`"))
    assert "[`images`](#imagestrainer) or [`function`](#functiontrainer) or [`command`](#commandtrainer)" in row


@pytest.mark.parametrize("command", ["memtail run", "memtail study", "memtail study removal"])
def test_each_command_is_linked_to_its_section(tool, command):
    page = tool["cli_page"]()
    assert f"* [`{command.split()[-1]}`](#{command.replace(' ', '-')}): " in page
    assert f"## `{command}`\n" in page


def test_no_summary_of_a_command_is_cut_short(tool):
    assert not [line for line in tool["cli_page"]().splitlines() if line.startswith("* ") and line.endswith("...")]


@pytest.mark.parametrize("row", ["| `MEMTAIL_LEASE_SECONDS` | `60` | ", "| `MEMTAIL_S3_ACCESS_KEY`, `AWS_ACCESS_KEY_ID` |  | "])
def test_the_variables_of_the_settings_are_on_the_page(tool, row):
    assert row in tool["environment_page"]()


def test_a_variable_without_a_meaning_is_refused(tool):
    @dataclass
    class ServiceSettings:
        """Settings."""

        port: int = field(default=1, metadata={"variable": "MEMTAIL_PORT"})

    with pytest.raises(ValueError, match="port has no description"):
        tool["_settings_class"](ServiceSettings)
