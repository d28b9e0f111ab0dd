"""The example of a language model: it finds the canaries, and memorization grows with rarity."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from memtail import load_scores
from tests.support.cli import command

EXAMPLE = Path(__file__).parents[2] / "examples/language-model"


@pytest.fixture(scope="module")
def folder(own_cache, tmp_path_factory):
    """The example after a run of fewer reports and trials."""
    folder = shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("model") / "language-model")
    documents = (folder / "documents.py").read_text()
    (folder / "documents.py").write_text(documents.replace("range(300)", "range(60)"))
    subprocess.run([sys.executable, "documents.py"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    path = folder / "experiment.yaml"
    declared = yaml.safe_load(path.read_text())
    declared["subsets"]["trials"] = 12
    path.write_text(yaml.safe_dump(declared))
    done = command("run", path, "--store", folder / "memtail-store")
    assert done.returncode == 0, done.stderr
    return folder


def test_canaries_come_out_on_top_and_memorization_grows_with_rarity(folder):
    table = load_scores(folder / "memtail-store/experiments/language-model").memorization
    times = np.array([int(found[1]) if (found := re.search(r"written (\d+) times", name)) else 0 for name in table["filename"]])
    means = [table["mem_p"][times == number].mean() for number in (1, 2, 4, 8)]
    assert means[0] > 0.5
    assert means[0] > means[1] + 0.2
    assert means[1] > means[3]
    most = np.argsort(-table["mem_p"])[:16]
    assert (times[most] == 1).sum() >= 12
    assert table["score_in"][times > 0].mean() > 0.9


def test_its_plot_is_drawn(folder):
    subprocess.run([sys.executable, "plot.py"], cwd=folder, check=True)
    assert (folder / "memorization.png").read_bytes().startswith(b"\x89PNG")
