"""Tables with a column of image paths."""

import pytest
from PIL import Image

from memtail import datasets
from memtail.datasets import ImageDataset
from memtail.errors import DatasetError, SpecError
from memtail.spec import DatasetSpec, Experiment
from tests.support.arrays import write_tree
from tests.support.odd_images import encoded

COLUMNS = {"image": "file", "label": "kind"}


@pytest.fixture
def tree(tmp_path):
    """A tree of images, and a table beside it whose rows name them in the order of the tree."""
    write_tree(tmp_path / "tree")
    for split in ("train", "val"):
        paths = sorted((tmp_path / "tree" / split).rglob("*.png"))
        rows = [f"{path.relative_to(tmp_path)},{path.parent.name},{path.parent.name}/{path.name}" for path in paths]
        (tmp_path / f"{split}.csv").write_text("\n".join(["file,kind,name", *rows]))
    return tmp_path


@pytest.fixture
def prepare(tree):
    def prepare(columns=COLUMNS, **keys):
        keys = {"root": tree / "train.csv", "test": tree / "val.csv"} | keys
        return datasets.as_images(datasets.prepare(DatasetSpec(name="table", columns=columns, **keys)))

    return prepare


def test_images_of_a_table_are_those_of_a_folder_and_named_by_their_paths(prepare, tree):
    folder = datasets.prepare(DatasetSpec(name="folder", root=tree / "tree"))
    assert isinstance(folder, ImageDataset)
    dataset = prepare()
    assert dataset.classes == ("cat", "dog")
    assert dataset.train_labels.tolist() == folder.train_labels.tolist()
    assert (dataset.train_images == folder.train_images).all()
    assert (dataset.test_images == folder.test_images).all()
    assert dataset.train_files[0] == b"tree/train/cat/000.png"
    assert prepare(COLUMNS | {"id": "name"}).fingerprint == folder.fingerprint


def test_rows_keep_their_order_and_limits_are_evenly_spaced(prepare, tree):
    lines = (tree / "train.csv").read_text().splitlines()
    (tree / "train.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]))
    assert prepare().train_files[0] == b"tree/train/dog/004.png"
    assert prepare(max_train=2).train_files.tolist() == [b"tree/train/dog/004.png", b"tree/train/cat/004.png"]


def test_a_column_may_name_the_split_and_paths_may_be_absolute(prepare, tree):
    rows = [line for split in ("train", "val") for line in (tree / f"{split}.csv").read_text().splitlines()[1:]]
    lines = [f"{tree}/{row},{'test' if '/val/' in row else 'train'}" for row in rows]
    (tree / "all.csv").write_text("\n".join(["file,kind,name,split", *lines]))
    dataset = prepare(COLUMNS | {"split": "split", "id": "name"}, root=tree / "all.csv", test=None)
    assert dataset.fingerprint == datasets.prepare(DatasetSpec(name="folder", root=tree / "tree")).fingerprint


def test_test_images_and_labels_may_be_missing(prepare):
    dataset = prepare(test=None)
    assert (dataset.n_train, dataset.n_test, dataset.classes) == (10, 0, ("cat", "dog"))
    dataset = prepare({"image": "file"})
    assert (dataset.n_train, dataset.n_test, dataset.labelled) == (10, 10, False)


def test_resolution_orientation_and_damaged_images_are_those_of_a_folder(prepare, tree):
    path = tree / "tree" / "train" / "cat" / "001.png"
    Image.new("RGB", (9, 30)).save(path)
    with pytest.raises(DatasetError, match=r"001\.png: is 9 x 30 pixels, .* need dataset\.resolution"):
        prepare()
    assert prepare(resolution=8).train_images.shape == (10, 8, 8, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    (tree / "tree" / "train" / "cat" / "000.png").write_bytes(encoded("png", (8, 12), exif=exif))
    assert prepare(resolution=8, orientation="exif").fingerprint != prepare(resolution=8).fingerprint
    path.write_bytes(b"")
    with pytest.raises(DatasetError, match=r"dataset 'table': 1 of 20 images cannot be used: .*001\.png: is empty: .*on_error to skip"):
        prepare(resolution=8)
    dataset = prepare(COLUMNS | {"id": "name"}, resolution=8, on_error="skip")
    assert dataset.train_files.tolist()[:2] == [b"cat/000.png", b"cat/002.png"]


def test_a_changed_label_or_image_is_prepared_again(prepare, tree):
    first = prepare()
    Image.new("RGB", (8, 8)).save(tree / "tree" / "train" / "cat" / "001.png")
    second = prepare()
    text = (tree / "train.csv").read_text()
    (tree / "train.csv").write_text(text.replace("000.png,cat", "000.png,dog"))
    assert len({first.fingerprint, second.fingerprint, prepare().fingerprint}) == 3


def test_missing_images_are_listed(prepare, tree):
    for split in ("train", "val"):
        (tree / "tree" / split / "dog" / "003.png").unlink()
    with pytest.raises(
        DatasetError,
        match=rf"train\.csv: 2 files of column 'file' are missing: tree/train/dog/003\.png; tree/val/dog/003\.png: .*relative to {tree}",
    ):
        prepare()
    (tree / "numbers.csv").write_text("file,kind\na,1\n")
    with pytest.raises(DatasetError, match="column 'kind' is int64, not text: name the column of the paths of images"):
        prepare({"image": "kind", "label": "file"}, root=tree / "numbers.csv")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"columns": {"label": "kind", "image": "file", "text": "t"}}, "name one of text, .* and image, the column of paths"),
        (
            {"columns": {"label": "kind", "text": "t"}, "resolution": 8},
            r"resolution is for image files, .*; 'table' holds none",
        ),
        ({"columns": {"label": "kind", "text": "t"}, "on_error": "skip"}, "orientation and on_error are for image files"),
    ],
)
def test_a_declaration_that_does_not_fit_says_why(keys, message):
    with pytest.raises(SpecError, match=message):
        Experiment.parse({"name": "e", "dataset": {"name": "table", "root": "a.csv", "test": "b.csv", **keys}})
