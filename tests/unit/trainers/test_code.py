"""The folder of an experiment's training code on a machine."""

import numpy as np
import pytest

from memtail.datasets import DatasetLabels
from memtail.errors import UnsupportedError
from memtail.execution.declare import declare
from memtail.spec import Experiment
from memtail.trainers.code import code_folder


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "first/mine.py").write_text("def train(task): ...")
    return tmp_path / "first"


@pytest.fixture
def record(folder):
    labels = np.arange(40) % 2
    spec = {"name": "e", "dataset": {"name": "digits"}, "trainer": {"function": "mine:train", "folder": str(folder)}}
    return declare(Experiment.parse(spec), DatasetLabels(folder, "0" * 64, ("a", "b"), labels, labels, None, None), 4)


def test_networks_are_also_searched_in_the_folder_of_the_setting(record, folder, monkeypatch):
    network = {"name": "e", "dataset": {"name": "digits"}, "model": {"name": "mine:build"}}
    monkeypatch.delenv("MEMTAIL_CODE", raising=False)
    assert code_folder(type(record)(Experiment.parse(network), "f", {}, 1, 1, 1)) is None
    monkeypatch.setenv("MEMTAIL_CODE", str(folder))
    assert code_folder(type(record)(Experiment.parse(network), "f", {}, 1, 1, 1)) == folder


def test_the_folder_of_the_registration_is_used_where_it_has_the_code(record, folder, monkeypatch):
    monkeypatch.delenv("MEMTAIL_CODE", raising=False)
    assert code_folder(record) == folder


@pytest.mark.parametrize("place", ["MEMTAIL_CODE", "current folder"])
def test_on_another_machine_it_is_that_of_the_setting_or_the_current_one(record, folder, tmp_path, monkeypatch, place):
    moved = folder.rename(tmp_path / "moved")
    monkeypatch.delenv("MEMTAIL_CODE", raising=False)
    if place == "MEMTAIL_CODE":
        monkeypatch.setenv("MEMTAIL_CODE", str(moved))
    else:
        monkeypatch.chdir(moved)
    assert code_folder(record) == moved


def test_other_code_in_the_setting_does_not_hide_that_of_the_registration(record, folder, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.py").write_text("def train(task): return None")
    monkeypatch.setenv("MEMTAIL_CODE", str(tmp_path / "other"))
    assert code_folder(record) == folder
    folder.rename(tmp_path / "moved")
    with pytest.raises(
        UnsupportedError, match=rf"of experiment 'e' cannot be used here: that in {tmp_path}/other differs: digest \w{{12}}, reg"
    ):
        code_folder(record)


def test_missing_code_is_named(record, folder, tmp_path, monkeypatch):
    monkeypatch.delenv("MEMTAIL_CODE", raising=False)
    folder.rename(tmp_path / "moved")
    with pytest.raises(
        UnsupportedError, match=r"it is not on this machine: trainer\.function: there is no module 'mine' .* set MEMTAIL_CODE to"
    ):
        code_folder(record)
