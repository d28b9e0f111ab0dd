"""`memtail cache`: datasets, masks and weights are in the cache before a worker needs them."""

import numpy as np
import pytest
import torch

from memtail.datasets.staged_dataset import fetch
from memtail.datasets.staged_inputs import fetch_inputs
from memtail.execution.submit import submit
from memtail.experiment_store import Control, ExperimentStore
from memtail.models import build_model
from memtail.spec import Experiment, NamedModel
from memtail.storage import keys
from tests.support.arrays import write_arrays
from tests.support.cli import command
from tests.support.staged import CountingStore


@pytest.fixture
def store(tmp_path):
    return CountingStore(tmp_path / "store")


@pytest.fixture
def declared(tmp_path, store, monkeypatch):
    """Function that submits an experiment; the cache of the command is another one."""

    def submit_(name, shade=0, model=None, **subsets):
        images = np.random.default_rng(shade).integers(0, 255, (40, 12, 12)).astype(np.uint8)
        root = write_arrays(tmp_path / f"{shade}.npz", train_images=images, test_images=images[:20])
        content = {
            "name": name,
            "dataset": {"name": "arrays", "root": str(root)},
            "model": model or {"name": "mlp", "hidden": [4]},
            "subsets": {"trials": 24, **subsets},
            "execution": {"trials_per_shard": 4},
        }
        return submit(Experiment.parse(content, source=name), store).record

    return submit_


@pytest.fixture
def cache(tmp_path, store, monkeypatch):
    """Function that runs the command."""

    def run(*arguments):
        monkeypatch.setenv("MEMTAIL_CACHE", str(tmp_path / "other cache"))
        return command("cache", *arguments, "--store", str(store.root))

    return run


def test_datasets_masks_and_weights_are_downloaded_once(tmp_path, store, declared, cache):
    np.save(tmp_path / "masks.npy", np.eye(24, 40, dtype=bool))
    network = {"name": "resnet9", "options": {"width": 2}}
    torch.save(build_model(NamedModel(**network), (1, 12, 12), 2).state_dict(), tmp_path / "w.pt")
    model = {**network, "weights": str(tmp_path / "w.pt")}
    a, b = declared("a"), declared("b", 1, model, design="explicit", masks=str(tmp_path / "masks.npy"))
    done = cache("a", "b")
    assert done.returncode == 0, done.output
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["a", "b"]
    assert f"dataset {a.canonical['dataset']['fingerprint'][:8]}... of " in lines[0]
    assert all(line.endswith(", downloaded") for line in lines)
    before = store.noted("downloads")
    assert cache("a").stdout.endswith(", there before\n")
    for record in (a, b):
        fetch(store, record.canonical["dataset"]["fingerprint"], tmp_path / "other cache")
    fetched = fetch_inputs(b.experiment, b.canonical, store, tmp_path / "other cache")
    assert store.noted("downloads") == before
    assert fetched.subsets.masks.read_bytes() == (tmp_path / "masks.npy").read_bytes()
    assert fetched.model.weights_file.read_bytes() == (tmp_path / "w.pt").read_bytes()
    assert fetched.fingerprint(b.canonical["dataset"]["fingerprint"]) == b.fingerprint
    assert fetched.model.weights != b.experiment.model.weights


def test_damaged_weights_are_not_used(tmp_path, store, declared, cache):
    network = {"name": "resnet9", "options": {"width": 2}}
    torch.save(build_model(NamedModel(**network), (1, 12, 12), 2).state_dict(), tmp_path / "w.pt")
    record = declared("a", 0, {**network, "weights": str(tmp_path / "w.pt")})
    key = keys.weights(record.canonical["model"]["weights"])
    store.delete(key)
    store.put(key, b"damaged")
    done = cache("a")
    assert done.returncode == 1
    assert f"{key} in {store.address} is damaged: remove it, then memtail submit SPEC" in done.stderr


def test_all_are_those_that_are_to_be_trained(store, declared, cache):
    for name in ("a", "paused", "cancelled"):
        declared(name)
    for name in ("paused", "cancelled"):
        ExperimentStore(store, name).set_control(Control(name))
    store.put(keys.experiment("damaged"), b"{")
    done = cache("--all")
    assert done.returncode == 0, done.output
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["a"]
    assert "memtail: damaged: " in done.stderr


def test_a_dataset_that_is_missing_or_does_not_fit_is_named_and_the_others_are_cached(store, declared, cache, monkeypatch):
    records = {name: declared(name, shade) for shade, name in enumerate(("a", "b", "c"))}
    store.delete(keys.dataset(records["a"].canonical["dataset"]["fingerprint"], "manifest.json"))
    size = sum(stored.bytes for stored in store.inventory(keys.dataset(records["b"].canonical["dataset"]["fingerprint"], "")))
    monkeypatch.setenv("MEMTAIL_CACHE_LIMIT", str(size / 2**30))
    done = cache("a", "b", "c")
    assert done.returncode == 1
    missing, full = done.stderr.splitlines()
    assert missing.startswith("memtail: a: dataset ")
    assert "memtail stage SPEC puts it there" in missing
    assert full.startswith("memtail: c: dataset ")
    assert "in use" in full
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["b"]


def test_names_or_all_are_required(store, declared, cache):
    declared("a")
    for arguments in ((), ("a", "--all")):
        done = cache(*arguments)
        assert (done.returncode, done.stderr) == (
            2,
            "memtail: give the names of experiments, or --all for those that are to be trained\n",
        )
