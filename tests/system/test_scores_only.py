"""An experiment whose training code returns scores and no correctness, from the trainer to the pages."""

import json
import re
import shutil

import numpy as np
import pytest
from prometheus_client import REGISTRY

import memtail
from memtail.datasets import prepare
from memtail.datasets.staged_dataset import stage
from memtail.errors import MemtailError, ScoresError
from memtail.estimators.soft import soft_influence
from memtail.exchange.exports import planned
from memtail.spec import Experiment
from memtail.storage.local import LocalStore
from memtail.studies.agreement import Estimates, compare
from memtail.trials import TrialBatch, unpack
from services.aggregator.aggregator import Aggregator
from services.common.settings import ServiceSettings
from tests.support.cli import batches, command
from tests.support.explored import opened

N, Q, TRIALS = 200, 50, 100
DATASET = {"name": "digits", "max_train": N, "max_test": Q}
CODE = """
import numpy as np
import memtail

def train(task):
    rng = np.random.default_rng(task.seed)
    train_score, test_score = rng.random(task.dataset.n_train) / 2, rng.random(task.dataset.n_test) / 2
    train_score[task.subset] += np.where(task.subset == 7, 0.5, 0.1)
    if 7 in task.subset:
        test_score[task.dataset.test_labels == task.dataset.train_labels[7]] += 0.4
    return memtail.Outcome(train_score=train_score, test_score=test_score)
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("only")
    (folder / "score_code.py").write_text(CODE)
    spec = {
        "name": "only",
        "dataset": DATASET,
        "trainer": {"function": "score_code:train"},
        "subsets": {"trials": TRIALS, "design": "balanced"},
        "record": {"scores": "only"},
        "execution": {"device": "cpu", "trials_per_shard": 50},
    }
    (folder / "only.yaml").write_text(json.dumps(spec))
    done = command("run", folder / "only.yaml", "--store", folder / "store")
    assert done.returncode == 0, done.stderr
    for line in (
        r"test score +\d+\.\d+%",
        r"memorized \(mem_p >= 0\.25\)",
        r"selected pairs +\d+ at a false discovery rate of 10%",
        r"\bmem_p_se\b",
    ):
        assert re.search(line, done.stdout), line
    return folder / "store"


@pytest.fixture(scope="module")
def scores(store):
    return memtail.load_scores(store / "experiments" / "only")


@pytest.fixture(scope="module")
def recorded(store):
    """M, and scores of training and test examples."""
    stacked = [TrialBatch.from_bytes(path.read_bytes()) for path in batches(store, "only")]
    assert all(batch.scores_only for batch in stacked)
    scored = (np.concatenate([getattr(batch, f"{split}_score") for batch in stacked]) / 255 for split in ("train", "test"))
    return np.concatenate([unpack(batch.membership, N) for batch in stacked]), *scored


def test_published_files_hold_estimates_of_scores_alone(scores, recorded):
    M, S, P = recorded
    table, summary = scores.memorization, scores.summary
    expected = [S[M[:, i], i].mean() - S[~M[:, i], i].mean() for i in range(N)]
    np.testing.assert_allclose(table["mem_p"], expected, atol=1e-12)
    assert list(table) == ["index", "label", "k_in", "k_out", "mem_p", "mem_p_se", "score_in", "score_out"]
    assert sorted(path.name for path in scores.folder.iterdir()) == [
        "high_infl_pairs_infl0.15_mem0.25.parquet",
        "index.npz",
        "memorization.csv",
        "memorization.parquet",
        "pairs.parquet",
        "statistics.npz",
        "summary.json",
    ]
    assert summary.outcome == json.loads((scores.folder / "summary.json").read_text())["outcome"] == "score"
    assert summary.in_subset_accuracy == pytest.approx(np.mean([S[k, M[k]].mean() for k in range(TRIALS)]))
    assert summary.mem_mean == pytest.approx(np.mean(expected))
    pairs = scores.pairs
    assert set(pairs["tr_idx"]) == {7}
    assert list(pairs) == ["tr_idx", "tt_idx", "infl_p", "infl_p_se", "mem_p", "mem_p_se", "infl_lo", "infl_hi"]
    influences = [P[M[:, 7], j].mean() - P[~M[:, 7], j].mean() for j in pairs["tt_idx"]]
    np.testing.assert_allclose(pairs["infl_p"], influences, atol=1e-12)
    of_class = np.flatnonzero(scores.test_labels == scores.train_labels[7])
    assert sorted(pairs["tt_idx"]) == of_class.tolist()
    selected = scores.selected_pairs
    assert list(selected)[5:] == ["confirmed", "infl_p", "infl_p_se", "infl_lo", "infl_hi", "mem_p", "mem_p_se"]
    assert sorted(selected["tt_idx"]) == of_class.tolist()
    assert set(selected["tr_idx"]) == {7}
    assert selected["confirmed"].all()


def test_the_reader_answers_with_scores_and_names_what_it_lacks(scores):
    most = scores.most_memorized(3)
    assert most["index"][0] == 7
    with pytest.raises(ScoresError, match="there is no mem: only scores are recorded, read mem_p"):
        most_of_correctness = scores.memorization["mem"]  # noqa: F841
    with pytest.raises(ScoresError, match="there is no infl_se: only scores are recorded, read infl_p_se"):
        _ = scores.pairs["infl_se"]
    with pytest.raises(KeyError):
        _ = scores.memorization["no_such_column"]
    with pytest.raises(ScoresError, match="only scores are recorded, and no correctness: use soft_influence"):
        scores.influence(train=7)
    test = int(scores.pairs["tt_idx"][0])
    top = scores.top_influencers(test, 2)
    assert (list(top), top["tr_idx"][0]) == (["tr_idx", "label", "infl_p", "infl_p_se", "mem_p"], 7)
    block = scores.soft_influence(train=7)
    influenced = scores.top_influenced(7, 1)
    assert influenced["infl_p"][0] == block.value.max()
    assert influenced["infl_p_se"][0] == block.standard_error[0, influenced["tt_idx"][0]]
    assert len(scores.to_pandas("memorization")) == N


def test_commands_show_scores_under_their_names(store):
    top = command("top", "only", "--store", store, "-n", "1")
    assert top.stdout.split()[:6] == ["index", "label", "k_in", "k_out", "mem_p", "mem_p_se"]
    status = command("status", "--store", store).stdout
    assert "test score" in status
    assert "test acc." not in status
    study = command("study", "removal", "only", "--store", store)
    assert (study.returncode, study.stderr.count("\n")) == (2, 1)
    assert "experiment 'only' has scores only, and the study removal is of correctness" in study.stderr


def test_pages_show_scores_under_their_names(store, scores, recorded):
    (page,) = store.glob("experiments/only/report/*/report.html")
    report = words(page.read_text().partition("</style>")[2])
    for text in ("Scores alone are recorded, and no correctness", "memorized (mem_p ≥ 0.25)", "infl_p", "in-subset score"):
        assert text in report
    for text in ("accuracy", "Labels to check", "confirmed at", "mem ≥", "mem near"):
        assert text not in report, text
    _, P = recorded[0], recorded[2]
    test = int(scores.pairs["tt_idx"][0])
    client, gallery = opened(LocalStore(store), "/experiments/only?sort=hardest")
    training, tested = (words(client.get(f"/experiments/only/{of}").text) for of in ("train/7", f"test/{test}"))
    assert "Examples by memorization of scores" in gallery.text
    assert "lowest held-out score" in gallery.text
    assert f"memorization of scores {scores.memorization['mem_p'][7]:.3f} ± {scores.memorization['mem_p_se'][7]:.3f}" in training
    assert "in-subset score, 70 models that saw it" in training
    assert re.search(rf"mean score of {TRIALS} models {100 * P[:, test].mean():.1f}% ± ", tested), tested
    for text in (gallery.text, training, tested):
        assert "accuracy" not in text
    assert client.get("/experiments/only/train/7.csv").text.startswith('"tr_idx","class","k_in","k_out","mem_p",')
    influencers = client.get(f"/experiments/only/test/{test}.csv").text
    assert influencers.startswith('"tt_idx","class","score","score_se","models","tr_idx","infl_p",')


def test_the_study_stability_compares_halves_by_their_scores(store, scores):
    done = command("study", "stability", "only", "--store", store)
    assert done.returncode == 0, done.stderr
    packed, labels = scores.statistics, (scores.train_labels, scores.test_labels)
    halves = [Estimates.of(packed.select(trials), *labels) for trials in (np.arange(50), np.arange(50, 100))]
    for half in halves:
        assert set(half.pairs.train) == {7}
    alike = compare(*halves).at_paper_threshold("influence")
    influences = [soft_influence(half.packed, np.array([7]), slice(None)).value[0] for half in halves]
    selected = [set(half.pairs.test.tolist()) for half in halves]
    union = sorted(selected[0] | selected[1])
    assert alike.jaccard == len(selected[0] & selected[1]) / len(union)
    assert alike.difference == pytest.approx(np.abs(influences[0] - influences[1])[union].mean())


def words(page):
    """Text of a page, without tags and line breaks."""
    return " ".join(re.sub("<[^>]+>", " ", page).split())


def test_exports_hold_scores_or_say_that_they_need_correctness(store, scores, tmp_path):
    opened_store = LocalStore(store)
    (path,) = planned(opened_store, "only", "infl-mem").write(tmp_path)
    with np.load(path) as arrays:
        np.testing.assert_allclose(arrays["memorization"], scores.memorization["mem_p"], rtol=1e-6)
        np.testing.assert_allclose(arrays["influence"], scores.soft_influence().value.T, atol=1e-7)
    (path,) = planned(opened_store, "only", "cscores").write(tmp_path)
    with np.load(path) as arrays:
        np.testing.assert_array_equal(arrays["scores"], scores.memorization["score_out"])
    for form in ("authors", "zenodo"):
        with pytest.raises(ScoresError, match="experiment 'only' has scores only, and this format consists of correctness: choose"):
            planned(opened_store, "only", form)


def test_the_aggregator_publishes_the_same_files_from_the_trial_batches_alone(store, scores, tmp_path):
    bucket = LocalStore(tmp_path / "bucket")
    for key in ("experiment.json", "trials"):
        source, target = (root / "experiments/only" / key for root in (store, bucket.root))
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    stage(prepare(Experiment.parse({"name": "only", "dataset": DATASET}).dataset), bucket)
    aggregator = Aggregator(bucket, ServiceSettings(store=bucket.address))
    while not (bucket.root / "experiments/only/scores/latest.json").exists():
        aggregator.catch_up()
    published = memtail.load_scores(bucket.root / "experiments/only")
    assert published.folder.name == scores.folder.name
    for path in scores.folder.iterdir():
        assert (published.folder / path.name).read_bytes() == path.read_bytes(), path.name
    value = REGISTRY.get_sample_value("memtail_accuracy_ratio", {"experiment": "only", "examples": "held_out_score"})
    assert value == pytest.approx(scores.summary.held_out_accuracy)
    assert REGISTRY.get_sample_value("memtail_accuracy_ratio", {"experiment": "only", "examples": "held_out"}) is None


def test_an_experiment_with_correctness_is_not_continued_without_it(store, tmp_path):
    spec = json.loads((store.parent / "only.yaml").read_text()) | {"record": {"scores": True}}
    with pytest.raises(MemtailError, match=r"record\.scores only -> null"):
        memtail.run(Experiment.parse(spec, base=store.parent), store)


def test_code_that_returns_correctness_instead_fails_with_one_line(tmp_path):
    (tmp_path / "score_code.py").write_text(CODE.replace("memtail.Outcome(", "memtail.Outcome(train_score > 0.5, test_score > 0.5, "))
    spec = {"name": "only", "dataset": DATASET, "trainer": {"function": "score_code:train"}, "record": {"scores": "only"}}
    (tmp_path / "only.yaml").write_text(json.dumps(spec))
    done = command("trainer", "check", tmp_path / "only.yaml")
    assert done.returncode == 2
    assert (
        "trial 0 of score_code:train: train_correct was returned, and the experiment records scores only: remove it, or declare record: "
        "{scores: true}"
    ) in done.stderr


def test_an_experiment_of_scores_without_labels_and_test_examples_ends_at_its_standard_error(tmp_path):
    (tmp_path / "data.py").write_text(
        "import numpy as np\nimport memtail\n\n"
        "def load():\n    return {'train_texts': [f'text {i}' for i in range(40)]}\n\n"
        "def train(task):\n    score = np.random.default_rng(task.seed).random(40) / 4\n    score[task.subset] += 0.5\n"
        "    return memtail.Outcome(train_score=score)\n"
    )
    spec = {
        "name": "texts",
        "dataset": {"function": "data:load"},
        "trainer": {"function": "data:train"},
        "subsets": {"until": {"standard_error": 0.02}},
        "record": {"scores": "only"},
        "execution": {"device": "cpu", "trials_per_shard": 16},
    }
    result = memtail.run(Experiment.parse(spec, base=tmp_path), tmp_path / "store")
    assert result.summary.mem_se_quantile(0.95) <= 0.02
    assert result.summary.pairs.count == 0
    assert (np.abs(result.scores.memorization["mem_p"] - 0.5) < 0.1).all()
    assert result.scores.test_labels.tolist() == []
