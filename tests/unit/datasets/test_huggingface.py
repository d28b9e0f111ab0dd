"""Datasets of Hugging Face's package, written to folders on this machine and read from there."""

import builtins
import io

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, config
from PIL import Image as Pillow

from memtail import datasets
from memtail.datasets import FeatureDataset, ImageDataset, TextDataset
from memtail.errors import DatasetError, SpecError
from memtail.spec import Experiment, HuggingFaceDataset

COUNTS = {"train": 6, "test": 4}
TEXTS = {"text": "text", "label": "label"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "huggingface")


@pytest.fixture
def prepare(tmp_path):
    def prepare(columns=TEXTS, **keys):
        return datasets.prepare(HuggingFaceDataset(**{"huggingface": str(tmp_path / "held"), "columns": columns} | keys))

    return prepare


@pytest.fixture
def texts(tmp_path):
    """A dataset of texts of two named classes, in a folder of `save_to_disk`."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"]), "name": Value("int32")})
    held = DatasetDict(
        {
            split: Dataset.from_dict(
                {
                    "text": [f"{split} {index}" for index in range(count)],
                    "label": [index % 2 for index in range(count)],
                    "name": range(count),
                },
                features=features,
            )
            for split, count in COUNTS.items()
        }
    )
    held.save_to_disk(tmp_path / "held")
    return held


def write(texts, folder, kind):
    """Write a dataset in another format."""
    folder.mkdir()
    for split, rows in texts.items():
        ending, writer = {
            "parquet": ("parquet", rows.to_parquet),
            "csv": ("csv", rows.to_csv),
            "jsonl": ("jsonl", rows.to_json),
        }[kind]
        writer(folder / f"{split}.{ending}")


def write_encoded(folder, *encoded):
    """Write a dataset of encoded images, of two classes."""
    rows = {"image": [{"bytes": data} for data in encoded], "label": range(len(encoded))}
    held = Dataset.from_dict(rows, features=Features({"image": Image(), "label": Value("int64")}))
    DatasetDict(dict.fromkeys(COUNTS, held)).save_to_disk(folder)
    return held


def images(count):
    return [np.random.default_rng(index).integers(0, 256, (8, 6, 3), dtype=np.uint8) for index in range(count)]


def test_texts_have_the_names_of_their_classes_and_ids(prepare, texts):
    dataset = prepare(TEXTS | {"id": "name"})
    assert isinstance(dataset, TextDataset)
    assert list(dataset.train_texts) == [f"train {index}" for index in range(6)]
    assert list(dataset.test_texts) == [f"test {index}" for index in range(4)]
    assert dataset.classes == ("neg", "pos")
    assert dataset.train_labels.tolist() == [0, 1] * 3
    assert dataset.train_files.tolist() == [str(index).encode() for index in range(6)]


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_a_folder_of_files_is_read_like_one_of_the_package(prepare, texts, tmp_path, kind):
    held = prepare(TEXTS | {"id": "name"})
    write(texts, tmp_path / kind, kind)
    dataset = prepare(TEXTS | {"id": "name"}, huggingface=str(tmp_path / kind))
    assert list(dataset.train_texts) == list(held.train_texts)
    assert dataset.test_labels.tolist() == held.test_labels.tolist()
    # csv and json lines hold no names of classes
    assert dataset.classes == (("neg", "pos") if kind == "parquet" else ("0", "1"))
    assert (dataset.fingerprint == held.fingerprint) == (kind == "parquet")


def test_splits_may_have_other_names_and_be_parts_of_one(prepare, texts, tmp_path):
    write(texts, tmp_path / "files", "parquet")
    dataset = prepare(huggingface=str(tmp_path / "files"), splits={"train": "train[:4]", "test": "train[4:]"})
    assert list(dataset.train_texts) == [f"train {index}" for index in range(4)]
    assert list(dataset.test_texts) == ["train 4", "train 5"]


def test_test_examples_and_labels_may_be_missing(prepare, texts):
    dataset = prepare(splits={"train": "train"})
    assert (dataset.n_train, dataset.n_test, dataset.classes) == (6, 0, ("neg", "pos"))
    dataset = prepare({"text": "text", "id": "name"})
    assert (dataset.n_train, dataset.n_test, dataset.labelled) == (6, 4, False)
    assert list(dataset.train_texts) == [f"train {index}" for index in range(6)]


def test_limits_are_evenly_spaced(prepare, texts):
    dataset = prepare(max_train=3, max_test=2)
    assert list(dataset.train_texts) == ["train 0", "train 2", "train 4"]
    assert list(dataset.test_texts) == ["test 0", "test 2"]


@pytest.mark.parametrize("encoding", ["PNG", "images of a folder"])
def test_images_are_those_that_were_saved(prepare, tmp_path, encoding):
    held = images(6)
    if encoding == "PNG":
        rows = {"image": [Pillow.fromarray(image) for image in held], "label": [index % 2 for index in range(6)]}
        features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})
        DatasetDict(dict.fromkeys(COUNTS, Dataset.from_dict(rows, features=features))).save_to_disk(tmp_path / "held")
    else:
        for split in COUNTS:
            for index, image in enumerate(held):
                path = tmp_path / "held" / split / ("cat", "dog")[index % 2] / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Pillow.fromarray(image).save(path)
        held = held[::2] + held[1::2]
    dataset = prepare({"image": "image", "label": "label"})
    assert isinstance(dataset, ImageDataset)
    assert (dataset.train_images == np.stack(held)).all()
    assert dataset.classes == ("cat", "dog")


def test_grey_images_stay_grey_photographs_are_upright_and_sizes_need_a_resolution(prepare, tmp_path):
    exif = Pillow.Exif()
    exif[0x0112] = 6
    data = io.BytesIO()
    Pillow.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).save(data, "PNG", exif=exif)
    rows = write_encoded(tmp_path / "held", data.getvalue(), data.getvalue())
    columns = {"image": "image", "label": "label"}
    dataset = prepare(columns)
    assert (dataset.train_images[0, ..., 0] == np.asarray(rows[0]["image"])).all()
    assert dataset.train_images.shape == (2, 4, 3, 1)
    assert prepare(columns, resolution=2).train_images.shape == (2, 2, 2, 1)


def test_damaged_images_are_listed(prepare, tmp_path):
    write_encoded(tmp_path / "held", b"GIF", b"")
    with pytest.raises(DatasetError, match=r"4 of 4 images cannot be used: train\[0\] is no image, .*; train\[1\] is empty; test"):
        prepare({"image": "image", "label": "label"})


@pytest.mark.parametrize(("named", "names"), [("all", ("a", "v[0]", "v[1]")), (["v"], ("v[0]", "v[1]")), (["a"], ("a",))])
def test_features_are_columns_of_numbers_or_of_lists(prepare, tmp_path, named, names):
    rows = Dataset.from_dict({"a": [1, 2], "v": [[0.5, 1.5], [2.5, 3.5]], "kind": ["x", "y"]})
    DatasetDict(dict.fromkeys(COUNTS, rows)).save_to_disk(tmp_path / "held")
    dataset = prepare({"features": named, "label": "kind"})
    assert isinstance(dataset, FeatureDataset)
    assert dataset.features == names
    values = {"a": [1, 2], "v[0]": [0.5, 2.5], "v[1]": [1.5, 3.5]}
    np.testing.assert_array_equal(dataset.train_features, np.array([values[name] for name in names], np.float32).T)
    assert dataset.classes == ("x", "y")


def test_a_changed_dataset_is_prepared_again(prepare, texts, tmp_path):
    first = prepare()
    assert prepare().fingerprint == first.fingerprint
    texts["test"] = texts["train"]
    texts.save_to_disk(tmp_path / "other")
    (tmp_path / "held").rename(tmp_path / "gone")
    (tmp_path / "other").rename(tmp_path / "held")
    assert prepare().fingerprint != first.fingerprint


def test_faults_name_the_split_the_column_and_the_row(prepare, texts, tmp_path):
    for keys, message in (
        ({"splits": {"train": "train", "test": "validation"}}, "has no split 'validation', there are train, test: fix dataset.splits"),
        ({"columns": {"text": "texts", "label": "label"}}, "split 'train' has no column 'texts', there are text, label, name: fix"),
        ({"columns": {"image": "text", "label": "label"}}, "column 'text' holds Value.*: name the column of the images"),
        (
            {"columns": {"features": "all", "label": "label"}},
            r"train\[0\] cannot be read \(ValueError: column 'text' holds 'train 0', and fea",
        ),
        (
            {"huggingface": str(tmp_path / "missing")},
            "there is no folder .*missing: give the path of one, or",
        ),
    ):
        with pytest.raises(DatasetError, match=message):
            prepare(**keys)
    texts["train"] = Dataset.from_dict(texts["train"][:] | {"text": [None] * 6}, features=texts["train"].features)
    texts.save_to_disk(tmp_path / "empty")
    with pytest.raises(DatasetError, match=r"train\[0\] cannot be read \(ValueError: column 'text' has no value\)"):
        prepare(huggingface=str(tmp_path / "empty"))
    texts["test"] = texts["train"].cast_column("label", ClassLabel(names=["pos", "neg"]))
    texts.save_to_disk(tmp_path / "classes")
    with pytest.raises(DatasetError, match="the splits have different classes in column 'label'"):
        prepare(huggingface=str(tmp_path / "classes"))
    texts["train"].save_to_disk(tmp_path / "single")
    with pytest.raises(DatasetError, match="holds one split without a name: save a DatasetDict"):
        prepare(huggingface=str(tmp_path / "single"))


def test_a_dataset_with_code_is_refused(prepare, tmp_path):
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "held.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(DatasetError, match="cannot be loaded"):
        prepare()
    assert not (tmp_path / "ran").exists()


def test_a_name_that_is_no_folder_is_one_of_the_hub_whose_absence_is_one_line(prepare, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DatasetError, match=r"dataset 'no/such' cannot be loaded \(.*no/such.* Hub .*\)") as fault:
        prepare(huggingface="no/such")
    assert "\n" not in str(fault.value)


def test_without_the_package_the_extra_is_named(prepare, monkeypatch):
    def refuse(name, *arguments, **keys):
        if name == "datasets":
            raise ImportError(name)
        return imported(name, *arguments, **keys)

    imported = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DatasetError, match=r"is read by the package datasets, which is not installed: pip install 'memtail\[hf\]'"):
        prepare(huggingface="no/such")


def test_a_folder_is_relative_to_the_experiment_file_and_a_name_stays(tmp_path):
    (tmp_path / "here").mkdir()

    def declared(name):
        dataset = {"huggingface": name, "columns": TEXTS}
        return Experiment.parse({"name": "e", "dataset": dataset}, base=tmp_path).dataset.huggingface

    assert [declared(name) for name in ("here", "./there", "stanfordnlp/imdb")] == [
        str(tmp_path / "here"),
        str(tmp_path / "there"),
        "stanfordnlp/imdb",
    ]
    with pytest.raises(SpecError, match=r"columns\.split is for dataset 'table': name the splits in splits"):
        Experiment.parse({"name": "e", "dataset": {"huggingface": "a", "columns": TEXTS | {"split": "s"}}})
