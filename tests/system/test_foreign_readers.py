"""What public scripts do with the authors' files, done with ours: each body below is how such a script reads them."""

import os

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image
from torchvision.datasets import ImageFolder

import memtail
from memtail.exchange import exports
from memtail.execution.aggregation import Aggregation, Pace
from memtail.experiment_store import ExperimentStore
from memtail.scores.files import write_scores
from memtail.scores.names import PAIRS
from memtail.scores.reader import Scores
from memtail.spec import Experiment
from memtail.storage.local import LocalStore
from tests.support.cli import batches, version

CLASSES = ("n01440764", "n01443537", "n01484850")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tree as ImageNet's, and the first scores of an experiment: some examples have no estimate yet."""
    root, rng = tmp_path_factory.mktemp("foreign"), np.random.default_rng(0)
    for split in ("train", "val"):
        for synset in CLASSES:
            (root / "images" / split / synset).mkdir(parents=True)
            for index in range(8):
                image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
                image.save(root / "images" / split / synset / f"{synset}_{split}_{index}.JPEG")
    spec = {
        "name": "foreign",
        "dataset": {"name": "folder", "root": root / "images"},
        "model": {"name": "mlp", "hidden": [64]},
        "training": {"epochs": 40, "batch_size": 8, "optimizer": {"lr": 0.02}},
        "subsets": {"trials": 40, "fraction": 0.7},
        "execution": {"device": "cpu", "trials_per_shard": 6},
    }
    experiment = Experiment.parse(spec)
    memtail.run(experiment, root / "store")
    _, *later = batches(root / "store", "foreign")
    for path in later:
        path.unlink()
    experiment_store = ExperimentStore(LocalStore(root / "store"), "foreign")
    record, dataset = experiment_store.read_record(), memtail.datasets.prepare(experiment.dataset)
    aggregation = Aggregation(experiment_store, record, dataset, Pace(1, 1, first_at_once=True))
    aggregation.accumulate_new()
    (root / "scores").mkdir()
    write_scores(root / "scores", "foreign", record.fingerprint, aggregation.statistics, dataset)
    return root, root / "scores"


@pytest.fixture(scope="module")
def tr_mem(published):
    return np.load(published[1] / "infl_matrix.npz")["tr_mem"]


def test_scores_are_joined_to_an_image_folder_by_base_name(published):
    root, folder = published
    index = np.load(folder / "index.npz")
    path_to_score = {name.decode(): score for name, score in zip(index["tr_filenames"], index["tr_mem"], strict=True)}
    samples = ImageFolder(root / "images" / "train").samples
    joined = [path_to_score[os.path.basename(path)] for path, _ in samples]  # noqa: PTH119
    table = Scores(folder).memorization
    np.testing.assert_array_equal(joined, np.nan_to_num(table["mem"]))
    assert [name.decode() for name in index["tr_paths"]] == [os.path.relpath(path, root / "images" / "train") for path, _ in samples]
    assert index["tt_filenames"][0] == b"n01440764_val_0.JPEG"
    assert index["tt_paths"][0] == b"n01440764/n01440764_val_0.JPEG"


def test_consistency_scores_are_joined_to_an_image_folder_by_base_name(published):
    root, _ = published
    exports.planned(LocalStore(root / "store"), "foreign", "cscores").write(root / "cscores")
    scores = np.load(root / "cscores" / "foreign-cscores-orig-order.npz", allow_pickle=True)
    dataset = ImageFolder(root / "images" / "train")
    labels = scores["labels"]
    assert (labels == dataset.targets).all()
    filenames = [f.decode("utf-8") for f in scores["filenames"]]
    path_to_score = dict(zip(filenames, 1.0 - scores["scores"], strict=True))
    joined = [path_to_score[os.path.basename(path)] for path, _ in dataset.samples]  # noqa: PTH119
    np.testing.assert_allclose(joined, 1 - memtail.load_scores(root / "store/experiments/foreign").memorization["p_out"])
    assert [name.decode() for name in scores["paths"]] == [os.path.relpath(path, dataset.root) for path, _ in dataset.samples]


def test_memorization_is_sorted_shown_and_weighted_without_nan(published, tr_mem):
    files = published[1]
    undefined = ~np.load(files / "infl_matrix.npz")["tr_mem_defined"]
    assert undefined.any()
    assert not undefined.all()
    assert (tr_mem[undefined] == 0).all()
    most = np.argsort(tr_mem)[-5:]
    assert not undefined[most].any()
    assert tr_mem[most].min() > 0
    values, _ = torch.sort(torch.from_numpy(tr_mem), descending=True)
    assert values[0] == tr_mem.max()
    counts, _, _ = plt.hist(tr_mem)
    plt.close()
    assert counts.sum() == len(tr_mem)
    assert all(isinstance(int(tr_mem[i] // 0.01), int) for i in range(len(tr_mem)))
    np.testing.assert_allclose((tr_mem / tr_mem.sum()).sum(), 1)
    assert [i for i in range(len(tr_mem)) if tr_mem[i] == 1]


def test_influence_is_read_class_by_class(published):
    data = np.load(published[1] / "infl_matrix.npz")
    matrix = np.zeros((len(data["tr_labels"]), len(data["tt_labels"])))
    for c in range(len(CLASSES)):
        matrix[np.ix_(data[f"tr_classidx_{c}"], data[f"tt_classidx_{c}"])] = data[f"infl_matrix_class{c}"]
        assert (data["tt_labels"][data[f"tt_classidx_{c}"]] == c).all()
    assert np.isfinite(matrix).all()
    expected = Scores(published[1]).influence().value
    same_class = data["tr_labels"][:, None] == data["tt_labels"]
    np.testing.assert_allclose(matrix, np.where(same_class, np.nan_to_num(expected), 0), atol=1e-6)


def test_memorization_of_the_pairs_is_that_of_the_examples(published, tr_mem):
    pairs = np.load(published[1] / PAIRS)
    assert len(pairs["tr_idx"])
    assert np.abs(tr_mem[pairs["tr_idx"]] - pairs["mem"]).max() < 1e-4
    assert np.isfinite(pairs["infl"]).all()


def test_base_names_that_several_examples_have_are_kept_as_paths(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (tmp_path / "images" / split / label).mkdir(parents=True)
            for index in range(4):
                image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
                image.save(tmp_path / "images" / split / label / (f"{index}.png" if split == "train" else f"{label}{index}.png"))
    spec = {
        "name": "twice",
        "dataset": {"name": "folder", "root": tmp_path / "images"},
        "model": {"name": "mlp", "hidden": [4]},
        "training": {"epochs": 1},
        "subsets": {"trials": 4, "design": "balanced", "fraction": 0.5},
        "execution": {"device": "cpu"},
    }
    memtail.run(Experiment.parse(spec), tmp_path / "store")
    index = np.load(version(tmp_path / "store", "twice") / "index.npz")
    assert index["tr_filenames"][0] == b"cat/0.png"
    assert index["tt_filenames"][0] == b"cat0.png"
