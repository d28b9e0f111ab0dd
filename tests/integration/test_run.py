"""Embedded runs through the public interface: scores, resuming, errors, and planted effects."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas
import pytest
import scipy.stats
import torch
import yaml

import memtail
from memtail.errors import MemtailError, ScoresError, ShardsFailedError, SpecError, StoreError, TrainerError, UnsupportedError
from memtail.execution.embedded import run
from memtail.experiment_store import ExperimentStore
from memtail.scores.pointer import latest_version
from memtail.scores.publish import publish
from memtail.statistics import Statistics
from memtail.storage.local import LocalStore
from memtail.trainers.images import devices
from memtail.trainers.shard_trainer import ShardTrainer
from memtail.trials import unpack
from memtail.user_code import describe_fault, names_a_place
from tests.support.arrays import write_arrays, write_tree
from tests.support.cli import batches, command, same_files, version
from tests.support.cli import write_spec as spec


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A store with a finished run, for comparison."""
    folder = tmp_path_factory.mktemp("finished")
    result = command("run", spec(folder), "--store", folder / "store")
    assert result.returncode == 0, result.stderr
    return folder / "store", result.stdout


def test_a_run_of_too_many_trials_is_refused_in_one_line(tmp_path):
    path = spec(tmp_path)
    content = yaml.safe_load(path.read_text())
    content["subsets"]["trials"] = 10**9
    path.write_text(yaml.safe_dump(content))
    result = command("run", path, "--store", tmp_path / "store")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("memtail: experiment ")
    assert "has 1000000000 trials, and at most 1000000 are allowed: declare fewer trials, or raise MEMTAIL_MAX_TRIALS" in result.stderr


def test_a_run_prints_the_spec_the_progress_and_the_summary(finished):
    store, text = finished
    assert "batch_size: 64" in text
    assert "60/60 trials" in text
    assert "in-subset accuracy" in text
    assert "most memorized" in text
    assert str(version(store)) in text
    assert "These scores rest on only 60 trials" in text


def test_a_second_run_trains_nothing_and_publishes_the_same_bits(finished, tmp_path):
    store, _ = finished
    before = {path: path.stat().st_mtime_ns for path in batches(store)}
    folder = version(store)
    held = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = command("run", spec(tmp_path), "--store", store)
    assert result.returncode == 0
    assert "all from the store" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in batches(store)} == before
    assert version(store) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == held


def test_more_trials_extend_an_experiment_to_the_scores_of_a_single_run(finished, tmp_path):
    store, _ = finished
    assert command("run", spec(tmp_path, subsets={"trials": 33}), "--store", tmp_path / "store").returncode == 0
    assert command("run", spec(tmp_path), "--store", tmp_path / "store").returncode == 0
    assert same_files(version(store), version(tmp_path / "store"))
    assert len(list((tmp_path / "store" / "experiments" / "digits" / "scores").glob("0*"))) == 2


def test_memorization_by_epoch_is_that_of_the_recorded_outcomes(tmp_path, declare, digits):
    experiment = declare(40, training={"epochs": 3}, record={"snapshots": [1, 3]}, execution={"device": "cpu", "trials_per_shard": 16})
    memtail.run(experiment, tmp_path)
    scores = memtail.load_scores(tmp_path / "experiments" / "digits")
    table = scores.to_pandas("snapshots")
    assert table.columns.tolist() == ["index", "epoch", "mem", "mem_se", "mem_lo", "mem_hi"]
    assert table["epoch"].unique().tolist() == [1, 3]
    last = table[table["epoch"] == 3]
    assert (last["mem"].to_numpy() == scores.memorization["mem"]).all()
    for column in ("mem_se", "mem_lo", "mem_hi"):
        assert (last[column].to_numpy() == scores.memorization[column]).all()
    experiment_store = ExperimentStore(LocalStore(tmp_path), "digits")
    record = experiment_store.read_record()
    held = [experiment_store.batch(shard, record) for shard in experiment_store.committed()]
    M = np.concatenate([unpack(batch.membership, digits.n_train) for batch in held])
    C = np.concatenate([unpack(batch.snapshot_correct[0], digits.n_train) for batch in held])
    expected = (M & C).sum(0) / M.sum(0) - (~M & C).sum(0) / (~M).sum(0)
    first = table[table["epoch"] == 1]
    np.testing.assert_allclose(first["mem"], expected, atol=1e-12)
    assert first["index"].tolist() == list(range(digits.n_train))
    parts = experiment.model_dump(include={"training", "execution"})
    for trials, snapshots, published in ((44, [1], [1]), (45, [], [])):
        memtail.run(declare(trials, record={"snapshots": snapshots}, **parts), tmp_path)
        extended = memtail.load_scores(tmp_path / "experiments" / "digits")
        assert extended.summary.trials == trials
        assert extended.to_pandas("snapshots").get("epoch", np.array([])).tolist() == published * digits.n_train


def test_a_run_that_requires_one_kind_of_device_refuses_to_continue_on_another(tmp_path, declare, monkeypatch):
    execution = {"device": "cpu", "trials_per_shard": 4, "require": "same-device"}
    memtail.run(declare(8, subsets={"design": "balanced"}, execution=execution), tmp_path)
    batches_before = batches(tmp_path)
    here = devices.device_kind(torch.device("cpu"))
    monkeypatch.setattr(devices, "cpu_name", lambda: "another processor")
    assert memtail.run(declare(8, subsets={"design": "balanced"}, execution=execution), tmp_path).summary.trials == 8
    with pytest.raises(UnsupportedError, match=re.escape(f"'digits' is trained on {here} only (execution.require: same-device), and this")):
        memtail.run(declare(16, subsets={"design": "balanced"}, execution=execution), tmp_path)
    assert batches(tmp_path) == batches_before
    assert memtail.run(declare(16, subsets={"design": "balanced"}, execution={**execution, "require": None}), tmp_path).summary.trials == 16


def test_a_run_trains_chosen_shards_a_second_time_after_its_scores_are_published(tmp_path, declare, monkeypatch):
    parts = {"subsets": {"design": "balanced"}, "execution": {"device": "cpu", "trials_per_shard": 4, "verify": 1.0}}
    experiment_store = ExperimentStore(LocalStore(tmp_path), "digits")
    published = []
    record_replica = ExperimentStore.record_replica

    def observed(self, replica):
        published.append(latest_version(self.store, "digits").summary.trials)
        record_replica(self, replica)

    monkeypatch.setattr(ExperimentStore, "record_replica", observed)
    assert memtail.run(declare(8, **parts), tmp_path).summary.trials == 8
    assert experiment_store.trained_twice() == dict.fromkeys(experiment_store.committed(), False)
    assert published == [8, 8]
    memtail.run(declare(8, **parts), tmp_path)
    assert published == [8, 8]


def test_another_experiment_under_the_name_is_refused_and_nothing_is_lost(finished, tmp_path):
    store, _ = finished
    held = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    result = command("run", spec(tmp_path, training={"epochs": 5}), "--store", store)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "(training.epochs 4 -> 5): choose another name" in result.stderr
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == held


def test_a_foreign_or_corrupt_batch_is_refused_recorded_and_left_out_of_the_scores(finished, tmp_path):
    store, _ = finished
    run = spec(tmp_path, training={"epochs": 5})
    (tmp_path / "store" / "experiments" / "digits" / "trials").mkdir(parents=True)
    foreign = tmp_path / "store" / "experiments" / "digits" / "trials" / batches(store)[0].name
    data = batches(store)[0].read_bytes()
    experiment_store = ExperimentStore(LocalStore(tmp_path / "store"), "digits")
    for reason, content in (("truncated or corrupt", data[:100]), ("belongs to another experiment", data)):
        foreign.write_bytes(content)
        result = command("run", run, "--store", tmp_path / "store")
        assert result.returncode == 1
        line = result.stderr.splitlines()[-1]
        assert line.startswith("memtail: 1 trial batch refused")
        assert foreign.name in line
        assert reason in line
        assert latest_version(experiment_store.store, "digits").summary.trials == 55
        *_, failure = experiment_store.failures()
        assert reason in failure.error
    foreign.unlink()
    result = command("run", run, "--store", tmp_path / "store")
    assert result.returncode == 0, result.stderr
    assert latest_version(experiment_store.store, "digits").summary.trials == 60


def test_the_pointer_never_goes_back_to_fewer_trials(finished, digits):
    store, _ = finished
    experiment_store = ExperimentStore(LocalStore(store), "digits")
    record = experiment_store.read_record()
    behind = Statistics(digits.n_train, digits.n_test)
    behind.accumulate(experiment_store.batch(experiment_store.committed()[0], record))
    before = latest_version(experiment_store.store, "digits")
    assert publish(experiment_store.store, record, behind, digits)["trials"] == 5
    assert latest_version(experiment_store.store, "digits") == before
    top = command("top", "--store", store)
    assert top.returncode == 0
    assert "rest on only 60 trials" in top.stderr
    assert "trials" not in top.stdout


def test_damaged_scores_are_one_clear_error_and_a_run_repairs_the_pointer(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "store")
    folder = version(tmp_path / "store")
    for damage in ("{", '{"version": "gone"}'):
        (folder.parent / "latest.json").write_text(damage)
        result = command("top", "--store", tmp_path / "store")
        assert result.returncode == 2
        assert "latest.json: is damaged" in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert command("status", "--store", tmp_path / "store").returncode == 0
    assert command("run", spec(tmp_path), "--store", tmp_path / "store").returncode == 0
    assert same_files(version(tmp_path / "store"), version(finished[0]))
    (folder / "memorization.parquet").write_bytes(b"PAR1")
    result = command("top", "--store", tmp_path / "store")
    assert result.returncode == 2
    assert "memorization.parquet: is missing or damaged" in result.stderr
    assert "Traceback" not in result.stderr


def test_names_with_brackets_are_shown_unchanged(tmp_path):
    write_tree(tmp_path / "images", count=6)
    for split in ("train", "val"):
        (tmp_path / "images" / split / "cat").rename(tmp_path / "images" / split / "a[red]")
    few = {"trials": 8, "design": "balanced", "fraction": 0.5}
    path = spec(tmp_path, "folder", dataset={"name": "folder", "root": "images"}, training={"epochs": 1}, subsets=few)
    result = command("run", path, "--store", tmp_path / "st[/v1]")
    assert result.returncode == 0
    assert "a[red]/" in result.stdout
    assert f"--store {tmp_path}/st[/v1]" in result.stdout


def test_examples_with_flipped_labels_are_memorized_far_more_than_the_rest(tmp_path, digits):
    labels = np.array(digits.train_labels)
    flipped = np.random.default_rng(0).choice(len(labels), 30, replace=False)
    labels[flipped] = (labels[flipped] + 5) % 10
    images = {"train_images": digits.train_images, "test_images": digits.test_images, "test_labels": digits.test_labels}
    np.savez(tmp_path / "flipped.npz", train_labels=labels, **images)
    mem = _run_arrays(tmp_path, "flipped").memorization["mem"]
    rest = np.delete(mem, flipped)
    # a few digits resemble their flipped label
    assert np.median(mem[flipped]) > 0.9
    assert np.quantile(mem[flipped], 0.1) > 0.6
    assert rest.mean() < 0.1
    assert np.mean(mem[flipped][:, None] > rest) > 0.95


def test_a_copy_with_a_rare_label_is_the_top_influencer_of_its_test_image(tmp_path, digits):
    # Test images of 8 relabelled as class 10: only their copies in the training set, the only members of that class, help.
    test_labels, labels, train = np.array(digits.test_labels), np.array(digits.train_labels), np.array(digits.train_images)
    eights = np.flatnonzero(test_labels == 8)[:3]
    test_labels[eights] = 10
    planted = np.array([100, 200, 300])
    train[planted], labels[planted] = digits.test_images[eights], 10
    np.savez(tmp_path / "twins.npz", train_images=train, train_labels=labels, test_images=digits.test_images, test_labels=test_labels)
    scores = _run_arrays(tmp_path, "twins")
    for twin, test in zip(planted, eights, strict=True):
        top = scores.top_influencers(int(test), 3)
        assert top["tr_idx"][0] == twin
        assert top["infl"][0] > 0.5
        assert top["infl"][0] > top["infl"][1] + 0.2
        assert scores.top_influenced(int(twin), 1)["tt_idx"][0] == test
        assert (int(twin), int(test)) in set(zip(scores.pairs["tr_idx"].tolist(), scores.pairs["tt_idx"].tolist(), strict=True))
        assert (int(twin), int(test)) in set(zip(*(scores.selected_pairs[column].tolist() for column in ("tr_idx", "tt_idx")), strict=True))
    pairs = scores.pairs
    assert [*pairs][-2:] == ["infl_lo", "infl_hi"]
    assert ((pairs["infl_lo"] <= pairs["infl"]) & (pairs["infl"] <= pairs["infl_hi"])).all()
    packed, table = scores.statistics, scores.to_pandas("selected_pairs")
    train, test = table["tr_idx"].to_numpy(), table["tt_idx"].to_numpy()
    assert table["infl_adjusted"].is_monotonic_decreasing
    assert (table["q_value"] <= 0.1).all()
    assert (labels[train] == test_labels[test]).all()
    block = scores.influence()
    np.testing.assert_array_equal(table["infl"], block.value[train, test])
    np.testing.assert_array_equal(table["infl_se"], block.standard_error[train, test])
    assert ((table["infl_lo"] <= table["infl"]) & (table["infl"] <= table["infl_hi"])).all()
    np.testing.assert_array_equal(table["mem"], scores.memorization["mem"][train])
    null = scipy.stats.hypergeom(packed.trials, packed.correct_on_test[test], packed.k_in[train])
    assert (table["confirmed"] == (null.sf(block.both[train, test]) + null.pmf(block.both[train, test]) / 2 <= 0.05)).all()
    assert table["confirmed"].any()
    strongest = pandas.DataFrame(scores.strongest_pairs(len(table)))
    assert strongest["confirmed"].is_monotonic_decreasing
    assert all(group["infl"].is_monotonic_decreasing for _, group in strongest.groupby("confirmed"))
    assert (strongest["label"] == labels[strongest["tr_idx"]]).all()
    assert scores.strongest_pairs(3)["tr_idx"].tolist() == strongest["tr_idx"].tolist()[:3]
    summary = scores.summary.selected_pairs
    assert (summary.count, summary.confirmed) == (len(table), table["confirmed"].sum())
    assert (summary.train_examples, summary.test_examples) == (table["tr_idx"].nunique(), table["tt_idx"].nunique())
    assert (summary.mem_threshold, summary.infl_threshold, summary.false_discovery_rate) == (0.25, 0.17, 0.1)


def _run_arrays(tmp_path, name):
    experiment = memtail.Experiment.parse(
        {
            "name": name,
            "dataset": {"name": "arrays", "root": tmp_path / f"{name}.npz"},
            "model": {"name": "mlp", "hidden": [128, 128]},
            "training": {"epochs": 40, "optimizer": {"weight_decay": 0.0}},
            "subsets": {"trials": 60},
        }
    )
    memtail.run(experiment, tmp_path / "store")
    return memtail.load_scores(tmp_path / "store" / "experiments" / name)


def test_published_files_equal_a_computation_with_plain_numpy(finished, digits):
    store, _ = finished
    folder = version(store)
    stacked = [dict(np.load(path)) for path in batches(store)]
    M, C, T = (
        np.concatenate([unpack(part[name], count) for part in stacked]).astype(int)
        for name, count in (("membership", digits.n_train), ("train_correct", digits.n_train), ("test_correct", digits.n_test))
    )
    mem = (M * C).sum(0) / M.sum(0) - ((1 - M) * C).sum(0) / (1 - M).sum(0)
    everything = M.T @ T / M.sum(0)[:, None] - (1 - M).T @ T / (1 - M).sum(0)[:, None]
    with np.load(folder / "infl_matrix.npz") as archive:
        assert (archive["tr_labels"] == digits.train_labels).all()
        assert (archive["tt_labels"] == digits.test_labels).all()
        np.testing.assert_allclose(archive["tr_mem"], mem, atol=1e-12)
        for label in range(10):
            train, test = archive[f"tr_classidx_{label}"], archive[f"tt_classidx_{label}"]
            assert (train == np.flatnonzero(digits.train_labels == label)).all()
            assert (test == np.flatnonzero(digits.test_labels == label)).all()
            block = archive[f"infl_matrix_class{label}"]
            assert block.shape == (len(train), len(test))
            np.testing.assert_allclose(block, everything[np.ix_(train, test)], atol=1e-6)
    with np.load(folder / "high_infl_pairs_infl0.15_mem0.25.npz") as archive:
        train, test = archive["tr_idx"], archive["tt_idx"]
        assert train.dtype == test.dtype == np.int64
        assert archive["infl"].dtype == archive["mem"].dtype == np.float64
        np.testing.assert_allclose(archive["infl"], everything[train, test], atol=1e-12)
        wanted = (mem[:, None] >= 0.25) & (everything >= 0.15) & (digits.train_labels[:, None] == digits.test_labels)
        assert len(train) == wanted.sum() > 0
        assert wanted[train, test].all()
    import pandas as pd

    for table in (pd.read_csv(folder / "memorization.csv"), pd.read_parquet(folder / "memorization.parquet")):
        assert table["index"].tolist() == list(range(digits.n_train))
        assert (table["label"] == digits.train_labels).all()
        np.testing.assert_allclose(table["mem"], mem, atol=1e-9)


def test_the_reader_returns_rows_columns_blocks_and_top_k(finished, digits):
    store, _ = finished
    scores = memtail.load_scores(store / "experiments" / "digits")
    everything = scores.influence().value
    assert everything.shape == (digits.n_train, digits.n_test)
    assert (scores.influence(train=[3, 5], test=slice(0, 4)).value == everything[[3, 5], :4]).all()
    assert (scores.influence(train=7, test=-1).value == everything[[7], -1:]).all()
    np.testing.assert_array_equal(scores.top_influencers(8, 5)["infl"], np.sort(everything[:, 8])[::-1][:5])
    np.testing.assert_array_equal(scores.top_influenced(8, 5)["infl"], np.sort(everything[8])[::-1][:5])
    on_train = scores.influence(train=[1, 2], test=[1, 2], on="train").value
    assert on_train.shape == (2, 2)
    np.testing.assert_allclose(np.diag(on_train), scores.memorization["mem"][[1, 2]], atol=1e-12)
    with pytest.raises(MemtailError, match="test index 359 is out of range: there are 359"):
        scores.influence(test=359)
    assert scores.to_pandas("pairs")["infl"].is_monotonic_decreasing
    assert scores.summary["trials"] == 60
    assert scores.summary["without_estimate"] == 0


def test_scores_of_a_folder_include_file_names(tmp_path):
    write_tree(tmp_path / "images", count=6)
    path = spec(
        tmp_path,
        "folder",
        dataset={"name": "folder", "root": "images"},
        training={"epochs": 1},
        subsets={"trials": 8, "design": "balanced", "fraction": 0.5},
    )
    assert command("run", path, "--store", tmp_path / "store").returncode == 0
    with np.load(version(tmp_path / "store", "folder") / "index.npz") as archive:
        assert archive["tr_paths"][0] == archive["tr_filenames"][0] == b"cat/000.png"  # a base name of each class
        assert archive["tt_paths"][-1] == b"dog/005.png"
        assert len(archive["tr_mem"]) == len(archive["tr_labels"]) == 12
    top = json.loads(command("top", "--json", "-n", 2, "--store", tmp_path / "store").stdout)
    assert len(top) == 2
    assert top[0]["filename"].endswith(".png")


def test_commands_print_text_or_json(finished, tmp_path):
    store, _ = finished
    (row,) = json.loads(command("status", "--json", "--store", store).stdout)
    assert (row["experiment"], row["trials"], row["wanted"], row["published_trials"]) == ("digits", 60, 60, 60)
    assert "digits" in command("status", "--store", store).stdout
    top = json.loads(command("top", "digits", "--json", "-n", 3, "--store", store).stdout)
    assert [row["mem"] for row in top] == sorted((row["mem"] for row in top), reverse=True)
    assert len(top) == 3
    pairs = json.loads(command("top", "--pairs", "--json", "--store", store).stdout)
    assert [row["confirmed"] for row in pairs] == sorted((row["confirmed"] for row in pairs), reverse=True)
    assert pairs[0]["infl_lo"] <= pairs[0]["infl"] <= pairs[0]["infl_hi"]
    assert (pairs[0]["infl_adjusted"] >= 0.15, pairs[0]["q_value"] <= 0.1) == (True, True)
    influencers = json.loads(command("top", "--influencers-of", pairs[0]["tt_idx"], "-n", 2000, "--json", "--store", store).stdout)
    assert pairs[0]["tr_idx"] in [row["tr_idx"] for row in influencers]
    assert influencers[0]["infl"] >= pairs[0]["infl"]
    assert command("scores", "--fetch", tmp_path / "out", "--store", store).returncode == 0
    assert same_files(tmp_path / "out", version(store))
    staged = json.loads(command("stage", spec(tmp_path), "--json").stdout)
    assert staged["train"] == 1438
    assert (Path(staged["folder"]) / "meta.json").exists()
    checks = {check["name"]: check for check in json.loads(command("doctor", "--json", "--store", store).stdout)}
    assert checks["conditional write"]["fine"]
    assert checks["torch"]["fine"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "missing.yaml"], "missing.yaml: cannot be read"),
        (["status", "--store", "nowhere"], "there is no store at nowhere"),
        (["top", "nothing"], "there is no experiment 'nothing' in the store; there: digits"),
        (["top", "--influencers-of", "9999"], "test index 9999 is out of range"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(finished, arguments, message):
    store, _ = finished
    more = [] if "--store" in arguments or arguments[0] == "run" else ["--store", store]
    result = command(*arguments, *more)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"subsets": {"trials": 3}}, "3 trials"),
        ({"subsets": {"fraction": 2}}, "subsets.fraction"),
        ({"dataset": {"name": "arrays", "root": "gone.npz"}}, "gone.npz"),
        ({"model": {"name": "resnet19"}}, "did you mean 'resnet9'?"),
        ({"execution": {"device": "cuda:77"}}, "there is no 'cuda:77' here"),
    ],
)
def test_a_bad_experiment_is_one_line_and_exit_code_2_and_leaves_no_store(tmp_path, parts, message):
    path = spec(tmp_path, **parts)
    if "model" in parts:
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "model": parts["model"]}))
    result = command("run", path, "--store", tmp_path / "store")
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "store" / "experiments").exists()


def test_wrong_scores_paths_are_named(tmp_path):
    with pytest.raises(MemtailError, match="holds no scores"):
        memtail.load_scores(tmp_path)


def test_another_dataset_under_the_name_of_an_experiment_is_refused(finished, tmp_path):
    store, _ = finished
    experiment = memtail.Experiment.parse({"name": "digits", "dataset": {"name": "arrays", "root": write_arrays(tmp_path / "a.npz")}})
    with pytest.raises(StoreError, match=r"dataset\.fingerprint"):
        memtail.run(experiment, store)


@pytest.mark.parametrize(
    ("messages", "attempts"),
    [
        (["KeyError: 'lr' (/code/train.py, line 3)"] * 3, 2),
        (
            [
                "KeyError: 'lr' (/code/train.py, line 3)",
                "KeyError: 'lr' (/code/train.py, line 5)",
                "KeyError: 'a' (/code/train.py, line 5)",
            ],
            3,
        ),
        (["the trainer process was ended by SIGKILL"] * 3, 3),
    ],
)
def test_a_shard_whose_code_fails_twice_at_one_place_is_given_up(declare, tmp_path, monkeypatch, messages, attempts):
    raised = iter(messages)

    def fail(*_, **__):
        raise TrainerError(next(raised))

    monkeypatch.setattr(ShardTrainer, "train", fail)
    experiment = declare(40, execution={"trials_per_shard": 40, "device": "cpu"})
    with pytest.raises(ShardsFailedError, match=rf"^1 shards failed {attempts} times each and are missing from the scores"):
        run(experiment, tmp_path / "store")
    (recorded,) = ExperimentStore(LocalStore(tmp_path / "store"), "digits").attempts().values()
    assert recorded == attempts


def test_the_message_of_a_fault_names_its_place(tmp_path):
    (tmp_path / "code.py").write_text("def train():\n    {}['lr']\n")
    names = {}
    exec(compile((tmp_path / "code.py").read_text(), tmp_path / "code.py", "exec"), names)  # noqa: S102 - code of this test
    with pytest.raises(KeyError) as raised:
        names["train"]()
    assert names_a_place(describe_fault(raised.value, tmp_path))
    assert not names_a_place(describe_fault(raised.value, tmp_path / "elsewhere"))


@pytest.mark.parametrize(
    ("ask", "line"),
    [
        (lambda scores: scores.to_pandas("foo"), "table: 'foo' is none of memorization, pairs, selected_pairs, snapshots"),
        (lambda scores: scores.influence(on="trian"), "on: 'trian' is none of test, train"),
        (
            lambda scores: scores.influence("a"),
            "train: 'a' is no index of train examples: give whole numbers, a slice or a mask",
        ),
        (lambda scores: scores.influence(test=1.5), "test: 1.5 is no index of test examples"),
        (lambda scores: scores.influence(test=np.ones(3, bool)), r"test: array\(\[ True, True, True\]\) is no index"),
        (lambda scores: scores.influence([[1, 2]]), r"train: \[\[1, 2\]\] is no index"),
        (lambda scores: scores.top_influencers("a"), "test: 'a' is no index of one test example: give a whole number"),
        (lambda scores: scores.top_influenced([1, 2]), r"train: \[1, 2\] is no index of one train example"),
        (lambda scores: scores.top_influencers(1, "a"), "k: 'a' is no number of rows: give a whole number from 0 on"),
        (lambda scores: scores.most_memorized(-1), "k: -1 is no number of rows"),
        (lambda scores: scores.strongest_pairs(-1), "k: -1 is no number of rows"),
    ],
)
def test_a_wrong_word_to_scores_is_one_line(finished, ask, line):
    with pytest.raises(ScoresError, match=f"^{line}"):
        ask(memtail.load_scores(finished[0] / "experiments" / "digits"))


def test_scores_say_what_they_are_and_take_masks(finished):
    scores = memtail.load_scores(finished[0] / "experiments" / "digits")
    assert repr(scores) == "<Scores of 'digits': 60 trials, few trials>"
    mask = np.arange(scores.summary.n_train) < 3
    np.testing.assert_array_equal(scores.influence(mask, test=5).value, scores.influence([0, 1, 2], test=5).value)
    assert scores.influence([]).value.shape == (0, scores.summary.n_test)


def test_a_run_of_no_experiment_is_one_line(tmp_path):
    with pytest.raises(SpecError, match="experiment: is str, and no memtail"):
        memtail.run("digits.yaml", tmp_path)


def test_an_address_without_an_experiment_is_one_line():
    with pytest.raises(ScoresError, match=r"^s3://bucket: names no experiment: give STORE/experiments/NAME$"):
        memtail.load_scores("s3://bucket")
