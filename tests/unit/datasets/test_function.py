"""Datasets of a user's function: what may be returned, what identifies it, and one line for each fault."""

import sys
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from memtail import datasets
from memtail.datasets import FeatureDataset, ImageDataset, TextDataset
from memtail.datasets import function as function_module
from memtail.errors import DatasetError, SpecError
from memtail.spec import DatasetSpec, Experiment, FunctionDataset

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 8, 6, 3), dtype=np.uint8)
LABELS = np.arange(12) % 3
# Beginning of each module, whose function `load` follows.
START = """
import sys
import numpy as np
images = np.random.default_rng(0).integers(0, 256, (12, 8, 6, 3), dtype=np.uint8)
labels = np.arange(12) % 3
named = np.array(["a", "b", "c"])[labels]
texts = [f"text {number}" for number in range(12)]
vectors = np.arange(36).reshape(12, 3) / 7


def note(path, text):
    with open(path, "a") as file:
        file.write(text)
"""


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Prepare what the body of `load` returns; in this process, unless `child` is true."""

    def prepare(body, *, child=False, **keys):
        (tmp_path / "data.py").write_text(f"{START}\n\ndef load(**options):\n    {body}\n")
        if not child:
            monkeypatch.setattr(function_module, "prepare_function", lambda spec, target, *_: function_module._load(spec, target))
            monkeypatch.setattr(sys, "path", list(sys.path))
            sys.modules.pop("data", None)
        return datasets.prepare(FunctionDataset(function="data:load", folder=tmp_path, **keys))

    yield prepare
    sys.modules.pop("data", None)


@pytest.fixture
def plain(tmp_path):
    """The dataset that equal images in other forms must equal."""
    path = tmp_path / "a.npz"
    np.savez(path, train_images=IMAGES, train_labels=LABELS, test_images=IMAGES[:6], test_labels=LABELS[:6])
    return datasets.prepare(DatasetSpec(name="arrays", root=path))


IMAGE_FORMS = {
    "arrays": "return dict(train_images=images, train_labels=labels, test_images=images[:6], test_labels=labels[:6])",
    "keras": "return dict(x_train=images, y_train=labels[:, None], x_test=images[:6], y_test=labels[:6].astype(float))",
    "keras' pairs": "return (images, labels), (images[:6], labels[:6])",
    "named tuple": (
        "from collections import namedtuple; "
        "return namedtuple('T', 'train_images train_labels test_images test_labels')(images, labels, images[:6], labels[:6])"
    ),
    "channels first": "return (images.transpose(0, 3, 1, 2), labels), (images[:6].transpose(0, 3, 1, 2), labels[:6])",
    "floats": "return (images / 255, labels), ((images[:6] / 255).astype('float32'), labels[:6])",
    "list of arrays": ("return dict(train_images=[*images], train_labels=[*labels], test_images=[*images[:6]], test_labels=labels[:6])"),
    "pairs": "return list(zip(images, labels)), list(zip(images[:6], labels[:6]))",
    "Pillow's": (
        "from PIL import Image; pairs = [(Image.fromarray(image), int(label)) for image, label in zip(images, labels)]; "
        "return pairs, pairs[:6]"
    ),
    "tensors": (
        "import torch; from torch.utils.data import TensorDataset as D; "
        "x, y = torch.tensor(images).permute(0, 3, 1, 2), torch.tensor(labels); return D(x, y), D(x[:6] / 255, y[:6])"
    ),
}


@pytest.mark.parametrize("form", IMAGE_FORMS)
def test_equal_images_in_each_form_are_one_dataset(prepare, plain, form):
    dataset = prepare(IMAGE_FORMS[form])
    assert isinstance(dataset, ImageDataset)
    assert (dataset.train_images == IMAGES).all()
    assert dataset.fingerprint == plain.fingerprint


def test_channels_come_first_in_tensors_and_last_in_arrays(prepare):
    shapes = "x = np.zeros((4, 5, 8, 6), 'uint8'); y = [0, 1] * 2; "
    assert prepare(f"import torch; {shapes}return list(zip(torch.tensor(x), y)), None").train_images.shape == (4, 8, 6, 5)
    assert prepare(f"{shapes}return list(zip(x, y)), None").train_images.shape == (4, 5, 8, 6)


def test_a_child_process_loads_the_dataset(prepare, plain, capfd):
    dataset = prepare(f"print('loading', options); {IMAGE_FORMS['arrays']}", child=True, options={"a": 1})
    assert dataset.fingerprint == plain.fingerprint
    assert "data" not in sys.modules
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "loading {'a': 1}" in captured.err


def test_a_torch_dataset_is_read_once_in_order_and_names_the_classes(prepare, tmp_path):
    dataset = prepare(
        "from torch.utils.data import Dataset\n"
        "    class Noted(Dataset):\n"
        "        classes = ['x', 'y', 'z']\n"
        "        def __len__(self): return 12\n"
        "        def __getitem__(self, index):\n"
        f"            note({str(tmp_path / 'read')!r}, f'{{index}} ')\n"
        "            return images[index], labels[index]\n"
        "    return Noted(), Noted()",
        max_test=2,
    )
    assert (tmp_path / "read").read_text() == "0 1 2 3 4 5 6 7 8 9 10 11 0 1 "
    assert dataset.classes == ("x", "y", "z")
    assert (dataset.n_train, dataset.n_test) == (12, 2)


def test_texts_and_features_equal_those_of_a_table(prepare, tmp_path):
    dataset = prepare(
        "return dict(train_texts=texts, train_labels=named, train_ids=range(12), "
        "test_texts=texts[:3], test_labels=named[:3], test_ids='abc')"
    )
    assert isinstance(dataset, TextDataset)
    assert list(dataset.train_texts) == [f"text {number}" for number in range(12)]
    assert dataset.classes == ("a", "b", "c")
    assert dataset.train_files.tolist() == [str(number).encode() for number in range(12)]
    assert dataset.test_files.tolist() == [b"a", b"b", b"c"]
    rows = [f'{{"text": "text {number}", "kind": "{"abc"[number % 3]}", "id": "{number}"}}' for number in range(12)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    (tmp_path / "test.jsonl").write_text(
        "\n".join(row.replace(f'"id": "{index}"', f'"id": "{"abc"[index]}"') for index, row in enumerate(rows[:3]))
    )
    table = DatasetSpec(
        name="table", root=tmp_path / "train.jsonl", test=tmp_path / "test.jsonl", columns={"text": "text", "label": "kind", "id": "id"}
    )
    assert datasets.prepare(table).fingerprint == dataset.fingerprint
    dataset = prepare("return (vectors, labels), (vectors[:5], labels[:5])")
    assert isinstance(dataset, FeatureDataset)
    np.testing.assert_array_equal(dataset.train_features, (np.arange(36).reshape(12, 3) / 7).astype(np.float32))
    assert dataset.features == ("0", "1", "2")


@pytest.mark.parametrize(("name", "kind"), [("images", ImageDataset), ("texts", TextDataset), ("vectors", FeatureDataset)])
@pytest.mark.parametrize("labels", [True, False])
def test_test_examples_and_labels_may_be_missing(prepare, name, kind, labels):
    key = "features" if name == "vectors" else name
    given = f"train_{key}={name}, train_ids=texts" + (", train_labels=named" if labels else "")
    dataset = prepare(f"return dict({given}, test_{key}=None)")
    assert isinstance(dataset, kind)
    assert (dataset.n_train, dataset.n_test, dataset.labelled) == (12, 0, labels)
    assert dataset.train_labels.tolist() == (LABELS.tolist() if labels else [0] * 12)
    assert len(dataset.test_files) == 0
    dataset = prepare(f"return dict({given}, test_ids=['a'], test_{key}={name}[:1]" + (", test_labels=['b'])" if labels else ")"))
    assert (dataset.n_test, dataset.labelled) == (1, labels)
    if labels:
        assert prepare(f"return list(zip({name}, named)), None").n_test == 0
        assert name != "images" or prepare("return (images, labels), None").n_test == 0  # Keras' pair


def test_names_of_classes_and_features_may_be_returned(prepare):
    body = "return dict(train_features=vectors, train_labels={}, test_features=vectors[:3], test_labels={}[:3], {})"
    dataset = prepare(body.format("labels", "labels", "classes=['x', 'y', 'z'], feature_names=['u', 'v', 'w']"))
    assert (dataset.classes, dataset.features) == (("x", "y", "z"), ("u", "v", "w"))
    dataset = prepare(body.format("named", "named", "classes=['c', 'b', 'a']"))
    assert dataset.train_labels[:3].tolist() == [2, 1, 0]


def test_images_of_unequal_size_need_a_resolution(prepare):
    body = "from PIL import Image; pairs = [(Image.new('L', (20, 10 + index)), index % 2) for index in range(4)]; return pairs, pairs"
    assert prepare(body, resolution=5).train_images.shape == (4, 5, 5, 1)
    with pytest.raises(
        DatasetError, match=r"data:load: train\[1\] is \[11, 20, 1\] \[H, W, C\], the first image \[10, 20, 1\]: set dataset\.resolution"
    ):
        prepare(body)


def test_the_function_is_called_again_only_after_a_change_of_code_or_options(prepare, tmp_path):
    body = f"note({str(tmp_path / 'calls')!r}, '.'); {IMAGE_FORMS['arrays']}"
    first = prepare(body)
    assert prepare(body).fingerprint == first.fingerprint
    assert (tmp_path / "calls").read_text() == "."
    prepare(body, options={"a": 1})
    prepare(body.replace("images[:6]", "images[:5]").replace("labels[:6]", "labels[:5]"))
    assert (tmp_path / "calls").read_text() == "..."
    (tmp_path / "rows.csv").write_text("1")
    prepare(body, code=["data.py", "rows.csv"])
    (tmp_path / "rows.csv").write_text("2")
    prepare(body, code=["data.py", "rows.csv"])
    assert (tmp_path / "calls").read_text() == "....."


def test_options_may_be_dates(prepare, tmp_path):
    body = f"note({str(tmp_path / 'options')!r}, str(options['since'].year)); {IMAGE_FORMS['arrays']}"
    for year in (2019, 2020):
        prepare(body, options={"since": date(year, 1, 1)})
    assert (tmp_path / "options").read_text() == "20192020"


def test_the_fingerprint_of_an_experiment_follows_the_content_and_not_the_code(prepare):
    first = prepare(IMAGE_FORMS["arrays"])
    assert prepare(f"# other\n    {IMAGE_FORMS['arrays']}").fingerprint == first.fingerprint
    functions = [FunctionDataset(function=f"data:{name}") for name in ("load", "other")]
    one, other = (Experiment.parse({"name": "e", "dataset": dataset}).fingerprint(first.fingerprint) for dataset in functions)
    assert one == other


FAULTS = {
    "raise KeyError('rows')": r"dataset\.function 'data:load' failed: KeyError: 'rows' \(.*data\.py, line 17\)$",
    "return open('/missing')": r"failed: FileNotFoundError: .*'/missing' \(.*data\.py, line 17\)$",
    "sys.exit(3)": r"failed: SystemExit: 3 \(.*data\.py, line 17\)$",
    "return np.zeros(3).reshape(2)": r"failed: ValueError: cannot reshape .* \(.*data\.py, line 17\)$",
    "return None": "data:load returned NoneType, needed are two torch Datasets, or a dict of train_images, train_labels",
    "return images, labels, images, labels": "data:load returned tuple, needed are two torch Datasets",
    "return dict(train_images=images, train_labels=np.eye(12))": r"train\[0\]: its label is float64 \[12\], needed is one number",
    "return images, labels": r"data:load: train\[0\] is uint8 \[8, 6, 3\], needed is a pair of example and label",
    "return iter(()), iter(())": "returned tuple_iterator for train, needed is a torch Dataset with a length, or a list of pairs",
    "return dict(images=images)": "data:load returned images, needed are train_images, train_labels, ",
    "return dict(x_train=images, y_train=labels, x_test=images)": "labels of one split only: return both y_train and y_test, or neither",
    "return dict(x_train=images, y_train=labels, y_test=labels)": "data:load returned y_test without x_test: return the test examples too",
    "return dict(x_train=images, x_test=images, train_ids=texts)": "ids of one split only: return train_ids and test_ids, or neither",
    "return dict(x_train=images, y_train=labels, x_test=images, y_test=labels, ids=1)": "returned ids: known beside x_train are y_train,",
    "return (images, labels[:5]), (images, labels)": "data:load: 5 y_train for 12 x_train: return one for each",
    "return (images / 2, labels), (images, labels)": r'x_train is float64 .*: return x_train\.round\(\)\.astype\("uint8"\)',
    "return list(zip(images - 500., labels)), []": r"train\[0\] is float64 from -\d+ to .*leave normalization to memtail",
    "return list(zip(texts, labels)), []": "data:load: test has no examples",
    "return list(zip([*texts[:3], 4], labels)), []": r"train\[3\] is int, the first example a text: all must be alike",
    "return list(zip(texts, labels)), list(zip(vectors, labels))": r"train examples are text \[\], test examples are features \[3\]",
    "return list(zip([{}], labels)), []": r"train\[0\] is dict: needed is a text, an image \(.*\), or a vector of numbers",
    "return (vectors - np.inf, labels), (vectors, labels)": r"train\[0\]: feature 0 is -inf: features must be finite",
    "return list(zip(texts, [None] * 12)), list(zip(texts, labels))": "labels of train is object .*, needed are 12 whole numbers",
    "return list(zip(texts, ['a', 1] * 6)), list(zip(texts, labels))": "labels of train is object .*, needed are 12 whole numbers",
    "return list(zip(texts, labels + 90)), list(zip(texts, labels))": "labels of train out of range: 92 at index 2 makes more",
    "return list(zip(texts, named)), list(zip(texts, labels))": "labels of train is <U1, labels of test int64: labels of both must be",
}


@pytest.mark.parametrize("body", FAULTS)
def test_a_fault_is_one_line(prepare, body):
    with pytest.raises(DatasetError, match=FAULTS[body]) as fault:
        prepare(body)
    assert "\n" not in str(fault.value)


def test_a_fault_in_reading_an_item_names_the_item_and_the_line(prepare):
    body = "return [(0, 0), *map(int, 'x')], []"
    with pytest.raises(DatasetError, match=r"failed: ValueError: invalid literal for int.* \(.*data\.py, line 17\)$"):
        prepare(body)
    rows = "class Rows(list):\n        def __getitem__(self, index):\n            return (images[index], 1 // (5 - index))"
    body = f"{rows}\n    return Rows(texts), []"
    with pytest.raises(DatasetError, match=r"failed in reading train\[5\]: ZeroDivisionError: .* \(.*data\.py, line 19\)$"):
        prepare(body)


def test_a_function_or_module_that_is_missing_or_broken_is_one_line(prepare, tmp_path):
    prepare(IMAGE_FORMS["arrays"])
    (tmp_path / "broken.py").write_text("def load(:\n")
    (tmp_path / "needs.py").write_text("import numpy\nimport no_such_package\n")
    for function, error, message in (
        ("data:other", DatasetError, r"dataset\.function: module 'data' has no function 'other'"),
        ("missing:load", SpecError, r"dataset\.function: there is no module 'missing' in .*: set dataset\.folder to the folder"),
        ("broken:load", DatasetError, r"failed: SyntaxError: .* \(.*broken\.py, line 1\)$"),
        ("needs:load", DatasetError, r"failed: ModuleNotFoundError: .* \(.*needs\.py, line 2\)$"),
    ):
        with pytest.raises(error, match=message):
            datasets.prepare(FunctionDataset(function=function, folder=tmp_path))


def test_a_function_whose_process_ends_is_one_line(prepare):
    with pytest.raises(DatasetError, match=r"dataset\.function 'data:load': its process ended or was killed"):
        prepare("import os; os._exit(1)", child=True)


def test_the_folder_of_the_code_is_that_of_the_experiment_file(tmp_path):
    path: Path = tmp_path / "experiment.yaml"
    path.write_text("name: e\ndataset: {function: 'data:load', folder: code}\n")
    assert Experiment.load(path).dataset.folder == tmp_path / "code"
    path.write_text("name: e\ndataset: {function: 'data:load'}\n")
    experiment = Experiment.load(path)
    assert experiment.dataset.folder == tmp_path
    assert Experiment.parse(experiment.model_dump(mode="json")) == experiment


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"function": "load"}, r"dataset\.function: .*\(got load\)"),
        ({"function": "a:b", "option": {}}, r"unknown key 'dataset\.option': did you mean 'options'\?"),
        ({"function": "a:b", "name": "digits"}, r"unknown key 'dataset\.name': known here: function, options, code, folder"),
        ({"function": "a:b", "max_train": 1}, r"dataset\.max_train: .*greater than or equal to 2"),
    ],
)
def test_a_wrong_declaration_is_one_line(dataset, message):
    with pytest.raises(SpecError, match=message):
        Experiment.parse({"name": "e", "dataset": dataset})
