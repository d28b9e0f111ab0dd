"""Soft outcomes of a run, from the trainer to the published files."""

import json
import re

import numpy as np
import pytest

import memtail
from memtail.datasets import prepare
from memtail.datasets.staged_dataset import stage
from memtail.errors import ScoresError
from memtail.spec import Experiment
from memtail.storage.local import LocalStore
from memtail.trials import TrialBatch, unpack
from tests.support.cli import batches, command
from tests.support.explored import opened

DATASET = {"name": "digits", "max_train": 200, "max_test": 50}
CODE = """
import numpy as np
import memtail

def train(task):
    n, q = task.dataset.n_train, task.dataset.n_test
    rng = np.random.default_rng(task.seed)
    train_score, test_score = rng.random(n), rng.random(q)
    train_score[task.subset] = 0.5 + train_score[task.subset] / 2
    if 7 in task.subset:
        test_score[3] = 0.5 + test_score[3] / 2
    scores = {"train_score": train_score, "test_score": test_score}
    return memtail.Outcome(train_score >= 0.5, test_score >= 0.5, train_labels=task.dataset.train_labels, **scores)
"""


def run(tmp_path, trials=40, **changes):
    (tmp_path / "soft_code.py").write_text(CODE)
    spec = {
        "name": "soft",
        "dataset": DATASET,
        "subsets": {"trials": trials, "design": "balanced"},
        "record": {"scores": True},
        "execution": {"device": "cpu", "trials_per_shard": 10},
    }
    return memtail.run(Experiment.parse(spec | changes, base=tmp_path), tmp_path / "store")


def test_scores_of_a_function_become_mem_p_and_infl_p(tmp_path):
    scores = run(tmp_path, trainer={"function": "soft_code:train"}).scores
    stacked = [TrialBatch.from_bytes(path.read_bytes()) for path in batches(tmp_path / "store", "soft")]
    M = np.concatenate([unpack(batch.membership, 200) for batch in stacked])
    S, P = (np.concatenate([getattr(batch, f"{split}_score") for batch in stacked]) / 255 for split in ("train", "test"))
    table = scores.memorization
    expected = [S[M[:, i], i].mean() - S[~M[:, i], i].mean() for i in range(200)]
    np.testing.assert_allclose(table["mem_p"], expected, atol=1e-12)
    np.testing.assert_allclose(table["score_in"] - table["score_out"], table["mem_p"], atol=1e-12)
    assert 0.15 < table["mem_p"].mean() < 0.35
    assert 0.3 < table["mem"].mean() < 0.7
    assert (table["mem_p_se"] < table["mem_se"] + 0.02).all()
    block = scores.soft_influence(test=[3, 4])
    assert block.value[:, 0].argmax() == 7
    np.testing.assert_allclose(block.value[7, 1], P[M[:, 7], 4].mean() - P[~M[:, 7], 4].mean(), atol=1e-12)
    pairs = scores.pairs
    at_pairs = scores.soft_influence().value[pairs["tr_idx"], pairs["tt_idx"]]
    np.testing.assert_array_equal(pairs["infl_p"], at_pairs)
    assert len(at_pairs)


def test_scores_of_the_built_in_trainer_are_probabilities_and_change_nothing_else(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    training = {"training": {"epochs": 2}}
    with_scores, without = run(tmp_path / "one", **training), run(tmp_path / "other", record={"scores": False}, **training)
    assert with_scores.summary.fingerprint == without.summary.fingerprint
    mine, plain = with_scores.scores.memorization, without.scores.memorization
    for column in plain:
        np.testing.assert_array_equal(mine[column], plain[column])
    assert mine.keys() - plain.keys() == {"mem_p", "mem_p_se", "score_in", "score_out"}
    assert np.corrcoef(mine["score_out"], mine["p_out"])[0, 1] > 0.8
    with pytest.raises(ScoresError, match="not all trials have recorded scores: declare record"):
        without.scores.soft_influence(train=0)


def test_an_experiment_that_began_without_scores_has_none(tmp_path):
    run(tmp_path, trials=20, record={"scores": False}, training={"epochs": 1})
    run(tmp_path, trials=30, record={}, training={"epochs": 1})
    assert [TrialBatch.from_bytes(path.read_bytes()).train_score for path in batches(tmp_path / "store", "soft")] == [None] * 3
    result = run(tmp_path, trials=40, training={"epochs": 1})
    assert result.summary.trials == 40
    assert "mem_p" not in result.scores.memorization
    record = json.loads((tmp_path / "store/experiments/soft/experiment.json").read_text())
    assert record["experiment"]["record"]["scores"] is True


def test_pages_show_scores_and_epochs_where_they_are_recorded(tmp_path):
    (tmp_path / "plain").mkdir()
    store = tmp_path / "store"
    parts = {"training": {"epochs": 4}, "record": {"scores": True, "snapshots": [1, 4]}}
    run(tmp_path, **parts)
    run(tmp_path / "plain", training={"epochs": 1}, record={"scores": False})
    shown, plain = (published(folder / "store") for folder in (tmp_path, tmp_path / "plain"))
    for heading in ("Memorization of scores", "Memorization over training"):
        assert heading in shown
        assert heading not in plain
    table = memtail.load_scores(store / "experiments" / "soft").snapshots
    after_one, after_four = (table["mem"][(table["index"] == 7) & (table["epoch"] == epoch)].item() for epoch in (1, 4))
    _, answer = opened(LocalStore(store), "/experiments/soft/train/7")
    page = " ".join(re.sub("<[^>]+>", " ", answer.text).split())
    assert "memorization of scores" in page
    assert re.search(rf"memorization by epoch 1: {shown_as(after_one)} ± \S+ 4: {shown_as(after_four)} ± ", page), page
    np.testing.assert_allclose(after_four, memtail.load_scores(store / "experiments" / "soft").memorization["mem"][7])


def published(store):
    stage(prepare(Experiment.parse({"name": "soft", "dataset": DATASET}).dataset), LocalStore(store))
    done = command("report", "soft", "--store", store)
    assert done.returncode == 0, done.stderr
    (page,) = store.glob("experiments/soft/report/*/report.html")
    return page.read_text()


def shown_as(value):
    return f"{value:.2f}".replace("-", "−")
