"""Tables of texts and features: what is read, from which files, and what each fault is called."""

import json

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv, parquet

from memtail import datasets
from memtail.datasets import FeatureDataset, TextDataset, open_dataset
from memtail.datasets.staged_dataset import fetch, stage
from memtail.errors import DatasetError, SpecError
from memtail.spec import DatasetSpec, Experiment
from memtail.storage.local import LocalStore

TRAIN = {"text": ["a cat", "ein Hündchen", "", "two\nlines"], "kind": ["cat", "dog", "cat", "dog"], "id": ["a", "b", "c", "d"]}
TEST = {"text": ["cat", "dog"], "kind": ["cat", "dog"], "id": ["x", "y"]}
TEXTS = {"label": "kind", "text": "text", "id": "id"}


def write(path, columns):
    table = pa.table(columns)
    if path.suffix == ".csv":
        csv.write_csv(table, path)
    elif path.suffix == ".tsv":
        csv.write_csv(table, path, csv.WriteOptions(delimiter="\t"))
    elif path.suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    return path


@pytest.fixture
def prepare(tmp_path):
    def prepare(train=None, test=None, columns=None, ending=".jsonl", **keys):
        root = write(tmp_path / f"train{ending}", TRAIN if train is None else train)
        if "split" not in (columns or {}):
            keys["test"] = write(tmp_path / f"test{ending}", TEST if test is None else test)
        return datasets.prepare(DatasetSpec(name="table", root=root, columns=columns or TEXTS, **keys))

    return prepare


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_texts_are_read_from_files_of_each_format(prepare, ending):
    train = {**TRAIN, "text": ["a cat", "ein Hündchen", "a, 'b'", "c"]}
    dataset = prepare(train, ending=ending)
    assert isinstance(dataset, TextDataset)
    assert list(dataset.train_texts) == train["text"]
    assert list(dataset.test_texts) == TEST["text"]
    assert dataset.classes == ("cat", "dog")
    assert dataset.train_labels.tolist() == [0, 1, 0, 1]
    assert dataset.train_files.tolist() == [b"a", b"b", b"c", b"d"]
    assert dataset.preview("train", 1) == "ein Hündchen"


def test_texts_are_chosen_by_an_index_a_slice_or_a_subset(prepare):
    texts = prepare().train_texts
    assert (len(texts), texts[0], texts[-1], texts[2]) == (4, "a cat", "two\nlines", "")
    assert texts[1:3] == ["ein Hündchen", ""]
    assert texts[np.array([3, 0])] == ["two\nlines", "a cat"]
    with pytest.raises(IndexError):
        texts[4]


@pytest.mark.parametrize(("named", "features"), [("all", ("a", "b")), (["b"], ("b",))])
def test_features_are_columns_of_numbers(prepare, named, features):
    train = {"a": [1, 2, 3], "kind": [10, 9, 10], "b": [0.5, 1.5, -2.0]}
    dataset = prepare(train, {"b": [4.0], "a": [7], "kind": [9]}, {"label": "kind", "features": named})
    assert isinstance(dataset, FeatureDataset)
    assert dataset.features == features
    np.testing.assert_array_equal(dataset.train_features, np.array([train[name] for name in features], np.float32).T)
    assert dataset.train_features.dtype == np.float32
    assert dataset.test_features.tolist() == [[{"a": 7, "b": 4}[name] for name in features]]
    assert dataset.classes == ("9", "10")
    assert dataset.train_labels.tolist() == [1, 0, 1]
    assert dataset.train_files is None
    assert dataset.preview("test", 0) == tuple((name, {"a": 7.0, "b": 4.0}[name]) for name in features)


def test_a_column_may_name_the_split(prepare):
    columns = {**TRAIN, "part": ["train", "test", "train", "train"]}
    dataset = prepare(columns, columns={**TEXTS, "split": "part"})
    assert list(dataset.train_texts) == ["a cat", "", "two\nlines"]
    assert list(dataset.test_texts) == ["ein Hündchen"]


@pytest.mark.parametrize("columns", [{"text": "text", "id": "id"}, {"text": "text"}])
def test_labels_and_a_test_set_may_be_left_out(tmp_path, columns):
    root, store = write(tmp_path / "t.jsonl", TRAIN), LocalStore(tmp_path / "store")
    labelled = datasets.prepare(DatasetSpec(name="table", root=root, columns=columns | {"label": "kind"}))
    assert (labelled.n_train, labelled.n_test, labelled.classes) == (4, 0, ("cat", "dog"))
    tested = datasets.prepare(DatasetSpec(name="table", root=root, test=root, columns=columns))
    assert isinstance(tested, TextDataset)
    assert (list(tested.test_texts), tested.classes) == (TRAIN["text"], ())
    neither = datasets.prepare(DatasetSpec(name="table", root=root, columns=columns))
    assert stage(neither, store)
    fetched = fetch(store, neither.fingerprint, tmp_path / "other")
    assert isinstance(fetched, TextDataset)
    assert (list(fetched.train_texts), list(fetched.test_texts), fetched.classes, fetched.labelled) == (TRAIN["text"], [], (), False)


def test_a_test_set_that_is_declared_must_have_examples(prepare):
    columns = {**TRAIN, "part": ["train"] * 4}
    with pytest.raises(
        DatasetError, match=r"train\.jsonl: has no test example: leave out dataset\.test and columns\.split if there are none"
    ):
        prepare(columns, columns={**TEXTS, "split": "part"})


def test_limits_take_evenly_spaced_examples(prepare):
    dataset = prepare(max_train=3, max_test=1)
    assert (list(dataset.train_texts), dataset.n_test) == (TRAIN["text"][:3], 1)


def test_equal_content_has_one_fingerprint_and_other_content_another(prepare):
    first = prepare()
    assert prepare(ending=".parquet").fingerprint == first.fingerprint
    for change in (
        {"text": ["a cat", "ein Hündchen", "two\n", "lines"]},
        {"kind": ["dog", "dog", "cat", "dog"]},
        {"id": ["a", "b", "c", "e"]},
    ):
        assert prepare(TRAIN | change).fingerprint != first.fingerprint


def test_a_staged_table_is_fetched_unchanged(prepare, tmp_path):
    dataset, store = prepare(), LocalStore(tmp_path / "store")
    assert stage(dataset, store)
    fetched = fetch(store, dataset.fingerprint, tmp_path / "other")
    assert isinstance(fetched, TextDataset)
    assert list(fetched.train_texts) == TRAIN["text"]
    assert fetched.folder != dataset.folder


@pytest.mark.parametrize(
    ("train", "columns", "message"),
    [
        (TRAIN, {"label": "kin", "text": "text"}, r"train\.jsonl: has no column 'kin', there are text, kind, id: fix dataset\.columns"),
        (TRAIN | {"kind": ["cat", None, "dog", None]}, TEXTS, r"column 'kind' has no value in 2 rows, first in row 1"),
        (TRAIN | {"text": [1, 2, 3, 4]}, TEXTS, "column 'text' is int64, not text"),
        (TRAIN, {"label": "kind", "features": "all"}, "column 'text' is string, and features are numbers"),
        (TRAIN | {"kind": [0.5, 1.0, 2.0, 3.0]}, TEXTS, r"column 'kind' holds 0\.5: labels are texts or whole numbers"),
        (TRAIN | {"kind": ["cat"] * 4}, TEXTS, "label 'dog' of a test example is that of no training example"),
    ],
)
def test_a_fault_names_the_file_and_the_column(prepare, train, columns, message):
    with pytest.raises(DatasetError, match=message):
        prepare(train, columns=columns)


def test_features_must_be_finite(prepare):
    train = {"a": [1.0, float("inf")], "kind": [0, 1]}
    with pytest.raises(DatasetError, match=r"column 'a' is inf in row 1: features must be finite"):
        prepare(train, train, {"label": "kind", "features": ["a"]}, ending=".parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.csv", None, r"there is no file .*missing\.csv: give dataset\.root and dataset\.test"),
        ("a.xlsx", b"PK", r"a\.xlsx: is no table that memtail reads: give a file whose name ends in \.csv, \.tsv"),
        ("a.csv", b"text,kind\n1\n", r"a\.csv: cannot be read as csv \(.*\): fix the file"),
        ("a.parquet", b"PAR1", r"a\.parquet: cannot be read as parquet"),
        ("a.jsonl", b"{", r"a\.jsonl: cannot be read as jsonl"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    spec = DatasetSpec(name="table", root=tmp_path / name, test=tmp_path / name, columns=TEXTS)
    with pytest.raises(DatasetError, match=message):
        datasets.prepare(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "table", "root": "a.csv"}, "dataset 'table' needs columns: text, features or image, and label if there is one"),
        ({"name": "table", "columns": TEXTS, "test": "b.csv"}, "dataset 'table' needs a root"),
        (
            {"name": "table", "root": "a.csv", "test": "b.csv", "columns": TEXTS | {"split": "part"}},
            r"has its test examples twice: in test, a second file, and by columns\.split: remove one",
        ),
        ({"name": "table", "root": "a.csv", "test": "b.csv", "columns": {"label": "kind"}}, "name one of text, .* and image"),
        ({"name": "digits", "columns": TEXTS}, "columns is for dataset 'table', not for 'digits'"),
    ],
)
def test_a_declaration_that_is_incomplete_says_what_is_missing(spec, message):
    with pytest.raises(SpecError, match=message):
        Experiment.parse({"name": "e", "dataset": spec})


def test_a_kind_of_a_later_version_is_refused(tmp_path):
    (tmp_path / "meta.json").write_text('{"kind": "sounds"}')
    with pytest.raises(DatasetError, match="holds sounds, which this version of memtail does not know"):
        open_dataset(tmp_path)


def test_the_built_in_trainer_refuses_texts_in_one_line(prepare):
    from memtail.trainers.images.shard_size import checked_shard_size

    with pytest.raises(
        DatasetError,
        match="the built-in trainer takes images and features, and the dataset holds text: train it with a function or a command",
    ):
        checked_shard_size(Experiment.parse({"name": "e", "dataset": {"name": "digits"}}), prepare())


@pytest.mark.parametrize(("row", "column"), [(",b1", "kind"), ("cat,", "id")])
def test_an_empty_value_of_a_csv_is_missing(tmp_path, row, column):
    path = tmp_path / "a.csv"
    path.write_text(f"kind,id,text\ncat,a,one\n{row},two\ndog,c,three\n")
    spec = DatasetSpec(name="table", root=path, columns={"label": "kind", "text": "text", "id": "id"})
    with pytest.raises(DatasetError, match=rf"a\.csv: column '{column}' has no value in 1 rows, first in row 1: fill or drop them"):
        datasets.prepare(spec)


def test_a_text_in_another_encoding_says_how_to_convert_it(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("kind,text\ncat,caf\xe9\ndog,two\n".encode("latin-1"))
    with pytest.raises(DatasetError, match=r"a\.csv: column 'text' is not UTF-8: convert the file, as by iconv"):
        datasets.prepare(DatasetSpec(name="table", root=path, columns={"label": "kind", "text": "text"}))
