"""Experiments on examples without labels, trained by a function: pairs of all examples, and no class anywhere."""

import csv
import io

import numpy as np
import pyarrow.parquet
import pytest

import memtail
from memtail.errors import DatasetError
from memtail.execution.embedded import run
from memtail.scores.names import INDEX, INFLUENCE_MATRIX, MEMORIZATION
from memtail.storage.local import LocalStore
from tests.support.cli import command, invoke
from tests.support.explored import opened
from tests.support.incomplete import images_without_test_set, texts_without_labels

TRIALS = 112


@pytest.fixture(scope="module")
def finished(own_cache, tmp_path_factory):
    """The folder of an experiment file, and its store."""
    folder = tmp_path_factory.mktemp("without-labels")
    # a design that balances classes takes all examples for one class
    texts_without_labels(folder, TRIALS, 20, subsets={"trials": TRIALS, "design": "stratified"})
    done = command("run", folder / "texts.yaml", "--store", folder / "store")
    assert done.returncode == 0, done.stderr
    return folder, LocalStore(folder / "store")


@pytest.fixture(scope="module")
def scores(finished):
    return memtail.load_scores(finished[1].root / "experiments/texts")


@pytest.fixture(scope="module")
def client(finished):
    return opened(finished[1], "/experiments/texts")[0]


def test_pairs_are_those_of_all_memorized_and_all_test_examples(scores):
    influence = scores.influence().value
    expected = np.argwhere((scores.memorization["mem"] >= 0.25)[:, None] & (influence >= 0.15))
    assert len(expected) > 3
    pairs = np.stack([scores.pairs["tr_idx"], scores.pairs["tt_idx"]], 1)
    np.testing.assert_array_equal(pairs[np.lexsort(pairs.T[::-1])], expected)


def test_score_files_hold_no_labels_and_no_matrix_of_all_pairs(scores):
    assert "label" not in pyarrow.parquet.read_table(scores.folder / MEMORIZATION).column_names
    with np.load(scores.folder / INFLUENCE_MATRIX) as matrix:
        assert matrix.files == ["tr_mem", "tr_mem_defined"]
    with np.load(scores.folder / INDEX) as index:
        assert index.files == ["tr_filenames", "tt_filenames", "tr_paths", "tt_paths", "tr_mem", "tr_mem_defined"]
    assert not scores.labelled
    assert "label" not in scores.top_influencers(0)
    assert "label" not in scores.top_influenced(0)
    assert "label" not in scores.to_pandas("memorization")


def test_subsets_are_balanced_over_all_examples(scores):
    assert np.ptp(scores.memorization["k_in"]) <= 1


def test_commands_show_no_label(finished):
    for options in ([], ["--pairs"], ["--influencers-of", "0"]):
        shown = invoke(finished[1].address, "top", "texts", *options)
        assert "mem" in shown
        assert "label" not in shown
    assert "pairs" in invoke(finished[1].address, "study", "stability", "texts")


def test_the_report_shows_no_class(finished):
    (path,) = (finished[1].root / "experiments/texts/report").rglob("report.html")
    page = path.read_text().partition("</style>")[2]
    assert "test examples): the training example has mem" in page
    assert "over 1,200 tested pairs" in page
    assert "Labels to check" not in page
    assert '<th scope="col">class</th>' not in page
    assert "of the same class" not in page
    assert "None" not in page


def test_the_explorer_shows_no_class(client):
    for address in ("", "?sort=class&class=0", "/train/3", "/test/3"):
        page = client.get(f"/experiments/texts{address}")
        assert page.status_code == 200
        assert 'class="class"' not in page.text
        assert "None" not in page.text
        assert '<select name="class">' not in page.text
        assert '<option value="class"' not in page.text
    assert "Training example 3" in client.get("/experiments/texts/train/3").text
    for address in ("train.csv", "train/3.csv", "test/3.csv"):
        rows = list(csv.DictReader(io.StringIO(client.get(f"/experiments/texts/{address}").text)))
        assert rows
        assert not {"class", "label"} & rows[0].keys()


def test_neither_labels_nor_a_test_set_are_needed(finished, tmp_path):
    texts_without_labels(tmp_path, 32, 0)
    assert command("run", tmp_path / "texts.yaml", "--store", tmp_path / "store").returncode == 0
    scores = memtail.load_scores(tmp_path / "store/experiments/texts")
    assert scores.summary.n_test == 0
    assert scores.memorization["mem"].max() > 0.5
    (path,) = (tmp_path / "store").rglob("report.html")
    assert "influence" not in path.read_text().partition("</style>")[2]


def test_the_built_in_trainer_refuses_examples_without_labels_in_one_line(own_cache, tmp_path):
    experiment = images_without_test_set(tmp_path, 16)
    with np.load(tmp_path / "images.npz") as held:
        images = held["train_images"]
    np.savez(tmp_path / "images.npz", train_images=images)
    with pytest.raises(
        DatasetError, match=r"the built-in trainer needs labels, and the dataset has none: train it with a function or a command"
    ):
        run(experiment, tmp_path / "store")


def test_labels_that_the_code_returns_are_refused_if_the_dataset_has_none(own_cache, tmp_path):
    experiment = texts_without_labels(tmp_path, 16, 0)
    code = tmp_path / "words.py"
    code.write_text(code.read_text().replace("memtail.Outcome(", "memtail.Outcome(train_labels=data.train_labels, "))
    done = command("run", tmp_path / "texts.yaml", "--store", tmp_path / "store")
    assert done.returncode != 0
    assert "train_labels was returned, but the dataset has none" in done.stderr + done.stdout
    assert experiment.name == "texts"
