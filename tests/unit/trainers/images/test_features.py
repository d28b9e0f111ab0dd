"""The built-in trainer on features: standardised vectors, trained as images are."""

import numpy as np
import pytest
import torch

from memtail.datasets import FeatureDataset, prepare
from memtail.errors import SpecError
from memtail.execution.declare import declare as declare_record
from memtail.execution.declare import shard_size_in_child
from memtail.spec import DatasetSpec
from memtail.trainers.images import train_shard
from memtail.trainers.images.batches import Epoch
from memtail.trainers.images.cpu.mlp import DenseStack
from memtail.trainers.images.images import DeviceImages
from memtail.trainers.images.shard_size import checked_shard_size
from memtail.trainers.images.stack_trainer import StackedRun
from memtail.trials import unpack

CPU = torch.device("cpu")


@pytest.fixture
def features(tmp_path):
    """Prepare 60 training and 30 test vectors: one column decides, two are of other scales, and one is constant in training."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 60), ("test", 30)):
        labels = np.arange(count) % 2
        vectors = np.stack([labels + rng.normal(0, 0.2, count), rng.normal(1e6, 1e3, count), rng.normal(0, 1e-6, count)], 1)
        arrays |= {f"{split}_labels": labels, f"{split}_features": np.column_stack([vectors, np.full(count, 0.1)])}
    arrays["test_features"][:, 3] = 7.0
    np.savez(tmp_path / "f.npz", **arrays)
    dataset = prepare(DatasetSpec(name="arrays", root=tmp_path / "f.npz"))
    assert isinstance(dataset, FeatureDataset)
    return dataset


@pytest.mark.parametrize("chunk", [4, 40, 1 << 22])
def test_features_are_standardised_by_the_training_split_and_constant_ones_are_0(features, monkeypatch, chunk):
    from sklearn.preprocessing import StandardScaler

    monkeypatch.setattr("memtail.trainers.images.images._CHUNK", chunk)
    before, images = features.train_features.copy(), DeviceImages(features, CPU)
    scaler = StandardScaler().fit(features.train_features.astype(np.float64))
    for split in ("train", "test"):
        raw = features.examples(split)
        expected = np.where([True, True, True, False], scaler.transform(raw.astype(np.float64)), 0)
        np.testing.assert_allclose(images.split(split, 0, len(raw)).numpy(), expected, atol=2e-4)
    order = torch.tensor([[3, 5], [5, 3]])
    batch, _ = next(images.batches(Epoch(order, order), [slice(0, 2)]))
    torch.testing.assert_close(images.normalised(batch)[0, 0], images.split("train", 3, 4)[0])
    np.testing.assert_array_equal(features.train_features, before)


@pytest.mark.parametrize("steps", ["compiled", "torch"])
def test_an_mlp_learns_features_of_different_scales(declare, features, monkeypatch, steps):
    if steps == "torch":
        monkeypatch.setattr("memtail.trainers.images.stack_trainer.dense_layers", lambda stack: None)
    batch = train_shard(declare(4, training={"epochs": 20}), features, range(4), CPU)
    assert unpack(batch.test_correct, 30).mean() > 0.95


def test_compiled_steps_end_with_the_weights_of_torch(declare, features, monkeypatch):
    def run():
        subsets = np.stack([np.arange(50), np.arange(10, 60)])
        run = StackedRun(declare(2, training={"epochs": 3}), DeviceImages(features, CPU), (4,), 2, [0, 1], subsets)
        return run, run.train(lambda run: None)

    compiled, outcomes = run()
    assert isinstance(compiled.stack, DenseStack)
    monkeypatch.setattr("memtail.trainers.images.stack_trainer.dense_layers", lambda stack: None)
    plain, expected = run()
    vectors = torch.randn(7, 4)
    torch.testing.assert_close(compiled.stack(vectors), plain.stack(vectors).detach(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(outcomes.loss, expected.loss, rtol=1e-4)


def test_16_trials_give_the_same_bits_in_shards_of_1_and_16(declare, features):
    experiment = declare(16, record={"margins": True})
    together = train_shard(experiment, features, range(16), CPU)
    for trial in range(16):
        alone = train_shard(experiment, features, [trial], CPU)
        for name in ("membership", "train_correct", "test_correct", "train_margin", "test_margin"):
            assert getattr(alone, name)[0].tobytes() == getattr(together, name)[trial].tobytes()


def test_a_network_of_the_users_own_gets_vectors(declare, features):
    experiment = declare(2, model={"name": "tests.support.networks:for_features"}, training={"epochs": 10})
    checked_shard_size(experiment, features)
    assert unpack(train_shard(experiment, features, range(2), CPU).test_correct, 30).mean() > 0.9


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"training": {"augmentation": "flip"}},
            r"training\.augmentation: 'flip' is for images, and the dataset holds features: set it to none",
        ),
        ({"model": {"name": "cnn"}}, r"model\.name: 'cnn' takes images, .* features: use mlp, or a network of your own .*float32 \[B, 4\]"),
        ({"model": {"name": "resnet18"}}, r"model\.name: 'resnet18' takes images, and the dataset holds features: use mlp"),
    ],
)
def test_a_recipe_for_images_is_refused_in_one_line(declare, features, parts, message):
    experiment = declare(**parts, execution={"trials_per_shard": 4})
    checks = (
        checked_shard_size,
        lambda experiment, dataset: shard_size_in_child(experiment, dataset, "store"),
        lambda experiment, dataset: declare_record(experiment, dataset, 4),
    )
    for check in checks:
        with pytest.raises(SpecError, match=message) as raised:
            check(experiment, features)
        assert "\n" not in str(raised.value)
