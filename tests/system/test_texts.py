"""The example on texts: a function trainer on a table, from its files to scores, report and explorer."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from memtail import load_scores
from memtail.storage.local import LocalStore
from tests.support.cli import command
from tests.support.explored import opened

EXAMPLE = Path(__file__).parents[2] / "examples/texts"


@pytest.fixture(scope="module")
def store(own_cache, tmp_path_factory):
    """A store with the scores of the example, of fewer texts and trials."""
    folder = shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("texts") / "texts")
    subprocess.run([sys.executable, "table.py"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    path = folder / "experiment.yaml"
    declared = yaml.safe_load(path.read_text())
    declared["dataset"] |= {"max_train": 500, "max_test": 150}
    declared["subsets"]["trials"] = 32
    path.write_text(yaml.safe_dump(declared))
    before = Path.cwd()
    os.chdir(folder.parent)
    try:
        done = command("run", "texts/experiment.yaml", "--store", "store")
    finally:
        os.chdir(before)
    assert done.returncode == 0, done.stderr
    assert "500 training and 150 test examples" in done.stdout
    return LocalStore(folder.parent / "store")


def test_the_scores_name_each_text(store):
    scores = load_scores(store.root / "experiments/texts")
    names = scores.memorization["filename"]
    assert re.fullmatch(r"asyncio/\w+\.py:\w+", names[0])
    assert scores.memorization["mem"].max() > 0.5
    assert scores.summary.in_subset_accuracy > 0.95


def test_report_and_explorer_show_texts(store):
    (page,) = Path(store.root).rglob("report.html")
    report = page.read_text()
    assert report.count("<blockquote") > 20
    assert 'alt="train image' not in report
    client, gallery = opened(store, "/experiments/texts")
    assert gallery.text.count('<span class="picture text">') > 30
    assert "Interleave list of addrinfo tuples by family." in client.get("/experiments/texts/train/0").text
    assert client.get("/experiments/texts/images/train/0.png").status_code == 404
