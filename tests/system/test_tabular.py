"""The example on features of a table: gradient-boosted trees by a function, and the built-in network."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from memtail import load_scores
from tests.support.cli import command

EXAMPLE = Path(__file__).parents[2] / "examples/tabular"


@pytest.fixture(scope="module")
def folder(own_cache, tmp_path_factory):
    """The example after runs of fewer trials."""
    folder = shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("table") / "tabular")
    subprocess.run([sys.executable, "table.py"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    for name in ("boosted", "mlp"):
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"subsets": {"trials": 30, "design": "balanced"}}))
        done = command("run", path, "--store", folder / "memtail-store")
        assert done.returncode == 0, done.stderr
    return folder


def test_both_trainers_are_good_models_and_agree_on_the_most_memorized(folder):
    boosted, mlp = (load_scores(folder / "memtail-store/experiments" / name) for name in ("boosted", "mlp"))
    for scores in (boosted, mlp):
        assert scores.summary.in_subset_accuracy > 0.99
        assert scores.summary.held_out_accuracy > 0.92
        assert 0.01 < (scores.memorization["mem"] >= 0.25).mean() < 0.12
    np.testing.assert_array_equal(boosted.memorization["filename"], mlp.memorization["filename"])
    assert np.corrcoef(boosted.memorization["mem"], mlp.memorization["mem"])[0, 1] > 0.3
    assert np.corrcoef(boosted.memorization["mem"], boosted.memorization["mem_p"])[0, 1] > 0.9


def test_its_plot_is_drawn(folder):
    done = subprocess.run([sys.executable, "plot.py"], cwd=folder, check=True, capture_output=True, text=True)
    assert done.stdout.startswith("correlation ")
    assert (folder / "agreement.png").read_bytes().startswith(b"\x89PNG")
