"""Exports, read as the code of other projects reads them: the arithmetic below is theirs, on their names of files and arrays."""

import glob
import io
import os
import shutil
import tracemalloc

import numpy as np
import pytest
from rich.console import Console

import memtail
from memtail.cli.run_progress import BytesProgress
from memtail.exchange import exports
from memtail.exchange.imports import import_trials
from memtail.experiment_store import ExperimentStore
from memtail.spec import Experiment
from memtail.storage.local import LocalStore
from memtail.trials import unpack
from tests.support.cli import command

TRIALS = 30


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    spec = {
        "name": "digits",
        "dataset": {"name": "digits", "max_train": 300, "max_test": 90},
        "model": {"name": "mlp", "hidden": [32]},
        "training": {"epochs": 6},
        "subsets": {"trials": TRIALS, "design": "balanced"},
        "record": {"margins": True},
        "execution": {"device": "cpu", "trials_per_shard": 8},
    }
    memtail.run(Experiment.parse(spec), folder)
    return folder


@pytest.fixture(scope="module")
def scores(store):
    return memtail.load_scores(store / "experiments" / "digits")


@pytest.fixture
def exported(store, tmp_path):
    def export(form):
        done = command("export", "digits", "--as", form, "--out", tmp_path / "out", "--store", store)
        assert done.returncode == 0, done.stderr
        assert f"digits: These scores rest on only {TRIALS} trials" in done.stderr
        assert all(os.path.exists(line) for line in done.stdout.splitlines())  # noqa: PTH110
        return tmp_path / "out"

    return export


def masked_avg(x, mask, axis=0, esp=1e-10):
    return (np.sum(x * mask, axis=axis) / np.maximum(np.sum(mask, axis=axis), esp)).astype(np.float32)


def masked_dot(x, mask, esp=1e-10):
    x = x.T.astype(np.float32)
    return (np.matmul(x, mask) / np.maximum(np.sum(mask, axis=0, keepdims=True), esp)).astype(np.float32)


def test_the_bits_of_all_trials_give_the_scores_by_the_authors_arithmetic(exported, scores):
    results = np.load(exported("zenodo") / "digits_trials.npz")
    trainset_mask = results["trainset_mask"]
    inv_mask = np.logical_not(trainset_mask)
    mem_est = masked_avg(results["trainset_correctness"], trainset_mask) - masked_avg(results["trainset_correctness"], inv_mask)
    infl_est = masked_dot(results["testset_correctness"], trainset_mask) - masked_dot(results["testset_correctness"], inv_mask)
    assert trainset_mask.shape == (TRIALS, 300)
    np.testing.assert_allclose(mem_est, scores.memorization["mem"], atol=1e-6)
    np.testing.assert_allclose(results["memorization"], mem_est, atol=1e-6)
    np.testing.assert_allclose(results["influence"], infl_est, atol=1e-6)


def test_estimates_are_read_as_in_the_authors_demonstration(exported, scores):
    estimates = np.load(exported("infl-mem") / "digits_infl_mem.npz")
    train_idx = [3, 1, 7]
    assert estimates["memorization"].dtype == estimates["influence"].dtype == np.float32
    np.testing.assert_allclose(estimates["memorization"][train_idx], scores.memorization["mem"][train_idx], atol=1e-6)
    np.testing.assert_allclose(estimates["influence"], scores.influence().value.T, atol=1e-6)


def test_consistency_scores_have_the_labels_of_the_dataset(exported, scores):
    class Dataset:
        targets = scores.memorization["label"].tolist()

    cscores = np.load(exported("cscores") / "digits-cscores-orig-order.npz")
    labels, values = cscores["labels"], cscores["scores"]
    assert (labels == Dataset.targets).all()
    np.testing.assert_allclose(values, scores.memorization["p_out"])


def test_trials_are_read_from_aux_arrays(exported, scores):
    out = exported("authors")
    run_dirs = glob.glob(str(out / "digits" / "0.7" / "*"))  # noqa: PTH207
    assert len(run_dirs) == TRIALS
    mask, correctness = np.zeros((TRIALS, 300), bool), np.zeros((TRIALS, 300), bool)
    tests = []
    for i_run, run_dir in enumerate(run_dirs):
        aux_arrays = np.load(os.path.join(run_dir, "aux_arrays.npz"))
        mask[i_run, aux_arrays["subsample_idx"]] = True
        exported_correctness = np.concatenate([aux_arrays["correctness_train"], aux_arrays["correctness_removed"]], axis=0)
        exported_index = np.concatenate([aux_arrays["index_train"], aux_arrays["index_removed"]], axis=0)
        correctness[i_run, exported_index] = exported_correctness
        ordered = np.zeros_like(aux_arrays["correctness_test"])
        ordered[aux_arrays["index_test"]] = aux_arrays["correctness_test"]
        tests.append(ordered)
    mem_est = masked_avg(correctness, mask) - masked_avg(correctness, np.logical_not(mask))
    np.testing.assert_allclose(mem_est, scores.memorization["mem"], atol=1e-6)
    infl_est = masked_dot(np.array(tests), mask) - masked_dot(np.array(tests), np.logical_not(mask))
    np.testing.assert_allclose(infl_est.T, scores.influence().value, atol=1e-6)
    assert np.load(out / "digits_infl_matrix.npz")["tr_mem"].shape == (300,)


def test_masks_and_margins_are_those_of_datamodels(exported, scores):
    data_dir = exported("datamodels")
    masks_fp = np.lib.format.open_memmap(data_dir / "masks.npy", mode="r")
    y_vals_fp = np.lib.format.open_memmap(data_dir / "margins.npy", mode="r")
    assert masks_fp.dtype == np.bool_
    assert y_vals_fp.dtype == np.float16
    assert (masks_fp.shape, y_vals_fp.shape) == ((TRIALS, 300), (TRIALS, 90))
    x_val, y_val = masks_fp[4], y_vals_fp[4].astype("float32")
    assert x_val.sum() == 210
    assert np.isfinite(y_val).all()
    certain = np.array([(y_vals_fp[:, j] > 0).mean() for j in range(90)])  # a probability above 1/2 is the largest
    right = scores.statistics.correct_on_test / TRIALS
    assert (certain <= right).all()
    assert np.corrcoef(certain, right)[0, 1] > 0.7
    train = np.lib.format.open_memmap(data_dir / "train_margins.npy", mode="r")
    inside = np.where(masks_fp, train, 0).sum(0) / masks_fp.sum(0)
    np.testing.assert_allclose(inside, scores.memorization["margin_in"], rtol=0.01, atol=0.02)


def test_an_attack_reads_keep_and_scores(exported, scores):
    p = exported("lira")
    scores_, keep_ = [], []
    for root, ds, _ in os.walk(p):
        for f in ds:
            if not f.startswith("experiment"):
                continue
            if not os.path.exists(os.path.join(root, f, "scores")):  # noqa: PTH110
                continue
            last_epoch = sorted(os.listdir(os.path.join(root, f, "scores")))  # noqa: PTH208
            scores_.append(np.load(os.path.join(root, f, "scores", last_epoch[-1])))
            keep_.append(np.load(os.path.join(root, f, "keep.npy")))
    found = np.array(scores_)
    keep = np.array(keep_)[:, : found.shape[1]]
    assert (found.shape, keep.shape) == ((TRIALS, 300, 1), (TRIALS, 300))
    assert keep.dtype == np.bool_
    dat_in = [found[keep[:, j], j, :].mean() for j in range(found.shape[1])]
    np.testing.assert_allclose(dat_in, scores.memorization["margin_in"], rtol=0.01, atol=0.02)
    np.testing.assert_array_equal(np.load(p / "y_train.npy"), scores.memorization["label"])


def test_what_cannot_be_exported_is_one_line(store, tmp_path):
    wrong = command("export", "digits", "--as", "csv", "--store", store)
    assert wrong.returncode == 2
    assert "there is no format 'csv': give --as one of authors, infl-mem, cscores, datamodels, lira, zenodo" in wrong.stderr
    spec = {"name": "plain", "dataset": {"name": "digits", "max_train": 60, "max_test": 20}, "training": {"epochs": 1}}
    memtail.run(Experiment.parse(spec | {"subsets": {"trials": 6, "design": "balanced"}}), tmp_path / "store")
    for form in ("lira", "datamodels"):
        refused = command("export", "--as", form, "--out", tmp_path / "out", "--store", tmp_path / "store")
        assert refused.returncode == 2
        assert "has no margins, which this format consists of: declare record: {margins: true}" in refused.stderr
        assert not (tmp_path / "out").exists()
        assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("form", exports.FORMATS)
def test_the_size_is_said_before_anything_is_written(store, tmp_path, form):
    planned = exports.planned(LocalStore(store), "digits", form)
    progress = []
    planned.write(tmp_path / "out", lambda done, size: progress.append((done, size)))
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    arrays = TRIALS * 7 + 6  # at most, each with a header
    assert 0 <= sum(path.stat().st_size for path in files) - planned.bytes < 400 * arrays
    assert progress == sorted(progress)
    assert progress[-1] == (planned.bytes, planned.bytes)


def test_a_terminal_shows_the_bytes_written(store, tmp_path):
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, width=100)
    with BytesProgress("digits", terminal) as progress:
        exports.planned(LocalStore(store), "digits", "infl-mem").write(tmp_path, progress.update)
    assert "109.2/109.2 kB" in shown.getvalue()


def test_an_export_that_the_disk_has_no_room_for_is_refused(store, tmp_path, monkeypatch):
    assert "writing 109.2 kB to " in command("export", "--as", "infl-mem", "--out", tmp_path / "room", "--store", store).stderr
    full = type(shutil.disk_usage(tmp_path))(10**9, 10**9 - 100_000, 100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    refused = command("export", "--as", "infl-mem", "--out", tmp_path / "out", "--store", store)
    assert refused.returncode == 2
    *_, line = refused.stderr.splitlines()
    assert line == (
        f"memtail: 'digits' as infl-mem takes 109.2 kB, and {tmp_path / 'out'} has 100.0 kB free: give a folder on another disk by --out"
    )
    assert not list((tmp_path / "out").iterdir())


def test_influence_is_written_with_little_memory(store, tmp_path, monkeypatch):
    planned = exports.planned(LocalStore(store), "digits", "zenodo")
    planned.write(tmp_path)
    expected = np.load(tmp_path / "digits_trials.npz")["influence"]
    monkeypatch.setattr(exports, "_PAIRS_AT_ONCE", 900)
    tracemalloc.start()
    try:
        planned.write(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(np.load(tmp_path / "digits_trials.npz")["influence"], expected)
    assert peak < expected.nbytes


def test_an_export_that_breaks_off_leaves_the_file_of_the_last_one(store, tmp_path):
    planned = exports.planned(LocalStore(store), "digits", "infl-mem")
    (path,) = planned.write(tmp_path)
    before = path.read_bytes()

    def stop(done, size):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        planned.write(tmp_path, stop)
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [before]


@pytest.mark.parametrize("form", ["datamodels", "lira"])
def test_what_is_exported_is_imported_with_equal_subsets_and_margins(exported, store, scores, tmp_path, form):
    import_trials(LocalStore(tmp_path / "store"), "again", [exported(form)])
    again = memtail.load_scores(tmp_path / "store" / "experiments" / "again")
    assert again.summary.trials == TRIALS
    np.testing.assert_array_equal(again.statistics.membership, scores.statistics.membership)
    for column in ("k_in", "k_out", "margin_in", "margin_out"):
        np.testing.assert_array_equal(again.memorization[column], scores.memorization[column])
    before, after = (outcomes(*each) for each in ((store, "digits"), (tmp_path / "store", "again")))
    for split in ("train", "test") if form == "datamodels" else ("train",):
        margin, correct = before[f"{split}_margin"], before[f"{split}_correct"]
        np.testing.assert_array_equal(after[f"{split}_margin"], margin)
        np.testing.assert_array_equal(after[f"{split}_correct"], margin > 0)
        # a label that wins with half of the probability or less counts as wrong: margins do not tell
        differ = after[f"{split}_correct"] != correct
        assert correct[differ].all()


def outcomes(store, name):
    """Correctness and margins of all trials, in their order."""
    held = ExperimentStore(LocalStore(store), name)
    batches = [held.batch(shard, held.read_record()) for shard in sorted(held.committed(), key=lambda shard: shard.first)]
    sizes = {"train": batches[0].n_train, "test": batches[0].n_test}
    correct = {f"{split}_correct": [unpack(getattr(batch, f"{split}_correct"), size) for batch in batches] for split, size in sizes.items()}
    margins = {name: [getattr(batch, name) for batch in batches] for name in ("train_margin", "test_margin")}
    return {name: np.concatenate(parts) for name, parts in (correct | margins).items()}
