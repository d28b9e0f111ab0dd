"""Studies through the command line, on digits."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import memtail
from memtail import datasets
from memtail.cli.app import app
from memtail.datasets.staged_dataset import fetch
from memtail.datasets.staged_inputs import fetch_inputs
from memtail.errors import MemtailError, ScoresError
from memtail.execution.aggregation import Aggregation, Pace
from memtail.execution.declare import declare as declare_record
from memtail.execution.embedded import run
from memtail.execution.submit import submit
from memtail.experiment_store import Control, ExperimentStore
from memtail.models import build_model
from memtail.settings import Settings
from memtail.spec import Experiment, NamedModel
from memtail.storage import keys
from memtail.storage.local import LocalStore
from memtail.studies import STUDIES
from memtail.studies.duplicates import measure
from memtail.studies.features import features_of
from memtail.studies.result import load_results
from memtail.studies.retraining import derive_experiment, require_finished
from memtail.studies.study import Study
from memtail.trainers.images.shard_size import checked_shard_size
from memtail.trials import Shard, unpack
from tests.support.arrays import write_arrays
from tests.support.batches import commit
from tests.support.cli import invoke

SPEC = {
    "name": "digits",
    "dataset": {"name": "digits"},
    "model": {"name": "mlp", "hidden": [32]},
    "training": {"epochs": 5},
    "subsets": {"trials": 128},
    "execution": {"device": "cpu"},
}


@pytest.fixture(scope="module")
def store(own_cache, tmp_path_factory):
    """A store with a finished experiment, and a copy of it under another name."""
    folder = tmp_path_factory.mktemp("studies") / "store"
    run(Experiment.parse(SPEC), folder)
    shutil.copytree(folder / "experiments" / "digits", folder / "experiments" / "again")
    record = folder / "experiments" / "again" / "experiment.json"
    record.write_text(record.read_text().replace('"name": "digits",\n  "dataset"', '"name": "again",\n  "dataset"'))
    return LocalStore(folder)


def study(store, *arguments):
    """Runs `memtail study` in this process; raises the error that users would see."""
    return invoke(store.address, "study", *arguments)


def rows(store, result):
    import pyarrow.parquet

    return pyarrow.parquet.read_table(store.local_path(result.prefix + "result.parquet")).to_pandas()


def result_of(store, study_name, name="digits"):
    (result,) = [each for each in load_results(store, name) if each.study == study_name]
    assert store.get(result.prefix + "figure.png").startswith(b"\x89PNG")
    assert b"</svg>" in result.figure_svg()
    return result


def bits(store, name):
    """Membership and test outcomes of all trials of an experiment, and their metrics."""
    experiment_store = ExperimentStore(store, name)
    record = experiment_store.read_record()
    batches = [experiment_store.batch(shard, record) for shard in experiment_store.committed()]
    members = np.concatenate([unpack(batch.membership, record.n_train) for batch in batches])
    correct = np.concatenate([unpack(batch.test_correct, record.n_test) for batch in batches])
    return members, correct, [entry for batch in batches for entry in batch.metrics]


def test_removal_trains_without_the_memorized_examples_and_without_equally_many_random_ones(store):
    text = study(store, "removal", "digits", "--theta", 0.25, "--theta", 0.5, "--repeats", 4)
    result = result_of(store, "removal")
    assert result.findings[0] in text
    assert result.trials == 20
    members, correct, metrics = bits(store, result.experiments[0])
    mem = memtail.load_scores(f"{store.address}/experiments/digits").memorization["mem"]
    assert members[:4].all()
    for place, theta in ((4, 0.25), (12, 0.5)):
        assert (members[place : place + 4] == (mem < theta)).all()
        assert 0 < (mem >= theta).sum() < len(mem)
        random = members[place + 4 : place + 8]
        assert (random.sum(1) == (mem < theta).sum()).all()
        assert len(np.unique(random, axis=0)) == 4
    accuracy = np.array([entry.test_accuracy for entry in metrics])
    table = rows(store, result)
    np.testing.assert_allclose(table["test_accuracy"], accuracy)
    loss = result.measured["losses"][0]
    assert loss["theta"] == 0.25
    assert loss["memorized"]["value"] == pytest.approx(accuracy[:4].mean() - accuracy[4:8].mean())
    assert loss["difference"]["value"] == pytest.approx(accuracy[8:12].mean() - accuracy[4:8].mean())
    assert len(np.unique(correct[4:8], axis=0)) == 4  # one subset, but different models

    # a second call resumes the study, and trains no trial twice
    folder = store.local_path(f"experiments/{result.experiments[0]}/trials")
    held = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    min(held).unlink()
    with pytest.raises(ScoresError, match=f"10 trials were removed .*: train them again with memtail resume {result.experiments[0]}"):
        study(store, "removal", "digits", "--theta", 0.25, "--theta", 0.5, "--repeats", 4)
    ExperimentStore(store, result.experiments[0]).reopen("resumed")
    study(store, "removal", "digits", "--theta", 0.25, "--theta", 0.5, "--repeats", 4)
    assert [path for path in folder.iterdir() if held[path] != path.stat().st_mtime_ns] == [min(held)]
    assert result_of(store, "removal").measured == result.measured


def test_the_loss_without_the_pairs_is_split_into_the_influenced_and_the_rest(store):
    study(store, "removal", "digits", "--pairs", "--repeats", 4)
    result = result_of(store, "removal-pairs")
    pairs = memtail.load_scores(f"{store.address}/experiments/digits").pairs
    members, correct, _ = bits(store, result.experiments[0])
    assert (np.flatnonzero(~members[4]) == np.unique(pairs["tr_idx"])).all()
    influenced = np.unique(pairs["tt_idx"])
    assert result.measured["removed"] == len(np.unique(pairs["tr_idx"]))
    assert result.measured["influenced"] == len(influenced)
    losses = {part: interval["value"] for part, interval in result.measured["losses"]["pairs"].items()}
    assert losses["all"] == pytest.approx(losses["influenced"] + losses["rest"])
    lost = (correct[:4].mean(0) - correct[4:8].mean(0))[influenced].sum() / correct.shape[1]
    assert losses["influenced"] == pytest.approx(lost)
    assert lost > 0


def test_a_submitted_study_needs_only_the_store_and_is_evaluated_once_trained(store, tmp_path, monkeypatch):
    arguments = ("removal", "digits", "--theta", 0.75, "--repeats", 2)
    entered = json.loads(study(store, *arguments, "--submit", "--json"))
    assert entered["trained"] is False
    assert entered["trials"] == 6
    experiment_store = ExperimentStore(store, entered["experiment"])
    assert not experiment_store.committed()
    monkeypatch.setenv("MEMTAIL_CACHE", str(tmp_path / "cache of a worker"))
    record = experiment_store.read_record()
    fetched = fetch_inputs(record.experiment, record.canonical, store, Settings().cache)
    dataset = fetch(store, record.canonical["dataset"]["fingerprint"], Settings().cache)
    run(fetched, store.address, dataset=dataset)
    result = json.loads(study(store, *arguments, "--submit", "--json"))
    assert result["study"] == "removal"
    assert result["trials"] == 6
    assert result["experiments"] == [entered["experiment"]]


def test_a_higher_overlap_needs_more_trials(store):
    study(store, "stability", "digits", "--wanted", 0.5)
    few = result_of(store, "stability")
    study(store, "stability", "digits", "--wanted", 0.9)
    many = result_of(store, "stability")
    assert many.trials == 128
    assert many.measured["trials"] == 64
    assert 0 < many.measured["jaccard"]["memorization"] < 1
    assert few.measured["jaccard"] == many.measured["jaccard"]
    table = rows(store, many)
    assert set(table["trials"]) == {64}
    assert set(table["split"]) == set(range(5))
    assert set(table["score"]) == {"memorization", "influence", "adjusted influence"}
    assert set(many.measured["trials_needed"]) == {"memorization", "influence", "adjusted influence"}
    unknown = {"trials": None, "beyond": None, "fewest": None, "most": None, "measured": False}
    assert many.measured["trials_needed"]["memorization"] == unknown  # no slope from a single number of trials
    assert few.measured["trials_needed"]["memorization"] == {**unknown, "trials": 64, "measured": True}


def test_equal_experiments_agree_as_one_does_with_itself(store):
    study(store, "architectures", "digits", "again")
    result = result_of(store, "architectures")
    assert result.experiments == ["digits", "again"]
    assert result.trials == 256
    assert result.measured["trials"] == 64
    agreement = result.measured["agreement"]
    assert list(agreement) == ["digits and itself", "digits and again", "again and itself"]
    # differences by chance alone: compared sets share no trial, although the two experiments have equal trials
    assert agreement["digits and again"] == agreement["digits and itself"] == agreement["again and itself"]
    assert 0 < agreement["digits and again"]["memorization"] < 1
    assert 0 < agreement["digits and again"]["rank_correlation"] < 1
    table = rows(store, result)
    assert set(table["split"]) == set(range(5))
    assert set(table["trials"]) == {64}


def test_planted_near_duplicates_are_detected_at_any_brightness():
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, 200, (count, 8, 8, 1)).astype(np.uint8) for count in (300, 300))
    test[3] = train[7] // 2 + 40  # darker and with less contrast
    train[20] = np.clip(train[11] + rng.integers(-4, 5, train[11].shape), 0, 255)
    train[30] = 17  # constant
    distances = measure(SimpleNamespace(train_images=train, test_images=test), np.array([7, 8]), np.array([3, 3]), nearness=0.33)
    assert np.flatnonzero(distances.test <= distances.threshold).tolist() == [3]
    assert distances.test_nearest[3] == 7
    assert np.flatnonzero(distances.train <= distances.threshold).tolist() == [11, 20]
    assert (distances.train_nearest[11], distances.train_nearest[20]) == (20, 11)
    assert distances.pairs[0] == pytest.approx(distances.test[3])
    assert distances.pairs[1] > distances.threshold


def test_duplicates_are_detected_by_pixels_and_features_and_split_the_loss(store):
    study(store, "duplicates", "digits", "--repeats", 4, "--nearness", 2)
    result = result_of(store, "duplicates")
    table = rows(store, result)
    assert set(table["space"]) == {"pixels", "features"}
    assert len(table) == 2 * 1797
    by_pixels = table[(table["space"] == "pixels") & (table["split"] == "test")]
    assert result.measured["pixels"]["test"] == by_pixels["near_duplicate"].sum() > 0
    assert 0 < result.measured["pairs_without"] < result.measured["pairs"]
    split = result.measured["removal"]
    study(store, "removal", "digits", "--pairs", "--repeats", 4)
    whole = result_of(store, "removal-pairs").measured["losses"]["pairs"]["influenced"]["value"]
    assert split["duplicates"]["value"] + split["others"]["value"] == pytest.approx(whole)


def test_the_last_layer_alone_is_trained_on_the_same_subsets_and_memorizes_less(store):
    study(store, "last-layer", "digits")
    result = result_of(store, "last-layer")
    alone = ExperimentStore(store, result.experiments[1]).read_record()
    assert alone.canonical["dataset"]["fingerprint"] == json.loads(store.get("experiments/digits/features.json"))["dataset"]
    assert (bits(store, "digits")[0] == bits(store, result.experiments[1])[0]).all()
    for label, name in (("whole model", "digits"), ("last layer", result.experiments[1])):
        mem = memtail.load_scores(f"{store.address}/experiments/{name}").memorization["mem"]
        assert result.measured[label]["memorized"] == (mem >= 0.25).sum()
    assert 0 < result.measured["last layer"]["memorized"] < result.measured["whole model"]["memorized"]
    assert result.measured["last layer"]["test_accuracy"] > 0.9
    assert result.measured["last layer"]["memorized_error"] > 0

    # more trials of the whole model require more of the last layer; the features are reused
    experiment_store = ExperimentStore(store, "digits")
    run(experiment_store.read_record().with_trials(144).experiment, store.address)
    study(store, "last-layer", "digits")
    extended = result_of(store, "last-layer")
    assert extended.experiments == result.experiments
    assert extended.trials == 288


def test_a_study_needs_final_scores(store):
    experiment_store = ExperimentStore(store, "again")
    experiment_store.extend(1000)
    for arguments in (("removal",), ("removal", "--pairs"), ("last-layer",), ("duplicates",)):
        with pytest.raises(MemtailError, match="has scores of 128 of 1000 trials"):
            study(store, arguments[0], "again", *arguments[1:])
    experiment_store.set_control(Control("cancelled"))
    study(store, "removal", "again", "--theta", 0.5, "--theta", 1.5, "--repeats", 2)
    assert "No example has mem >= 1.5." in result_of(store, "removal", "again").findings


def test_a_model_that_diverges_has_no_features(store, short):
    del short
    record = ExperimentStore(store, "short").read_record()
    declaration = record.experiment.model_dump(mode="json")
    declaration["training"]["optimizer"]["lr"] = 1e30
    declaration["name"] = "diverging"
    diverging = Experiment.parse(declaration)
    ExperimentStore(store, "diverging").register(
        declare_record(diverging, datasets.prepare(diverging.dataset), checked_shard_size(diverging, datasets.prepare(diverging.dataset)))
    )
    record = ExperimentStore(store, "diverging").read_record()
    with pytest.raises(MemtailError, match="'diverging': the model trained on all examples diverged"):
        features_of(store, record, lambda: datasets.prepare(diverging.dataset))
    assert not store.exists(keys.features("diverging"))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["removal", "nothing"], "no experiment 'nothing'"),
        (["removal", "digits", "--theta", "2"], "no example of mem >= 2.0: give lower --theta"),
        (["removal", "digits", "--theta", "-2"], "none is left to train on"),
        (["removal", "digits", "--pairs", "--theta", "0.5"], "--theta 0.5"),
        (["architectures", "digits"], "name two experiments or more"),
        (["stability", "short"], "has 20 trials, a split needs at least 100"),
        (["removal", "short", "--pairs"], "has no high-influence pairs"),
        (["architectures", "digits", "short"], "compare experiments on the same images"),
    ],
)
def test_a_refused_study_is_one_line(store, short, arguments, line):
    with pytest.raises(MemtailError, match=line):
        study(store, *arguments)


@pytest.fixture(scope="module")
def short(store):
    """Declare an experiment of few trials on few, easy images."""
    parts = {"dataset": {"name": "arrays", "root": str(write_arrays(store.root / "few.npz"))}, "subsets": {"trials": 20}}
    run(Experiment.parse({**SPEC, "name": "short", **parts}), store.address)


def test_a_study_of_another_module_gets_its_command_from_the_dictionary(store, monkeypatch, tmp_path):
    (tmp_path / "own_study.py").write_text(
        "from typing import Annotated\n"
        "import typer\n"
        "from memtail.studies.options import ExperimentName\n"
        "from memtail.studies.result import StudyResult\n"
        "from memtail.studies.study import Prepared\n"
        "def prepare(store, name: ExperimentName, *, share: Annotated[float, typer.Option(min=0, max=1)] = 0.5):\n"
        "    return Prepared(lambda: StudyResult(store, name, 'own', 'Own', [f'share {share}'], 1, [name], {}, {}))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(STUDIES, "own", Study("own_study", "Study something else."))
    assert "* share 0.25" in study(store, "own", "digits", "--share", 0.25)
    listing = CliRunner().invoke(app, ["study", "--help"]).stdout
    assert re.search(r"own +Study something else\.", listing)
    options = CliRunner().invoke(app, ["study", "own", "--help"]).stdout
    assert "--share" in options
    assert "--submit" not in options  # it trains no models


def test_a_study_of_fine_tuned_models_starts_from_the_same_weights(tmp_path, declare, digits):
    network, weights = {"name": "resnet9", "options": {"width": 2}}, tmp_path / "w.pt"
    torch.save(build_model(NamedModel(**network), digits.image_shape, 10).state_dict(), weights)
    content, store = weights.read_bytes(), LocalStore(tmp_path / "store")
    parts = {"subsets": {"design": "balanced"}, "execution": {"trials_per_shard": 4, "device": "cpu"}}
    experiment = declare(8, model={**network, "weights": str(weights)}, **parts)
    submit(experiment, store, dataset=digits)
    experiment_store = ExperimentStore(store, "digits")
    commit(experiment_store, Shard(0, 3), Shard(4, 7))
    aggregation = Aggregation(experiment_store, experiment_store.read_record(), digits, Pace(1, 1, first_at_once=True))
    aggregation.accumulate_new()
    aggregation.publish()
    assert aggregation.finish()

    def starts_from():
        masks = np.ones((2, digits.n_train), bool)
        return derive_experiment(require_finished(store, "digits"), "removal", masks).model.weights_file

    assert starts_from() == weights
    weights.write_bytes(b"others")
    assert starts_from() != weights
    assert starts_from().read_bytes() == content
