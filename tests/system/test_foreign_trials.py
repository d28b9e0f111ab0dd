"""Trials that were trained elsewhere: files written by plain numpy, as each tool writes them, become experiments."""

import numpy as np
import pytest
import yaml

import memtail
from memtail.errors import OutcomeError, SpecError, UnsupportedError
from memtail.exchange.imports import import_trials
from memtail.experiment_store import ExperimentStore
from memtail.spec import Experiment
from memtail.storage.local import LocalStore
from memtail.trainers.code import code_folder
from tests.support.cli import command, version

T, N, Q = 70, 40, 12


@pytest.fixture(scope="module")
def trials():
    """Masks, margins on training and test examples, labels; example 3 is right only if it was seen."""
    rng = np.random.default_rng(5)
    masks = rng.random((T, N)) < 0.7
    train = np.where(masks, 3.0, 1.0) + rng.normal(size=(T, N))
    train[:, 3] = np.where(masks[:, 3], 2, -2)
    test = rng.normal(size=(T, Q)) + 1
    test[:, 5] = np.where(masks[:, 3], 1, -1)
    return masks, train.astype(np.float16), test.astype(np.float16), np.arange(N) % 4, np.arange(Q) % 4


def mem_of(masks, correct):
    return np.array([correct[masks[:, i], i].mean() - correct[~masks[:, i], i].mean() for i in range(masks.shape[1])])


def write_aux_arrays(folder, trials):
    masks, train, test, _, _ = trials
    for run in range(T):
        inside, outside = np.flatnonzero(masks[run]), np.flatnonzero(~masks[run])
        order = np.random.default_rng(run).permutation(Q)  # of a loader: the indices say which is which
        (folder / "0.7" / str(run)).mkdir(parents=True)
        np.savez(
            folder / "0.7" / str(run) / "aux_arrays.npz",
            subsample_idx=inside,
            correctness_train=train[run, inside] > 0,
            index_train=inside,
            correctness_removed=train[run, outside] > 0,
            index_removed=outside,
            correctness_test=(test[run] > 0)[order],
            index_test=order,
        )


def write_datamodels(folder, trials):
    masks, train, test, _, _ = trials
    for key, array in {"masks": masks, "margins": test, "train_margins": train}.items():
        mmap = np.lib.format.open_memmap(folder / f"{key}.npy", mode="w+", dtype=array.dtype, shape=(T + 2, array.shape[1]))
        mmap[:T] = array
    np.save(folder / "_completed.npy", np.arange(T + 2) < T)


def write_attack(folder, trials):
    masks, train, _, labels, _ = trials
    np.save(folder / "y_train.npy", labels)
    for expid in range(T):
        logdir = folder / f"experiment-{expid}_{T}"
        (logdir / "scores").mkdir(parents=True)
        np.save(logdir / "keep.npy", masks[expid])
        np.save(logdir / "scores" / "0000000090.npy", np.zeros((N, 2)))
        np.save(logdir / "scores" / "0000000100.npy", train[expid, :, None] + np.array([0.25, -0.25]))


def write_bits(folder, trials):
    masks, train, test, _, _ = trials
    np.savez(folder / "bits.npz", trainset_mask=masks, trainset_correctness=(train > 0).astype(float), testset_correctness=test > 0)


def write_plain(folder, trials):
    masks, train, test, train_labels, test_labels = trials
    scores = {"train_score": 1 / (1 + np.exp(-train.astype(float))), "test_score": 1 / (1 + np.exp(-test.astype(float)))}
    labels = {"train_labels": train_labels, "test_labels": test_labels}
    np.savez(folder / "plain.npz", membership=masks, train_correct=train > 0, test_correct=test > 0, **scores, **labels)


WRITERS = {
    "authors": (write_aux_arrays, ""),
    "datamodels": (write_datamodels, ""),
    "attack": (write_attack, ""),
    "bits": (write_bits, "bits.npz"),
    "plain": (write_plain, "plain.npz"),
}


@pytest.mark.parametrize("form", WRITERS)
def test_trials_of_other_tools_become_an_experiment(trials, tmp_path, form):
    write, file = WRITERS[form]
    (tmp_path / "theirs").mkdir()
    write(tmp_path / "theirs", trials)
    done = command("import", form, tmp_path / "theirs" / file, "--store", tmp_path / "store")
    assert done.returncode == 0, done.stderr
    assert f"{form}: {T} trials of {N} training and {0 if form == 'attack' else Q} test examples" in done.stdout
    scores = memtail.load_scores(tmp_path / "store" / "experiments" / form)
    masks, train, test, labels, _ = trials
    np.testing.assert_allclose(scores.memorization["mem"], mem_of(masks, train > 0), atol=1e-12)
    assert scores.memorization["mem"][3] == 1
    if form != "attack":
        influence = [(test[masks[:, i], 5] > 0).mean() - (test[~masks[:, i], 5] > 0).mean() for i in range(N)]
        np.testing.assert_allclose(scores.influence(test=5).value[:, 0], influence, atol=1e-12)
    if form in ("attack", "plain"):
        np.testing.assert_array_equal(scores.memorization["label"], labels)
        probability = np.rint(255 / (1 + np.exp(-train.astype(float)))) / 255
        np.testing.assert_allclose(scores.memorization["mem_p"], mem_of(masks, probability), atol=1e-9)
    if form in ("attack", "datamodels"):
        expected = np.where(masks, train.astype(float), 0).sum(0) / masks.sum(0)
        np.testing.assert_allclose(scores.memorization["margin_in"], expected, atol=1e-3)
    assert "under another name" in scores.summary.few_trials
    report = command("report", form, "--store", tmp_path / "store")
    assert report.returncode == 0, report.stderr


def test_an_import_that_is_repeated_changes_nothing_and_one_of_other_trials_is_refused(trials, tmp_path):
    write_plain(tmp_path, trials)
    store = LocalStore(tmp_path / "store")
    import_trials(store, "plain", [tmp_path / "plain.npz"])
    before = version(tmp_path / "store", "plain")
    import_trials(store, "plain", [tmp_path / "plain.npz"])
    assert version(tmp_path / "store", "plain") == before
    masks, train, test, *labels = trials
    write_plain(tmp_path, (masks, -train, test, *labels))
    with pytest.raises(OutcomeError, match="experiment 'plain' holds other outcomes of trials 0-63: import these under another name"):
        import_trials(store, "plain", [tmp_path / "plain.npz"])


def test_an_imported_experiment_is_not_extended_by_an_import_nor_by_a_trainer(trials, tmp_path):
    write_plain(tmp_path, trials)
    arguments = ("--store", tmp_path / "store")
    assert command("import", "plain", tmp_path / "plain.npz", *arguments).returncode == 0
    spec = {"name": "plain", "dataset": {"name": "digits", "max_train": N, "max_test": Q}, "subsets": {"trials": T + 1}}
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(spec))
    more = command("import", "plain", tmp_path / "plain.npz", tmp_path / "plain.npz", *arguments)
    train = command("submit", tmp_path / "plain.yaml", *arguments)
    for refused in (more, train):
        assert (refused.returncode, refused.stderr.splitlines()[-1]) == (
            2,
            "memtail: experiment 'plain' consists of imported trials (arrays), whose masks are its design, and cannot be extended: choose "
            "another name, and import all trials under it",
        )


def test_parts_with_other_outcomes_or_labels_are_refused_before_anything_is_written(trials, tmp_path):
    write_plain(tmp_path, trials)
    write_bits(tmp_path, trials)
    paths, store = [tmp_path / "plain.npz", tmp_path / "bits.npz"], LocalStore(tmp_path / "store")
    for order in (paths, paths[::-1]):
        with pytest.raises(OutcomeError, match="give parts with the same outcomes"):
            import_trials(store, "parts", order)
    assert not list((tmp_path / "store").glob("experiments/*"))


def test_files_of_one_trial_each_follow_each_other(trials, tmp_path):
    masks, train, test, _, _ = trials
    paths = [tmp_path / f"{place}.npz" for place in range(3)]
    for place, path in enumerate(paths):
        rows = slice(place, place + 1)
        np.savez(path, membership=masks[rows], train_correct=train[rows] > 0, test_correct=test[rows] > 0)
    assert import_trials(LocalStore(tmp_path / "store"), "three", paths).experiment.subsets.trials == 3


def test_scores_of_trials_without_a_test_set_are_kept(trials, tmp_path):
    masks, train, _, labels, _ = trials
    scores = 1 / (1 + np.exp(-train.astype(float)))
    path = saved(tmp_path, membership=masks, train_correct=train > 0, train_score=scores, train_margin=train, train_labels=labels)
    import_trials(LocalStore(tmp_path / "store"), "alone", [path])
    table = memtail.load_scores(tmp_path / "store/experiments/alone").memorization
    np.testing.assert_array_equal(table["label"], labels)
    np.testing.assert_allclose(table["mem_p"], mem_of(masks, np.rint(255 * scores) / 255), atol=1e-9)
    assert "margin_in" in table
    for form in ("cscores", "lira"):
        assert command("export", "--as", form, "--out", tmp_path / form, "--store", tmp_path / "store").returncode == 0
    assert command("export", "--as", "lira", "--out", tmp_path / "lira", "--store", tmp_path / "store").returncode == 0
    (tmp_path / "lira" / "experiment-0_7").mkdir()
    refused = command("export", "--as", "lira", "--out", tmp_path / "lira", "--store", tmp_path / "store")
    assert (refused.returncode, "is of another export" in refused.stderr) == (2, True)


def test_scores_without_correctness_are_imported_and_continued_by_the_same_command(trials, tmp_path):
    masks, train, test, labels, test_labels = trials
    scores = {"train_score": 1 / (1 + np.exp(-train.astype(float))), "test_score": 1 / (1 + np.exp(-test.astype(float)))}
    path = saved(tmp_path, membership=masks, **scores, train_labels=labels, test_labels=test_labels)
    store = LocalStore(tmp_path / "store")
    first = import_trials(store, "scores", [path])
    assert first.experiment.record.scores == "only"
    assert import_trials(store, "scores", [path]).fingerprint == first.fingerprint
    opened = memtail.load_scores(tmp_path / "store/experiments/scores")
    rounded = {name: np.rint(255 * values) / 255 for name, values in scores.items()}
    np.testing.assert_allclose(opened.memorization["mem_p"], mem_of(masks, rounded["train_score"]), atol=1e-9)
    assert "mem" not in opened.memorization
    np.testing.assert_array_equal(opened.test_labels, test_labels)
    only = path.rename(tmp_path / "only.npz")
    with_correctness = saved(tmp_path, membership=masks, train_correct=train > 0, test_correct=test > 0, **scores)
    with pytest.raises(OutcomeError, match="give parts with the same outcomes"):
        import_trials(store, "mixed", [with_correctness, only])
    alone = saved(tmp_path, membership=masks, test_correct=test > 0, **scores)
    with pytest.raises(OutcomeError, match="has test_correct without train_correct: give both, or scores alone"):
        import_trials(store, "alone", [alone])


def test_trials_without_labels_are_exported(trials, tmp_path):
    masks, train, test, _, _ = trials
    path = saved(tmp_path, membership=masks, train_correct=train > 0, test_correct=test > 0, train_margin=train, test_margin=test)
    import_trials(LocalStore(tmp_path / "store"), "unlabelled", [path])
    for form in ("cscores", "lira", "zenodo", "infl-mem", "authors", "datamodels"):
        done = command("export", "--as", form, "--out", tmp_path / form, "--store", tmp_path / "store")
        assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "cscores/unlabelled-cscores-orig-order.npz").files == ["scores"]
    assert not (tmp_path / "lira/y_train.npy").exists()


def test_an_export_is_imported_with_equal_scores(tmp_path):
    spec = {
        "name": "ours",
        "dataset": {"name": "digits", "max_train": 200, "max_test": 50},
        "model": {"name": "mlp", "hidden": [16]},
        "training": {"epochs": 3},
        "subsets": {"trials": 20, "design": "balanced"},
        "record": {"scores": False},  # exports hold none
        "execution": {"device": "cpu"},
    }
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump(spec))
    memtail.run(Experiment.load(tmp_path / "ours.yaml"), tmp_path / "store")
    for form, path in (("zenodo", "ours_trials.npz"), ("authors", "ours")):
        assert command("export", "--as", form, "--out", tmp_path / form, "--store", tmp_path / "store").returncode == 0
        other = tmp_path / f"{form}-store"
        done = command("import", "theirs", tmp_path / form / path, "--dataset", tmp_path / "ours.yaml", "--store", other)
        assert done.returncode == 0, done.stderr
        theirs, ours = version(other, "theirs"), version(tmp_path / "store", "ours")
        for file in ("infl_matrix.npz", "statistics.npz", "high_infl_pairs_infl0.15_mem0.25.parquet"):
            assert (theirs / file).read_bytes() == (ours / file).read_bytes()
    parts = [tmp_path / "zenodo/ours_trials.npz", tmp_path / "authors/ours"]
    assert import_trials(LocalStore(tmp_path / "both"), "both", parts).experiment.subsets.trials == 40
    together, alone = (memtail.load_scores(tmp_path / place) for place in ("both/experiments/both", "store/experiments/ours"))
    np.testing.assert_array_equal(together.memorization["mem"], alone.memorization["mem"])


GOOD = {"membership": np.eye(3, 4), "train_correct": np.ones((3, 4)), "test_correct": np.ones((3, 2))}


def saved(folder, **arrays):
    np.savez(folder / "trials.npz", **arrays)
    return folder / "trials.npz"


def masks_only(folder):
    np.save(folder / "masks.npy", np.ones((3, 4), bool))
    return folder


def text(folder):
    (folder / "trials.npz").write_text("no archive")
    return folder / "trials.npz"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "missing", "there is no such file or folder"),
        (lambda folder: folder, "holds no trials that memtail reads: aux_arrays.npz below it, masks.npy and margins.npy, or experiment"),
        (lambda folder: saved(folder, other=np.zeros(3)), "has no array membership, there are other"),
        (lambda folder: saved(folder, membership=np.ones((2, 4))), "has no array train_correct, there are membership"),
        (lambda folder: saved(folder, membership=np.ones((1, 4)), train_correct=np.ones((1, 4))), "there is only 1 trial"),
        (lambda folder: saved(folder, membership=np.ones((2, 4)), train_correct=np.full((2, 4), 7)), "train_correct is int64 with other"),
        (text, "cannot be read"),
        (lambda folder: saved(folder, **GOOD, train_margin=np.full((3, 4), np.nan), test_margin=np.ones((3, 2))), "that are not numbers"),
        (lambda folder: saved(folder, **GOOD, train_score=np.ones((3, 4))), "has train_score or test_score alone: give both, or none"),
        (lambda folder: saved(folder, **GOOD, train_labels=np.zeros(4)), "has train_labels or test_labels alone"),
        (lambda folder: saved(folder, **GOOD, train_labels=-np.ones(4, int), test_labels=np.ones(2, int)), "whole numbers from 0, one for"),
        (lambda folder: saved(folder, **GOOD, train_labels=np.zeros(3, int), test_labels=np.ones(2, int)), r"\[3\]: labels are whole"),
        (lambda folder: saved(folder, **GOOD | {"train_correct": np.ones((4, 4))}), r"train_correct is \[4, 4\], and membership \[3, 4\]"),
        (lambda folder: saved(folder, **GOOD | {"train_correct": np.ones((3, 5))}), r"trial 0 has train_correct \[5\], expected is \[4\]"),
        (
            lambda folder: saved(folder, **GOOD | {"membership": np.ones(3)}),
            r"train_correct is \[3, 4\], and membership \[3\]|membership is",
        ),
        (lambda folder: saved(folder, **GOOD | {"membership": np.zeros((3, 4))}), "trial 0 has an empty subset: leave it out"),
        (masks_only, "has masks.npy, and no margins.npy: memorization needs margins of training and test examples"),
        (lambda folder: masks_only(folder) / "masks.npy", r"masks\.npy: is one array of several: give the folder that holds them"),
    ],
)
def test_what_is_no_trial_is_one_line(tmp_path, make, message):
    path = make(tmp_path)
    with pytest.raises(OutcomeError, match=message) as caught:
        import_trials(LocalStore(tmp_path / "store"), "none", [path])
    assert "\n" not in str(caught.value)
    done = command("import", "none", path, "--store", tmp_path / "store")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)


def test_trials_of_another_dataset_are_refused(trials, tmp_path):
    write_plain(tmp_path, trials)
    (tmp_path / "digits.yaml").write_text(yaml.safe_dump({"name": "d", "dataset": {"name": "digits"}}))
    done = command("import", "x", tmp_path / "plain.npz", "--dataset", tmp_path / "digits.yaml", "--store", tmp_path / "store")
    assert done.returncode == 2
    assert f"trials of {N} training and {Q} test examples, expected are 1438 and 359" in done.stderr
    cut = {"name": "digits", "max_train": N, "max_test": Q}
    (tmp_path / "digits.yaml").write_text(yaml.safe_dump({"name": "d", "dataset": cut}))
    done = command("import", "x", tmp_path / "plain.npz", "--dataset", tmp_path / "digits.yaml", "--store", tmp_path / "store")
    assert done.returncode == 2
    assert "plain.npz differ from the dataset's at 27 of 40 examples, first at 4" in done.stderr
    (tmp_path / "attack").mkdir()
    write_attack(tmp_path / "attack", trials)
    done = command("import", "x", tmp_path / "attack", "--dataset", tmp_path / "digits.yaml", "--store", tmp_path / "store")
    assert done.returncode == 2
    assert f"trials without test examples, and the dataset has {Q}: give a dataset without a test set, or none" in done.stderr


def test_nothing_trains_more_trials_of_an_imported_experiment(trials, tmp_path):
    write_plain(tmp_path, trials)
    store = LocalStore(tmp_path / "store")
    record = import_trials(store, "plain", [tmp_path / "plain.npz"])
    assert not ExperimentStore(store, "plain").missing(record)
    with pytest.raises(UnsupportedError, match=r"its trials were trained elsewhere \(arrays\): memtail has no trainer to train others"):
        code_folder(record)
    study = command("study", "removal", "plain", "--store", tmp_path / "store")
    assert (study.returncode, "Traceback" in study.stderr) == (2, False)
    (tmp_path / "again.yaml").write_text(yaml.safe_dump({"name": "again", "dataset": {"name": "digits"}, "trainer": {"imported": "x"}}))
    with pytest.raises(SpecError, match=r"trainer\.imported is of trials that memtail import brought"):
        Experiment.load(tmp_path / "again.yaml")
