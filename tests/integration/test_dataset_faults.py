"""Unusual images and arrays through the command line: one line and exit code 2, or a run that says what it left out."""

import numpy as np
import pytest

import memtail
from tests.support.arrays import write_arrays, write_tree
from tests.support.cli import command, write_spec
from tests.support.odd_images import write_damaged, write_large


@pytest.fixture
def run(tmp_path):
    def start(**dataset):
        dataset = {"root": str(tmp_path / "data"), **dataset}
        path = write_spec(tmp_path, "field", dataset=dataset, training={"epochs": 1}, subsets={"trials": 20, "design": "balanced"})
        return command("run", path, "--store", tmp_path / "store")

    return start


@pytest.fixture
def tree(tmp_path):
    write_tree(tmp_path / "data", suffix=".jpg")
    return tmp_path / "data"


def refusal(answer):
    """Return the only line of a refusal."""
    assert answer.returncode == 2
    assert "Traceback" not in answer.stdout + answer.stderr
    [line] = [line for line in answer.stderr.splitlines() if line.startswith("memtail: ")]
    assert answer.stderr.rstrip().endswith(line)
    return line


def test_a_decompression_bomb_is_refused_in_one_line(run, tree):
    write_large(tree / "train" / "cat" / "large.png", 20000, 10000)
    line = refusal(run(name="folder", resolution=8))
    assert f"{tree}/train/cat/large.png: image size (200000000 pixels) exceeds limit" in line
    assert "scale it down to at most 89478485 pixels" in line


def test_a_dangling_link_is_refused_in_one_line(run, tree):
    (tree / "train" / "cat" / "broken.jpg").symlink_to("/nowhere/x.jpg")
    line = refusal(run(name="folder", resolution=8))
    assert f"{tree}/train/cat/broken.jpg is a link to /nowhere/x.jpg, which does not exist: restore or remove it" in line


def test_damaged_images_are_listed_in_one_line_or_left_out_with_a_count(run, tree):
    damaged = write_damaged(tree)
    line = refusal(run(name="folder", resolution=8))
    assert all(str(path) in line for path in damaged)
    answer = run(name="folder", resolution=8, on_error="skip")
    assert answer.returncode == 0, answer.stderr
    assert "damaged images left out" in answer.stderr
    assert "images=4" in answer.stderr


def test_files_that_are_no_images_are_counted_and_the_run_goes_on(run, tree, tmp_path):
    (tree / "train" / "cat" / "a.gif").write_bytes(b"GIF89a")
    (tree / "train" / "cat" / "._000.jpg").write_bytes(b"\0\5\x16\7")
    answer = run(name="folder", resolution=8)
    assert answer.returncode == 0, answer.stderr
    assert "files left out that are no images" in answer.stderr
    assert "files=1" in answer.stderr
    names = memtail.load_scores(tmp_path / "store" / "experiments" / "field").to_pandas("memorization").filename
    assert sorted(names) == sorted(str(path.relative_to(tree / "train")) for path in tree.glob("train/*/0*.jpg"))


def test_arrays_are_refused_in_one_line_with_the_conversion(run, tmp_path):
    path = write_arrays(tmp_path / "a.npz", train_images=np.random.default_rng(0).random((40, 6, 6)))
    line = refusal(run(name="arrays", root=str(path)))
    assert line.endswith('needed is uint8 from 0 to 255: save (255 * train_images).round().astype("uint8")')


def test_labels_from_1_are_warned_of(run, tmp_path):
    labels = np.arange(40) % 2 + 1
    answer = run(name="arrays", root=str(write_arrays(tmp_path / "a.npz", train_labels=labels, test_labels=labels[:20])))
    assert answer.returncode == 0, answer.stderr
    assert "classes without a training example" in answer.stderr
    assert "subtract 1" in answer.stderr
