"""Experiments without a test set: memorization is published, and influence, pairs and test accuracy are absent."""

import csv
import io
import json

import numpy as np
import pytest
from prometheus_client import REGISTRY

import memtail
from memtail.errors import MemtailError, SpecError
from memtail.scores.names import INFLUENCE_MATRIX, PAIRS
from memtail.scores.pointer import latest_version
from memtail.storage.local import LocalStore
from memtail.studies.result import load_results
from services.aggregator.metric_updates import update_finished
from tests.support.cli import command, invoke
from tests.support.explored import opened
from tests.support.incomplete import images_without_test_set

TRIALS = 112


@pytest.fixture(scope="module")
def finished(own_cache, tmp_path_factory):
    """The folder of an experiment file, its store, and what the run printed."""
    folder = tmp_path_factory.mktemp("without-test")
    images_without_test_set(folder, TRIALS, record={"margins": True})
    done = command("run", folder / "images.yaml", "--store", folder / "store")
    assert done.returncode == 0, done.stderr
    return folder, LocalStore(folder / "store"), done.stdout


@pytest.fixture(scope="module")
def client(finished):
    return opened(finished[1], "/experiments/images")[0]


def test_a_run_prints_neither_test_accuracy_nor_pairs(finished):
    assert "40 training images, no test set" in finished[2]
    assert "test accuracy" not in finished[2]
    assert ", test " not in finished[2]
    assert "pairs" not in finished[2]
    assert "next: memtail top images --store" in finished[2]


def test_score_files_hold_memorization_and_empty_arrays_of_test_examples(finished):
    scores = memtail.load_scores(finished[1].root / "experiments/images")
    summary = json.loads((scores.folder / "summary.json").read_text())
    assert (summary["n_test"], summary["test_accuracy"], summary["accuracy_se"]["test_accuracy"]) == (0, None, None)
    assert summary["pairs"]["count"] == 0
    assert np.isfinite(scores.memorization["mem"]).all()
    with np.load(scores.folder / INFLUENCE_MATRIX) as matrix:  # as the authors' readers do
        np.testing.assert_array_equal(matrix["tr_mem"], scores.memorization["mem"])
        assert matrix["tt_labels"].shape == (0,)
        assert matrix["infl_matrix_class1"].shape == (20, 0)
    with np.load(scores.folder / PAIRS) as pairs:
        assert pairs["tr_idx"].shape == pairs["infl"].shape == (0,)
    assert len(scores.pairs["tr_idx"]) == len(scores.selected_pairs["tr_idx"]) == len(scores.test_labels) == 0
    assert scores.influence().value.shape == (40, 0)
    assert scores.influence(train=3, on="train").value.shape == (1, 40)
    assert len(scores.top_influenced(3)["tt_idx"]) == 0


def test_commands_show_memorization_and_refuse_pairs(finished):
    store = finished[1].address
    assert "p_out" in invoke(store, "top", "images")
    for options in (["--pairs"], ["--influencers-of", "0"]):
        with pytest.raises(MemtailError, match="experiment 'images' has no test examples, and so neither influence nor pairs"):
            invoke(store, "top", "images", *options)
    (status,) = json.loads(invoke(store, "status", "--json"))
    assert status["test_accuracy"] is None
    assert "images" in invoke(store, "status")


def test_a_plan_forecasts_it(finished):
    text = (finished[0] / "images.yaml").read_text().replace("name: images\n", "name: other\n")
    (finished[0] / "other.yaml").write_text(text)
    plan = command("plan", finished[0] / "other.yaml", "--store", finished[0] / "store", "--json")
    assert plan.returncode == 0, plan.stderr
    assert json.loads(plan.stdout)["trial_bytes"] > 0


@pytest.mark.parametrize("study", ["removal", "duplicates", "last-layer"])
def test_studies_of_test_accuracy_refuse_it_before_they_train(finished, study):
    experiments = sorted((finished[1].root / "experiments").iterdir())
    with pytest.raises(SpecError, match=rf"experiment 'images' has no test examples, and the study {study} measures accuracy on them"):
        invoke(finished[1].address, "study", study, "images")
    assert sorted((finished[1].root / "experiments").iterdir()) == experiments


def test_studies_of_agreement_compare_memorization_alone(finished):
    folder, store, _ = finished
    images_without_test_set(folder, TRIALS, name="wide", model={"name": "mlp", "hidden": [16]})
    assert command("run", folder / "wide.yaml", "--store", folder / "store").returncode == 0
    for arguments in (["stability", "images"], ["architectures", "images", "wide"]):
        shown = invoke(store.address, "study", *arguments)
        assert "memorized" in shown
        assert "pairs" not in shown
        assert "test accuracy" not in shown
    results = {result.study: result for result in load_results(store, "images")}
    assert set(results["stability"].table()["score"]) == set(results["architectures"].table()["score"]) == {"memorization"}


def test_the_report_has_no_section_on_pairs(finished):
    (path,) = (finished[1].root / "experiments/images/report").rglob("report.html")
    page = path.read_text().partition("</style>")[2]
    assert "Memorization of 40 training examples, estimated from 112 models" in page
    assert "Labels to check" in page
    for absent in ("influence", "pairs", "test accuracy", "alse discovery"):
        assert absent not in page


def test_the_explorer_shows_memorization_and_no_influence(client):
    assert client.get("/experiments/images").status_code == 200
    page = client.get("/experiments/images/train/3")
    assert page.status_code == 200
    assert "No influence: the dataset has no test examples" in page.text
    assert "Test examples" not in page.text
    (row,) = csv.DictReader(io.StringIO(client.get("/experiments/images/train/3.csv").text))
    assert (row["tr_idx"], row["class"]) == ("3", "1")
    assert client.get("/experiments/images/test/0").status_code == 404
    assert client.get("/").status_code == 200


def test_an_experiment_until_a_standard_error_ends(finished):
    folder = finished[0]
    images_without_test_set(folder, 64, name="until", subsets={"until": {"standard_error": 0.06}}, execution={"device": "cpu"})
    assert command("run", folder / "until.yaml", "--store", folder / "store").returncode == 0
    assert memtail.load_scores(folder / "store/experiments/until").summary.mem_se_quantile(0.95) <= 0.06


def test_metrics_of_the_aggregator_have_no_series_of_test_examples(finished):
    name, pointer = "images", latest_version(finished[1], "images")
    update_finished(name, pointer)
    assert REGISTRY.get_sample_value("memtail_scores_published_trials", {"experiment": name}) == TRIALS
    for pairs in ("memtail_high_influence_pairs", "memtail_selected_pairs"):
        assert REGISTRY.get_sample_value(pairs, {"experiment": name}) is None
    for examples, there in (("in_subset", True), ("test", False)):
        sample = REGISTRY.get_sample_value("memtail_accuracy_ratio", {"experiment": name, "examples": examples})
        assert (sample is not None) == there
