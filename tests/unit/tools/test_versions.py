"""The version, which several files repeat."""

import tomllib
from pathlib import Path

import yaml

_PROJECT = Path(__file__).parents[3]


def test_all_files_have_one_version():
    version = tomllib.loads((_PROJECT / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((_PROJECT / "helm/memtail/Chart.yaml").read_text())
    citation = yaml.safe_load((_PROJECT / "CITATION.cff").read_text())
    assert {chart["version"], chart["appVersion"], str(citation["version"])} == {version}
    assert (_PROJECT / "helm/memtail/README.md").read_text().count(f":{version} .") == 2
