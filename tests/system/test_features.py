"""Features with the built-in trainer, through the command line: scikit-learn's breast cancer data."""

import re

import numpy as np
import pytest
import yaml
from sklearn.datasets import load_breast_cancer

from memtail import load_scores
from memtail.errors import MemtailError
from memtail.explorer.views import PER_PAGE
from memtail.storage.local import LocalStore
from tests.support.cli import command, invoke
from tests.support.explored import opened


@pytest.fixture(scope="module")
def finished(own_cache, tmp_path_factory):
    """The folder of an experiment file, and of the store with its scores."""
    folder, data = tmp_path_factory.mktemp("features"), load_breast_cancer()
    test = np.arange(len(data.target)) % 5 == 4
    np.savez(
        folder / "cancer.npz",
        train_features=data.data[~test],
        train_labels=data.target_names[data.target[~test]],
        test_features=data.data[test],
        test_labels=data.target_names[data.target[test]],
        feature_names=data.feature_names,
    )
    spec = {"name": "cancer", "dataset": {"name": "arrays", "root": "cancer.npz"}, "model": {"name": "mlp", "hidden": [32]}}
    spec |= {"training": {"batch_size": 32}, "subsets": {"trials": 100}, "execution": {"device": "cpu"}}
    spec |= {"record": {"scores": True}}
    (folder / "cancer.yaml").write_text(yaml.safe_dump(spec))
    done = command("run", folder / "cancer.yaml", "--store", folder / "store")
    assert done.returncode == 0, done.stderr
    return folder


def test_the_scores_are_those_of_good_models(finished):
    scores = load_scores(finished / "store/experiments/cancer")
    assert scores.summary.test_accuracy > 0.97
    assert scores.summary.in_subset_accuracy > 0.99
    assert 0.01 < scores.summary.mem_share(0.25) < 0.1
    # malignant tumours that all models but those trained on them take for benign ones
    assert scores.memorization["mem"].max() > 0.8


def test_the_report_shows_features_as_tables_and_pairs_as_rows(finished):
    (path,) = (finished / "store").rglob("report.html")
    page, scores = path.read_text().partition("</style>")[2], load_scores(finished / "store/experiments/cancer")
    most = int(np.argmax(scores.memorization["mem"]))
    with np.load(finished / "cancer.npz") as raw:
        values = [f"{value:.6g}" for value in raw["train_features"][most, :2].astype(np.float32).tolist()]
    cell = '<tr><th scope="row">{}</th><td class="number">{}</td></tr>\n'
    assert cell.format("mean radius", values[0]) + cell.format("mean texture", values[1]) in page
    assert "24 more" in page
    assert "<blockquote" not in page
    assert page.count('<table class="rows">') == page.count('<article class="pair">') > 0
    assert f'<th scope="row">training {scores.strongest_pairs(1)["tr_idx"][0]}</th>' in page


def test_the_explorer_shows_an_example_as_a_table_and_its_influencers_as_rows(finished):
    client, gallery = opened(LocalStore(finished / "store"), "/experiments/cancer")
    assert gallery.text.count('<th scope="row"><a href="/experiments/cancer/train/') == PER_PAGE
    scores = load_scores(finished / "store/experiments/cancer")
    test = int(scores.pairs["tt_idx"][0])
    page = client.get(f"/experiments/cancer/test/{test}").text
    assert page.count('<tr><th scope="row">mean ') == 10
    assert page.count('<tr><th scope="row">worst ') == 10
    with np.load(finished / "cancer.npz") as raw:
        for row in scores.top_influencers(test, 3)["tr_idx"].tolist():
            radius = f"{raw['train_features'].astype(np.float32)[row, 0].item():.6g}"
            assert re.search(rf'href="/experiments/cancer/train/{row}">{row}</a>.*?</th>.*?<td>{radius}</td>', page, re.DOTALL)
    assert client.get(f"/experiments/cancer/images/test/{test}.png").status_code == 404


def test_a_plan_measures_features(finished):
    text = (finished / "cancer.yaml").read_text().replace("name: cancer\n", "name: other\n")
    (finished / "other.yaml").write_text(text)
    plan = command("plan", finished / "other.yaml", "--store", finished / "store")
    assert plan.returncode == 0, plan.stderr
    assert "seconds per trial" in plan.stdout


@pytest.mark.parametrize("study", ["duplicates", "last-layer"])
def test_studies_of_images_refuse_features_before_they_train(finished, study):
    experiments = sorted((finished / "store/experiments").iterdir())
    with pytest.raises(MemtailError, match="this needs images, and the dataset holds features: use an experiment on images"):
        invoke(str(finished / "store"), "study", study, "cancer")
    assert sorted((finished / "store/experiments").iterdir()) == experiments
