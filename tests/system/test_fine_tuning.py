"""The example of fine-tuning: the head of a frozen backbone, and all layers, from the same weights."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from memtail import load_scores
from tests.support.cli import command

EXAMPLE = Path(__file__).parents[2] / "examples/fine-tuning"


@pytest.fixture(scope="module")
def folder(own_cache, tmp_path_factory):
    """The example after runs of fewer and shorter trials."""
    folder = shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("tuning") / "fine-tuning")
    script = (folder / "pretrain.py").read_text()
    (folder / "pretrain.py").write_text(script.replace("400, 300, 30", "400, 300, 10"))
    subprocess.run([sys.executable, "pretrain.py"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    for name in ("frozen", "trained"):
        path = folder / f"{name}.yaml"
        declared = yaml.safe_load(path.read_text())
        declared["training"]["epochs"] = 20
        path.write_text(yaml.safe_dump(declared | {"subsets": {"trials": 12, "design": "balanced"}}))
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)  # where the network is searched
            done = command("run", path)
        assert done.returncode == 0, done.stderr
    return folder


def test_a_trained_backbone_fits_what_a_frozen_one_does_not_and_they_memorize_other_images(folder):
    frozen, trained = (load_scores(folder / "memtail-store/experiments" / name) for name in ("frozen", "trained"))
    assert 0.8 < frozen.summary.in_subset_accuracy < 0.98
    assert trained.summary.in_subset_accuracy > 0.99
    assert 0.75 < frozen.summary.held_out_accuracy < trained.summary.held_out_accuracy - 0.03
    np.testing.assert_array_equal(frozen.memorization["k_in"], trained.memorization["k_in"])
    memorized = [scores.memorization["mem"] >= 0.25 for scores in (frozen, trained)]
    assert (memorized[0] & ~memorized[1]).any()
    assert (memorized[1] & ~memorized[0]).any()


def test_its_plot_is_drawn(folder):
    done = subprocess.run([sys.executable, "plot.py"], cwd=folder, check=True, capture_output=True, text=True)
    assert done.stdout.startswith("memorized of 400 images: ")
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
