"""Datasets: reading, preparation and its cache, and errors that name the file."""

import hashlib
import pickle
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from memtail import datasets
from memtail.datasets import folder as folder_module
from memtail.datasets.folder import prepare_folder
from memtail.datasets.image_tree import find_images
from memtail.datasets.torchvision_sources import TORCHVISION, _Cifar, _Mnist
from memtail.errors import DatasetError
from memtail.spec import DatasetSpec
from tests.support.arrays import write_arrays, write_mnist, write_tree


def arrays(path, **parts):
    return datasets.prepare(DatasetSpec(name="arrays", root=path, **parts))


def test_digits_equal_those_of_scikit_learn(digits):
    from sklearn.datasets import load_digits

    bunch = load_digits()
    assert digits.n_train + digits.n_test == 1797
    assert digits.image_shape == (1, 8, 8)
    assert (digits.test_labels == bunch.target[4::5]).all()
    assert (digits.test_images[..., 0] == np.rint(bunch.images[4::5] * 255 / 16)).all()
    np.testing.assert_allclose(digits.mean[0], digits.train_images.mean(), rtol=1e-12)
    np.testing.assert_allclose(digits.std[0], digits.train_images.std(), rtol=1e-12)


def test_arrays_are_unchanged_and_limits_take_the_first_examples(tmp_path):
    path = write_arrays(tmp_path / "a.npz")
    held = np.load(path)
    dataset = arrays(path)
    assert (dataset.train_images[..., 0] == held["train_images"]).all()
    assert (dataset.test_labels == held["test_labels"]).all()
    assert dataset.train_images.dtype == np.uint8
    assert isinstance(dataset.train_images, np.memmap)
    small = arrays(path, max_train=10, max_test=3)
    assert (small.n_train, small.n_test) == (10, 3)
    assert (small.train_images[..., 0] == held["train_images"][:10]).all()
    assert small.fingerprint != dataset.fingerprint


def test_equal_content_has_equal_fingerprints_and_is_prepared_once(tmp_path, monkeypatch):
    first, second = arrays(write_arrays(tmp_path / "a.npz")), arrays(write_arrays(tmp_path / "b.npz"))
    assert first.fingerprint == second.fingerprint
    assert first.folder == second.folder
    monkeypatch.setattr(datasets, "load_arrays", lambda path: pytest.fail("prepared again"))
    assert arrays(tmp_path / "a.npz").fingerprint == first.fingerprint
    monkeypatch.undo()
    changed = np.load(tmp_path / "a.npz")["train_images"]
    changed[0, 0, 0] ^= 1
    assert arrays(write_arrays(tmp_path / "a.npz", train_images=changed)).fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_labels": np.array([0, 1] * 19 + [0, -1])}, "train_labels: 1 labels out of range, the first is -1 at index 39"),
        (
            {"test_labels": np.array([0, 1] * 9 + [0, 7])},
            "test_labels: 1 labels out of range, the first is 7 at index 19: labels must be 0 to 1",
        ),
        ({"train_labels": np.zeros(39, int)}, "needed are 40 labels"),
        ({"train_labels": np.full(40, 0.5)}, "train_labels: 40 labels are no whole numbers, the first is 0.5 at index 0"),
        ({"train_images": np.zeros((40, 6, 6))}, "train_images is float64"),
        ({"train_images": np.zeros((40, 0, 6), np.uint8)}, "train_images is uint8 [40, 0, 6]"),
        ({"train_labels": np.array([0] * 39 + [10**10])}, "10000000000 at index 39 makes more classes than there are examples"),
        ({"train_labels": np.zeros(40, int), "test_labels": np.zeros(20, int)}, "1 class, at least 2 are needed"),
        ({"test_images": np.zeros((20, 5, 6), np.uint8)}, "all must be of one size"),
    ],
)
def test_wrong_arrays_are_refused_by_name(tmp_path, changes, message):
    with pytest.raises(DatasetError, match=re.escape(message)):
        arrays(write_arrays(tmp_path / "a.npz", **changes))


def test_missing_truncated_and_incomplete_npz_files_are_named(tmp_path):
    with pytest.raises(DatasetError, match=r"there is no file .*a\.npz"):
        arrays(tmp_path / "a.npz")
    data = write_arrays(tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(DatasetError, match=r"a\.npz: is truncated or corrupt"):
        arrays(tmp_path / "a.npz")
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(DatasetError, match=r"a\.npy: is not an \.npz file"):
        arrays(tmp_path / "a.npy")
    with np.load(write_arrays(tmp_path / "b.npz")) as held:
        np.savez_compressed(tmp_path / "a.npz", **held)
    damaged = bytearray((tmp_path / "a.npz").read_bytes())
    damaged[200:600] = bytes(400)
    (tmp_path / "a.npz").write_bytes(damaged)
    with pytest.raises(DatasetError, match=r"a\.npz: is truncated or corrupt"):
        arrays(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", train_images=np.zeros((2, 2, 2), np.uint8), test_labels=np.zeros(2))
    with pytest.raises(
        DatasetError, match="holds no train_labels, test_images; there: train_images, test_labels: name the arrays train_images, "
    ):
        arrays(tmp_path / "a.npz")


@pytest.mark.parametrize("compress", [False, True])
def test_mnist_is_read_from_the_files_that_torchvision_downloads(tmp_path, compress, monkeypatch):
    held = write_mnist(tmp_path, compress)
    monkeypatch.setenv("MEMTAIL_DATA", str(tmp_path))
    for root in (tmp_path, None):
        dataset = datasets.as_images(datasets.prepare(DatasetSpec(name="mnist", root=root)))
        assert (dataset.train_images[..., 0] == held["train"]).all()
        assert (dataset.test_images[..., 0] == held["t10k"]).all()
        assert dataset.train_labels.tolist() == list(range(8))
        assert len(dataset.classes) == 10


@pytest.mark.parametrize("compress", [False, True])
def test_a_truncated_mnist_file_is_named(tmp_path, compress):
    write_mnist(tmp_path, compress)
    path = next((tmp_path / "MNIST" / "raw").glob("t10k-images*"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DatasetError, match=f"{path.name}: is truncated or corrupt"):
        datasets.prepare(DatasetSpec(name="mnist", root=tmp_path))


def write_cifar10(root, monkeypatch):
    """Write five batches of two training images and three test images in torchvision's layout; register their MD5 with both readers."""
    from torchvision import datasets as torchvision_datasets

    folder, rng = root / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir()

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes(), usedforsecurity=False).hexdigest()]

    def batch(name, count):
        return write(name, {"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8), "labels": list(range(count))})

    kind = torchvision_datasets.CIFAR10
    files = [batch(f"data_batch_{number}", 2) for number in range(1, 6)] + [batch("test_batch", 3)]
    files.append(write("batches.meta", {"label_names": ["cat", "dog", "frog"]}))
    monkeypatch.setattr(kind, "train_list", files[:5])
    monkeypatch.setattr(kind, "test_list", files[5:6])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": files[6][1]})
    family = TORCHVISION["cifar10"]
    assert isinstance(family, _Cifar)
    monkeypatch.setitem(TORCHVISION, "cifar10", replace(family, digests=dict(files)))
    return kind(str(root), train=True).data, kind(str(root), train=False).data


def test_cifar_is_read_as_torchvision_reads_it(tmp_path, monkeypatch):
    train, test = write_cifar10(tmp_path, monkeypatch)
    dataset = datasets.as_images(datasets.prepare(DatasetSpec(name="cifar10", root=tmp_path)))
    assert (dataset.train_images == train).all()
    assert (dataset.test_images == test).all()
    assert dataset.train_labels.tolist() == [0, 1] * 5
    assert dataset.classes == ("cat", "dog", "frog")


def test_a_corrupt_cifar_file_is_named_and_a_missing_one_is_downloaded(tmp_path, monkeypatch):
    from torchvision import datasets as torchvision_datasets

    write_cifar10(tmp_path, monkeypatch)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DatasetError, match=r"data_batch_3: is truncated or corrupt \(its MD5 is not"):
        datasets.prepare(DatasetSpec(name="cifar10", root=tmp_path))
    path.unlink()
    monkeypatch.setattr(torchvision_datasets.CIFAR10, "__init__", lambda *_, download: pytest.fail(f"download={download}"))
    with pytest.raises(pytest.fail.Exception, match="download=True"):
        datasets.prepare(DatasetSpec(name="cifar10", root=tmp_path))


def test_digests_and_classes_equal_those_of_torchvision():
    from torchvision import datasets as torchvision_datasets

    for family in TORCHVISION.values():
        known = getattr(torchvision_datasets, family.class_name)
        if isinstance(family, _Cifar):
            files = [*known.train_list, *known.test_list, [known.meta["filename"], known.meta["md5"]]]
            assert list(family.digests.items()) == [tuple(file) for file in files]
            assert f"{family.label_kind}label_names" == known.meta["key"]
        else:
            assert isinstance(family, _Mnist)
            assert list(family.classes) == known.classes


def test_every_declarable_dataset_has_a_source():
    assert datasets._SOURCES.keys() == set(DatasetSpec.model_fields["name"].annotation.__args__)


def test_the_error_of_a_missing_dataset_names_the_folders_searched_and_the_fix(tmp_path, monkeypatch):
    from torchvision import datasets as torchvision_datasets

    def refuse(*_, **__):
        raise RuntimeError("no network")

    monkeypatch.setattr(torchvision_datasets, "CIFAR10", type("CIFAR10", (), {**vars(torchvision_datasets.CIFAR10), "__init__": refuse}))
    with pytest.raises(DatasetError, match=rf"'cifar10' is not in {tmp_path}/cifar-10-batches-py, .*no network.*download=True"):
        datasets.prepare(DatasetSpec(name="cifar10", root=tmp_path))


def prepare_tree(root, **parts):
    return datasets.prepare(DatasetSpec(name="folder", root=root, **parts))


def test_a_folder_is_read_in_the_order_of_its_file_names_which_are_recorded(tmp_path):
    held = write_tree(tmp_path)
    dataset = prepare_tree(tmp_path)
    assert dataset.classes == ("cat", "dog")
    assert dataset.train_labels.tolist() == [0] * 5 + [1] * 5
    names = [name.decode() for name in dataset.train_files]
    assert names == [f"{label}/{index:03}.png" for label in ("cat", "dog") for index in range(5)]
    for name, image in zip(names, dataset.train_images, strict=True):
        assert (image == held[f"train/{name}"]).all()
    for name, image in zip(dataset.test_files, dataset.test_images, strict=True):
        assert (image == held[f"val/{name.decode()}"]).all()


def test_a_folders_limit_is_spread_over_its_classes(tmp_path):
    write_tree(tmp_path)
    assert prepare_tree(tmp_path, max_train=4, max_test=2).train_labels.tolist() == [0, 0, 1, 1]


def test_images_are_resized_on_their_shorter_side_and_cropped(tmp_path):
    write_tree(tmp_path, size=(20, 30), suffix=".jpg")
    grey = np.zeros((40, 40), np.uint8)
    Image.fromarray(grey).save(tmp_path / "train" / "cat" / "grey.bmp")
    dataset = prepare_tree(tmp_path, resolution=10)
    assert dataset.train_images.shape == (11, 10, 10, 3)
    assert (dataset.train_images[5] == 0).all()


def test_images_of_unequal_size_are_refused_without_a_resolution(tmp_path):
    write_tree(tmp_path)
    Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(tmp_path / "train" / "dog" / "odd.png")
    with pytest.raises(DatasetError, match=r"odd\.png: is 8 x 9 pixels, the first image 8 x 8: .* need dataset\.resolution"):
        prepare_tree(tmp_path)


def test_a_corrupt_image_is_named_and_chunks_decoded_before_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "CHUNK", 2)
    root, target = tmp_path / "tree", tmp_path / "prepared"
    held = write_tree(root)
    bad = root / "val" / "dog" / "004.png"
    good = bad.read_bytes()
    bad.write_bytes(good[: len(good) // 2])
    spec, unusable = DatasetSpec(name="folder", root=root), tmp_path / "unusable.txt"
    with pytest.raises(DatasetError, match=r"val/dog/004\.png: is truncated or corrupt"):
        prepare_folder(find_images(root, None, None), spec, target, unusable, None)
    journal = next(target.glob(".unfinished-*/journal.jsonl"))
    done = len(journal.read_text().split())
    assert done > 0
    bad.write_bytes(good)
    steps = []
    prepared = prepare_folder(find_images(root, None, None), spec, target, unusable, lambda *step: steps.append(step))
    assert steps[-1] == (20, 20)
    assert len(steps) < 10
    dataset = datasets.ImageDataset.open(prepared)
    assert all(
        (image == held[f"train/{name.decode()}"]).all() for name, image in zip(dataset.train_files, dataset.train_images, strict=True)
    )
    fresh = datasets.ImageDataset.open(prepare_folder(find_images(root, None, None), spec, tmp_path / "fresh", unusable, None))
    assert fresh.fingerprint == dataset.fingerprint
    assert (fresh.test_images == dataset.test_images).all()


def test_images_of_16_bits_are_refused_and_hidden_folders_ignored(tmp_path):
    write_tree(tmp_path)
    (tmp_path / "train" / ".checkpoints").mkdir()
    assert prepare_tree(tmp_path).classes == ("cat", "dog")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "train" / "dog" / "deep.png")
    with pytest.raises(DatasetError, match=r"deep\.png: has more than 8 bits per channel"):
        prepare_tree(tmp_path)


def test_an_unusable_cache_is_one_clear_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEMTAIL_CACHE", str(tmp_path / "file"))
    with pytest.raises(DatasetError, match="MEMTAIL_CACHE"):
        datasets.prepare(DatasetSpec(name="digits"))


@pytest.mark.parametrize("damaged", [False, True])
def test_a_tree_of_training_images_alone_has_no_test_set(tmp_path, damaged):
    write_tree(tmp_path)
    shutil.rmtree(tmp_path / "val")
    if damaged:
        (tmp_path / "train/cat/bad.png").write_bytes(b"no")
    (tmp_path / "README.txt").write_text("")
    dataset = datasets.as_images(datasets.prepare(DatasetSpec(name="folder", root=tmp_path, on_error="skip")))
    assert (dataset.n_train, dataset.n_test, dataset.classes) == (10, 0, ("cat", "dog"))
    assert dataset.test_images.shape == (0, 8, 8, 3)
    assert dataset.test_files is not None
    assert dataset.test_files.tolist() == []


def test_a_missing_split_class_or_root_is_named(tmp_path):
    with pytest.raises(DatasetError, match="there is no folder"):
        prepare_tree(tmp_path / "missing")
    (tmp_path / "train").mkdir()
    with pytest.raises(DatasetError, match=r"train holds no images"):
        prepare_tree(tmp_path)
    (tmp_path / "validation").mkdir()  # perhaps the test images
    with pytest.raises(DatasetError, match=r"must hold train/ and test/ \(or val/\), .*, or train/ as its only folder"):
        prepare_tree(tmp_path)
    (tmp_path / "test" / "bird").mkdir(parents=True)
    (tmp_path / "train" / "cat").mkdir()
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / "train" / "cat" / "a.png")
    with pytest.raises(DatasetError, match=r"test/bird is a class that train/ does not have"):
        prepare_tree(tmp_path)


def test_a_damaged_prepared_dataset_is_named(tmp_path):
    dataset = arrays(write_arrays(tmp_path / "a.npz", train_images=np.full((40, 6, 6), 3, np.uint8)))
    (dataset.folder / "train_images.npy").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"train_images\.npy: prepared dataset is damaged"):
        arrays(tmp_path / "a.npz")
