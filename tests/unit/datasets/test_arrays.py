"""Arrays of other tools: layouts, types and names that are accepted, or refused with the conversion."""

import os

import numpy as np
import pytest
from structlog.testing import capture_logs

from memtail import datasets
from memtail.errors import DatasetError
from memtail.spec import DatasetSpec
from tests.support import versions
from tests.support.arrays import write_arrays

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(40) % 3


@pytest.fixture
def prepare(tmp_path):
    def run(images=IMAGES, labels=LABELS, names=("train_images", "train_labels", "test_images", "test_labels"), **changes):
        arrays = dict(zip(names, (images, labels, images[:20], labels[:20]), strict=True))
        np.savez(tmp_path / "a.npz", **arrays | changes)
        return datasets.prepare(DatasetSpec(name="arrays", root=tmp_path / "a.npz"))

    return run


@pytest.fixture
def plain(prepare):
    """The dataset that equal arrays in other forms must equal."""
    return prepare()


def test_names_of_keras_are_accepted(prepare, plain):
    assert prepare(names=("x_train", "y_train", "x_test", "y_test")).fingerprint == plain.fingerprint
    assert prepare(x_train=np.zeros(3), more=np.zeros(2)).fingerprint == plain.fingerprint


def test_other_names_are_refused_with_both_kinds(prepare):
    with pytest.raises(
        DatasetError, match=r"holds no x_test, y_test; there: x_train, y_train, x_val, y_val: name the arrays train_images, "
    ):
        prepare(names=("x_train", "y_train", "x_val", "y_val"))


@pytest.mark.parametrize("labels", [LABELS[:, None], LABELS.astype(float), LABELS.astype(np.float16), LABELS.astype(np.uint8)[:, None]])
def test_labels_in_a_column_or_as_whole_floats_are_accepted(prepare, plain, labels):
    assert prepare(labels=labels).fingerprint == plain.fingerprint


@pytest.mark.parametrize("encode", [np.asarray, lambda names: np.char.encode(names, "utf-8"), lambda names: names[:, None]])
def test_labels_as_strings_name_the_classes(prepare, plain, encode):
    dataset = prepare(labels=encode(np.array(["äpfel", "birnen", "zimt"])[[1, 0, 2]][LABELS]))
    assert dataset.classes == ("birnen", "zimt", "äpfel")
    assert dataset.train_labels.tolist() == [[0, 2, 1][label] for label in LABELS]
    assert (dataset.train_images == plain.train_images).all()


def test_labels_of_both_splits_must_be_of_one_kind_and_known(prepare):
    names = np.array(["a", "b", "c"])[LABELS]
    with pytest.raises(DatasetError, match=r"test_labels holds 'd', a class that train_labels does not have: add training images"):
        prepare(labels=names, test_labels=np.array(["d"] * 20))
    with pytest.raises(DatasetError, match=r"train_labels is <U1, test_labels int64: labels of both must be numbers, or names"):
        prepare(labels=names, test_labels=LABELS[:20])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.where(LABELS == 1, 0.5, 2), r"train_labels: 13 labels are no whole numbers, the first is 0\.5 at index 1"),
        (np.where(LABELS == 1, np.nan, 2), r"train_labels: 13 labels are no whole numbers, the first is nan at index 1"),
        (np.where(LABELS == 1, np.inf, 2), r"train_labels: 13 labels are no whole numbers, the first is inf at index 1"),
        (np.eye(3)[LABELS], r"train_labels is float64 \[40, 3\], one label for each image is needed: save train_labels\.argmax\(1\)"),
        (
            LABELS.astype(object),
            r"train_labels is an array of Python objects: save train_labels\.astype\(str\) or train_labels\.astype\(int\)",
        ),
        (LABELS.astype(complex), r"train_labels is complex128 \[40\], needed are 40 whole numbers or strings"),
        (LABELS[:30], r"train_labels is int64 \[30\], needed are 40 labels, one for each image"),
    ],
)
def test_other_labels_are_refused_with_the_conversion(prepare, labels, message):
    with pytest.raises(DatasetError, match=message):
        prepare(labels=labels)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (3, 4, 4), (4, 8, 8), (2, 8, 6), (1, 5, 7)])
def test_images_with_the_channels_first_are_turned(prepare, shape):
    first = np.random.default_rng(0).integers(0, 256, (40, *shape), dtype=np.uint8)
    last = np.ascontiguousarray(first.transpose(0, 2, 3, 1))
    with capture_logs() as logs:
        dataset = prepare(first)
    assert dataset.image_shape == shape
    assert (dataset.train_images == last).all()
    assert [entry["array"] for entry in logs if entry["event"] == "channels moved to the end"] == ["train_images", "test_images"]
    if shape[0] in (1, 3) or shape[1] == shape[2]:
        assert prepare(last).fingerprint == dataset.fingerprint


@pytest.mark.parametrize("shape", [(8, 8, 3), (8, 8, 1), (3, 3, 3), (1, 8, 3), (8, 8, 4), (8, 8, 8), (9, 8, 16), (3, 8, 1)])
def test_images_with_the_channels_last_stay(prepare, shape):
    images = np.random.default_rng(0).integers(0, 256, (40, *shape), dtype=np.uint8)
    dataset = prepare(images)
    assert (dataset.train_images == images).all()


def test_images_that_may_be_either_are_refused_with_the_conversion(prepare):
    images = np.zeros((40, 16, 8, 8), np.uint8)
    with pytest.raises(DatasetError, match=r"looks like 8 x 8 pixels with the channels first: save train_images\.transpose\(0, 2, 3, 1\)"):
        prepare(images)


@pytest.mark.parametrize(
    ("images", "conversion"),
    [
        ((IMAGES / 255).astype(np.float32), '(255 * train_images).round().astype("uint8")'),
        (IMAGES.astype(float), 'train_images.round().astype("uint8")'),
        (IMAGES.astype(np.int64), 'train_images.round().astype("uint8")'),
        (IMAGES.astype(np.uint16) * 257, '(train_images // 257).astype("uint8")'),
        (IMAGES > 100, '255 * train_images.astype("uint8")'),
        (IMAGES / 128 - 1, "values are -1 to 0.992188, scale them to 0 to 255, round, and save them as uint8"),
    ],
)
def test_images_of_other_types_are_refused_with_the_conversion(prepare, images, conversion):
    with pytest.raises(DatasetError) as error:
        prepare(images)
    assert conversion in str(error.value)
    if "scale" not in conversion:
        converted = eval(conversion, {"train_images": images})  # noqa: S307 - of this test
        assert converted.dtype == np.uint8
        assert (converted == (IMAGES if images.dtype != bool else 255 * images)).all()


def test_arrays_of_objects_are_refused_with_the_conversion(prepare):
    ragged = np.empty(40, object)
    ragged[:] = list(IMAGES)
    with pytest.raises(DatasetError, match=r"train_images is an array of Python objects: save np\.stack\(train_images\)"):
        prepare(ragged, test_images=IMAGES)


def test_images_with_their_index_last_are_refused_with_the_conversion(prepare):
    with pytest.raises(DatasetError, match=r"needed are 8 labels, one for each image: save np\.moveaxis\(images, -1, 0\)"):
        prepare(np.moveaxis(IMAGES, 0, -1), labels=LABELS)


def test_labels_from_1_are_warned_of_each_time(prepare, tmp_path):
    with capture_logs() as logs:
        prepare(labels=LABELS + 1)
        datasets.prepare(DatasetSpec(name="arrays", root=tmp_path / "a.npz"))
    warning = {
        "event": "classes without a training example",
        "log_level": "warning",
        "dataset": "arrays",
        "number": 1,
        "classes": "0",
        "hint": "labels that begin at 1? subtract 1",
    }
    assert logs == [warning, warning]


def test_a_file_that_cannot_be_read_is_told_from_a_damaged_one(tmp_path):
    for name, message in (("mem", "is truncated or corrupt"), ("gone", "is a link to /nowhere, which does not exist")):
        path = tmp_path / f"{name}.npz"
        path.symlink_to("/nowhere" if name == "gone" else "/proc/self/mem")
        with pytest.raises(DatasetError, match=message):
            datasets.prepare(DatasetSpec(name="arrays", root=path))


def test_arrays_that_0_1_0_took_for_others_are_prepared_again(tmp_path, monkeypatch):
    images = np.zeros((40, 3, 8, 8), np.uint8)
    path, cache = write_arrays(tmp_path / "a.npz", train_images=images, test_images=images[:20]), tmp_path / "cache"
    preparing = (
        "import sys; from memtail import datasets; from memtail.experiment import DatasetSpec\n"
        "print(datasets.prepare(DatasetSpec(name='arrays', root=sys.argv[1])).image_shape)"
    )
    code = versions.release_0_1_0(tmp_path / "0.1.0")
    assert versions.python(code, "-c", preparing, path, env={**os.environ, "MEMTAIL_CACHE": str(cache)}) == "(8, 3, 8)\n"
    monkeypatch.setenv("MEMTAIL_CACHE", str(cache))
    assert datasets.as_images(datasets.prepare(DatasetSpec(name="arrays", root=path))).image_shape == (3, 8, 8)


FEATURES = np.random.default_rng(0).normal(size=(40, 5))


@pytest.mark.parametrize(
    "names", [("train_features", "train_labels", "test_features", "test_labels"), ("x_train", "y_train", "x_test", "y_test")]
)
def test_vectors_are_features_as_they_are(prepare, names):
    dataset = prepare(FEATURES, names=names)
    assert isinstance(dataset, datasets.FeatureDataset)
    np.testing.assert_array_equal(dataset.train_features, FEATURES.astype(np.float32))
    assert dataset.test_features.dtype == np.float32
    assert dataset.features == ("0", "1", "2", "3", "4")
    assert dataset.classes == ("0", "1", "2")
    named = prepare(FEATURES, names=names, feature_names=np.array(["a", "b", "c", "d", "e"]))
    assert named.features == ("a", "b", "c", "d", "e")
    assert named.fingerprint != dataset.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_features": FEATURES[0]}, r"train_features is float64 \[5\], needed are numbers \[N, D\]"),
        ({"train_features": FEATURES.astype(str)}, r"train_features is <U32 \[40, 5\], needed are numbers"),
        (
            {"train_features": np.where(FEATURES[2, 3] == FEATURES, np.nan, FEATURES)},
            r"train_features\[2, 3\] is nan: features must be finite",
        ),
        ({"train_features": FEATURES * 1e300}, r"train_features\[0, 0\] is .*: features must be finite in float32"),
        ({"test_features": FEATURES[:20, :4]}, r"training examples are \[5\], test examples \[4\]: all must be of one size"),
        ({"feature_names": np.array(["a"])}, r"feature_names is <U1 \[1\], needed are 5 strings"),
    ],
)
def test_features_that_cannot_be_used_are_refused_with_the_reason(prepare, changes, message):
    with pytest.raises(DatasetError, match=message):
        prepare(FEATURES, names=("train_features", "train_labels", "test_features", "test_labels"), **changes)


@pytest.mark.parametrize("kind", ["images", "features"])
def test_test_set_and_labels_may_be_left_out(tmp_path, kind):
    examples = {"images": IMAGES, "features": FEATURES}[kind]

    def prepare(**arrays):
        np.savez(tmp_path / "a.npz", **arrays)
        return datasets.prepare(DatasetSpec(name="arrays", root=tmp_path / "a.npz"))

    train = {f"train_{kind}": examples}
    without_test = prepare(**train, train_labels=LABELS)
    assert (without_test.n_test, without_test.classes) == (0, ("0", "1", "2"))
    assert without_test.examples("test").shape == (0, *without_test.examples("train").shape[1:])
    without_labels = prepare(**train, **{f"test_{kind}": examples[:5]})
    assert (without_labels.n_test, without_labels.classes, without_labels.labelled) == (5, (), False)
    assert without_labels.train_labels.tolist() == [0] * 40
    neither = prepare(**train)
    assert (neither.n_train, neither.n_test, neither.labelled) == (40, 0, False)
    assert len({each.fingerprint for each in (without_test, without_labels, neither)}) == 3


def test_other_arrays_beside_a_part_may_be_the_rest_under_another_name(tmp_path):
    np.savez(tmp_path / "a.npz", train_images=IMAGES, train_labels=LABELS, val_images=IMAGES)
    with pytest.raises(
        DatasetError, match=r"holds no test_images, test_labels; .*, and leave out all others if it has no test set or no labels"
    ):
        datasets.prepare(DatasetSpec(name="arrays", root=tmp_path / "a.npz"))
