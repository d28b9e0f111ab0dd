"""torchvision's classification datasets, each read from small files in its own format, as torchvision itself reads them."""

import functools
import inspect
import typing
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import Subset

from memtail import datasets
from memtail.datasets import folder
from memtail.datasets.torchvision_datasets import _parameters
from memtail.datasets.torchvision_table import ENTRIES
from memtail.errors import DatasetError, SpecError
from memtail.spec import DatasetSpec, Experiment, TorchvisionDataset
from tests.support.torchvision_files import OPTIONS, TEST, TRAIN, WRITERS, accept_any_bytes

# PCAM is read by h5py, which memtail does not need; CIFAR100 differs from CIFAR10 in its labels only.
NOT_WRITTEN = {"PCAM", "CIFAR100"}


@functools.cache
def class_of(name):
    """Return a class of torchvision."""
    from torchvision import datasets as classes

    return getattr(classes, name)


def lists():
    """Return whether torchvision's classes take a function that loads an image, as they do from version 0.22 on."""
    return "loader" in inspect.signature(class_of("Food101").__init__).parameters


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Prepare a dataset whose files are written first."""
    accept_any_bytes(monkeypatch)
    # processes that decode images take seconds to start
    monkeypatch.setattr(folder, "ProcessPoolExecutor", lambda processes, **_: ThreadPoolExecutor(processes))

    def prepare(name, **keys):
        if ENTRIES[name].listed and not lists():
            pytest.skip("this version of torchvision lists no images")
        keys = {"root": tmp_path, "options": OPTIONS.get(name, {})} | keys
        return datasets.as_images(datasets.prepare(TorchvisionDataset(torchvision=name, **keys)))

    return prepare


def images_of(dataset, coloured):
    """Return pixels and labels of a dataset of torchvision, in its order."""
    pairs = [dataset[index] for index in range(len(dataset))]
    pixels = np.stack([np.asarray(image.convert("RGB") if coloured else image) for image, _ in pairs])
    return pixels if pixels.ndim == 4 else pixels[..., None], [int(label) for _, label in pairs]


def listed_of(dataset):
    """Return what sorts the images of a class of torchvision that lists them in the order of the file system."""
    return getattr(dataset, "_image_files", None) or dataset.index


@pytest.mark.parametrize("name", WRITERS)
def test_a_dataset_is_read_as_torchvision_reads_it(prepare, tmp_path, name):
    WRITERS[name](tmp_path)
    dataset, entry = prepare(name), ENTRIES[name]
    place = {} if name == "FakeData" else {"root": str(tmp_path)}
    for split, arguments in (("train", entry.train), ("test", entry.test)):
        if arguments is None:
            assert dataset.n_test == 0
            continue
        read = class_of(name)(**place, **OPTIONS.get(name, {}), **arguments)
        if entry.unordered:
            order = sorted(range(len(read)), key=lambda index: str(listed_of(read)[index]))
            read = Subset(read, order)
        pixels, labels = images_of(read, entry.mixed)
        np.testing.assert_array_equal(getattr(dataset, f"{split}_images"), pixels)
        assert getattr(dataset, f"{split}_labels").tolist() == labels
    assert len(np.unique(dataset.train_images.reshape(dataset.n_train, -1), axis=0)) == dataset.n_train
    assert (dataset.train_files is not None) == entry.listed


def test_each_declarable_class_has_an_entry_and_is_tested():
    names = set(typing.get_args(TorchvisionDataset.model_fields["torchvision"].annotation))
    assert names == ENTRIES.keys()
    assert names == WRITERS.keys() | NOT_WRITTEN


def test_splits_and_options_are_those_of_the_installed_torchvision():
    for name, entry in ENTRIES.items():
        parameters = _parameters(class_of(name))
        assert {*entry.train, *(entry.test or {})} <= parameters.keys(), name
        assert entry.listed == ("loader" in parameters) or not lists(), name
        # a class whose constructor has a split, as a newer torchvision may give it, needs an entry with it
        assert entry.test is not None or not {"train", "split"} & parameters.keys() or name == "LFWPeople", name


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("ImageNet", ("tench, Tinca tinca", "goldfish")),
        ("STL10", ("airplane", "bird")),
        ("Food101", ("cake", "soup")),
        ("StanfordCars", ("AM General", "Acura")),
        ("OxfordIIITPet", ("Abyssinian", "American Bulldog")),
        ("INaturalist", ("00000_Animalia_A_B_C_D_E_f", "00001_Plantae_A_B_C_D_E_f")),
        ("GTSRB", ("0", "1")),
        ("Caltech101", ("ant", "bee")),
        ("LFWPeople", ("Ann_Lee", "Bo_Ek")),
        ("SUN397", ("abbey", "bar/outdoor")),
    ],
)
def test_classes_have_the_names_that_torchvision_knows(prepare, tmp_path, name, classes):
    WRITERS[name](tmp_path)
    assert prepare(name).classes == classes


def test_names_of_classes_do_not_stay_where_other_labels_are_chosen(prepare, tmp_path):
    WRITERS["OxfordIIITPet"](tmp_path)
    assert prepare("OxfordIIITPet", options={"target_types": "binary-category"}).classes == ("0", "1")
    WRITERS["INaturalist"](tmp_path)
    dataset = prepare("INaturalist", options={"target_type": "kingdom"})
    assert dataset.classes == ("0", "1")
    assert dataset.train_labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_mnist_by_either_name_is_one_dataset(prepare, tmp_path):
    WRITERS["MNIST"](tmp_path)
    assert prepare("MNIST").fingerprint == datasets.prepare(DatasetSpec(name="mnist", root=tmp_path)).fingerprint


def test_files_are_searched_in_the_folder_of_datasets_and_name_the_images(prepare, tmp_path, monkeypatch):
    WRITERS["DTD"](tmp_path)
    monkeypatch.setenv("MEMTAIL_DATA", str(tmp_path))
    dataset = prepare("DTD", root=None, max_train=3, max_test=2)
    assert dataset.train_files.tolist() == [f"dtd/dtd/images/{('banded', 'dotted')[index % 2]}/{index}.jpg".encode() for index in (0, 2, 4)]
    assert dataset.train_labels.tolist() == [0, 0, 0]


def test_limits_of_decoded_images_are_evenly_spaced(prepare, tmp_path):
    WRITERS["GTSRB"](tmp_path)
    assert prepare("GTSRB").train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert prepare("GTSRB", max_train=2).train_labels.tolist() == [0, 1]


def test_an_option_may_choose_another_training_split(prepare, tmp_path):
    WRITERS["Flowers102"](tmp_path)
    assert prepare("Flowers102").n_train == TRAIN
    dataset = prepare("Flowers102", options={"split": "val"})
    assert (dataset.n_train, dataset.n_test) == (2, TEST)


@pytest.mark.parametrize("name", ["Food101", "GTSRB"])
def test_images_of_unequal_size_need_a_resolution(prepare, tmp_path, name):
    WRITERS[name](tmp_path)
    path = next(tmp_path.rglob("*0.jpg" if name == "Food101" else "Training/*/*0.ppm"))
    Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(path)
    with pytest.raises(DatasetError, match=r"set dataset\.resolution|need dataset\.resolution"):
        prepare(name)
    assert prepare(name, resolution=8).train_images.shape == (TRAIN, 8, 8, 3)


def test_changed_files_are_prepared_again(prepare, tmp_path):
    WRITERS["USPS"](tmp_path)
    first = prepare("USPS")
    assert prepare("USPS").fingerprint == first.fingerprint
    (tmp_path / "usps.bz2").write_bytes((tmp_path / "usps.t.bz2").read_bytes())
    assert prepare("USPS").fingerprint != first.fingerprint


def test_changed_labels_of_unchanged_images_are_prepared_again(prepare, tmp_path):
    from scipy.io import savemat

    WRITERS["Flowers102"](tmp_path)
    first = prepare("Flowers102")
    savemat(tmp_path / "flowers-102/imagelabels.mat", {"labels": np.arange(TRAIN + TEST)[None] % 3 + 1})
    second = prepare("Flowers102")
    assert (second.train_images == first.train_images).all()
    assert second.train_labels.tolist() != first.train_labels.tolist()


def test_damaged_files_are_listed_or_left_out(prepare, tmp_path):
    WRITERS["Food101"](tmp_path)
    for index in (0, 2):
        (tmp_path / f"food-101/images/cake/{index}.jpg").write_bytes(b"")
    with pytest.raises(
        DatasetError, match=r"dataset 'Food101': 2 of 10 images cannot be used: .*cake/0\.jpg: is empty; .*set dataset\.on_error"
    ):
        prepare("Food101")
    assert prepare("Food101", on_error="skip").n_train == TRAIN - 2


def test_an_image_that_torchvision_cannot_decode_is_named(prepare, tmp_path):
    WRITERS["GTSRB"](tmp_path)
    path = sorted(tmp_path.rglob("Training/*/*.ppm"))[1]
    path.write_bytes(b"P6")
    with pytest.raises(DatasetError, match=rf"dataset 'GTSRB' in {tmp_path}: train\[1\] cannot be read \(.*\): replace its file"):
        prepare("GTSRB")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("SVHN", {"splits": "extra"}, r"dataset\.options: torchvision's SVHN has no option 'splits': known are split"),
        ("SVHN", {"download": False}, "has no option 'download'"),
        ("EMNIST", {}, r"torchvision's EMNIST needs 'split': set it in dataset\.options"),
        (
            "EMNIST",
            {"split": "digit"},
            r"dataset 'EMNIST' in .*cannot read its train split \(ValueError: Unknown value 'digit'.*fix dataset\.options",
        ),
    ],
)
def test_options_that_do_not_fit_are_named(prepare, tmp_path, name, options, message):
    WRITERS[name](tmp_path)
    with pytest.raises(DatasetError, match=message):
        prepare(name, options=options)


@pytest.mark.parametrize(("name", "key"), [("SVHN", {"on_error": "skip"}), ("GTSRB", {"orientation": "exif"})])
def test_decoded_images_have_no_orientation_and_no_damaged_files(prepare, name, key):
    with pytest.raises(
        DatasetError, match=f"dataset '{name}': torchvision decodes its images: remove dataset.orientation and dataset.on_error"
    ):
        prepare(name, **key)


def test_files_that_are_missing_are_named_with_the_way_to_get_them(prepare, tmp_path, monkeypatch):
    for name in ("ImageNet", "StanfordCars", "FER2013"):
        with pytest.raises(
            DatasetError, match=rf"dataset '{name}' is not in {tmp_path}, .* torchvision cannot download it: put .* into a folder, and set"
        ):
            prepare(name)
    calls = []

    def refuse(self, root, split, download):
        calls.append((root, split, download))
        raise RuntimeError("no network\nat all")

    monkeypatch.setattr(class_of("SVHN"), "__init__", refuse)
    with pytest.raises(
        DatasetError,
        match=r"'SVHN' is not in .*cannot be downloaded \(no network\): on a machine with a network run python -c "
        r"\"from torchvision\.datasets import SVHN; .*'split': 'train'.*'split': 'test'.*and set dataset\.root or MEMTAIL_DATA to DIR",
    ):
        prepare("SVHN")
    assert calls == [(str(tmp_path), "train", True)]


def test_a_version_of_torchvision_that_lists_no_images_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.DTD", type("DTD", (), {"__init__": lambda self, root, split="train", partition=1: None}))
    with pytest.raises(DatasetError, match=r"dataset 'DTD' needs torchvision 0\.22 or newer, which lists its images: upgrade torchvision"):
        datasets.prepare(TorchvisionDataset(torchvision="DTD", root=tmp_path))


def test_a_file_with_other_bytes_than_torchvisions_is_refused(tmp_path):
    WRITERS["SVHN"](tmp_path)
    with pytest.raises(
        DatasetError, match=r"dataset 'SVHN' in .*cannot read its train split \(RuntimeError: .*corrupted.*complete or replace"
    ):
        datasets.prepare(TorchvisionDataset(torchvision="SVHN", root=tmp_path))


def test_an_unknown_class_is_refused_and_relative_roots_start_from_the_file(tmp_path):
    with pytest.raises(SpecError, match=r"dataset\.torchvision: there is no 'SVNH': did you mean 'SVHN'\?"):
        Experiment.parse({"name": "e", "dataset": {"torchvision": "SVNH"}})
    experiment = Experiment.parse({"name": "e", "dataset": {"torchvision": "SVHN", "root": "data"}}, base=tmp_path)
    assert experiment.dataset.root == tmp_path / "data"


def test_options_that_torchvision_refuses_are_no_fault_of_the_network(tmp_path):
    spec = TorchvisionDataset(torchvision="SVHN", root=tmp_path, options={"split": "foo"})
    with pytest.raises(DatasetError, match=r"dataset 'SVHN': torchvision refuses dataset\.options \(Unknown value 'foo'"):
        datasets.prepare(spec)
