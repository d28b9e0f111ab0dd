"""Damaged images of a folder: all are listed at once, or left out; a preparation that was interrupted is resumed."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from structlog.testing import capture_logs

from memtail import datasets
from memtail.datasets import folder as folder_module
from memtail.errors import DatasetError
from memtail.settings import Settings
from memtail.spec import DatasetSpec
from tests.support.arrays import write_tree
from tests.support.odd_images import with_orientation, write_damaged, write_large


@pytest.fixture(autouse=True)
def own_cache_of_a_test(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMTAIL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tree(tmp_path):
    write_tree(tmp_path / "tree", suffix=".jpg")
    return tmp_path / "tree"


def prepare(root, on_progress=None, **parts):
    return datasets.prepare(DatasetSpec(name="folder", root=root, **parts), on_progress)


def without(damaged, tree, copy):
    shutil.copytree(tree, copy)
    for path in damaged:
        (copy / path.relative_to(tree)).unlink()
    return prepare(copy, resolution=8)


@pytest.mark.parametrize("resolution", [8, None])
def test_all_damaged_images_are_listed_at_once(tree, resolution):
    damaged = write_damaged(tree)
    (tree / "train" / "cat" / "000.jpg").write_bytes(b"")  # the first image, which else sets the size
    damaged[tree / "train" / "cat" / "000.jpg"] = "is empty"
    with pytest.raises(
        DatasetError, match=r"^dataset 'folder': 5 of 24 images cannot be used: .*: replace or remove them, or set"
    ) as error:
        prepare(tree, resolution=resolution)
    for path, reason in damaged.items():
        assert re.search(rf"{path}: [^;]*{reason}", str(error.value))
    assert "\n" not in str(error.value)


def test_of_many_damaged_images_some_are_named_and_all_listed_in_a_file(tree):
    many = [tree / "train" / "dog" / f"damaged{index:02}.jpg" for index in range(30)]
    for path in many:
        path.write_bytes(b"no image")
    with pytest.raises(
        DatasetError, match=r"30 of 50 images cannot be used: .*damaged04\.jpg: .*; and 25 more: .*; all are listed in \S+$"
    ) as error:
        prepare(tree, resolution=8)
    lines = Path(str(error.value).split("; all are listed in ")[1]).read_text().splitlines()
    assert lines == [f"{path}: is no image, or damaged at its beginning" for path in many]


def test_damaged_images_are_left_out_on_request_as_if_they_were_not_there(tree, tmp_path):
    damaged = write_damaged(tree)
    with capture_logs() as logs:
        dataset = prepare(tree, resolution=8, on_error="skip")
    assert dataset.fingerprint == without(damaged, tree, tmp_path / "copy").fingerprint
    assert (dataset.n_train, dataset.n_test) == (10, 10)
    [left_out] = [entry for entry in logs if entry["event"] == "damaged images left out"]
    assert left_out["images"] == 4
    lines = Path(left_out["list"]).read_text().splitlines()
    assert [line.split(": ")[0] for line in lines] == list(map(str, damaged))
    with capture_logs() as logs:  # also when it is prepared already
        prepare(tree, resolution=8, on_error="skip")
    assert left_out in logs


def test_images_above_pillows_limit_and_of_16_bits_are_left_out_on_request(tree):
    write_large(tree / "train" / "cat" / "large.png", 20000, 10000)
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tree / "train" / "dog" / "deep.png")
    with pytest.raises(
        DatasetError, match=r"2 of 22 images .*large\.png: image size \(200000000 pixels\).*deep\.png: has more than 8 bits"
    ):
        prepare(tree, resolution=8)
    assert prepare(tree, resolution=8, on_error="skip").n_train == 10


def test_many_chunks_without_damaged_images_equal_a_folder_without_them(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "CHUNK", 4)
    damaged = write_damaged(tree)
    dataset = prepare(tree, resolution=8, on_error="skip")
    other = without(damaged, tree, tmp_path / "copy")
    assert dataset.fingerprint == other.fingerprint
    assert (dataset.train_images == other.train_images).all()
    assert dataset.mean == other.mean


def test_a_refused_preparation_is_continued_without_its_damaged_images(tree, monkeypatch):
    monkeypatch.setattr(folder_module, "CHUNK", 2)
    write_damaged(tree)
    steps = []
    with pytest.raises(DatasetError, match="4 of 24"):
        prepare(tree, resolution=8)
    prepare(tree, lambda *step: steps.append(step), resolution=8, on_error="skip")
    assert steps == []
    assert not list(Settings().cache.glob("datasets/.unfinished-*"))


def test_repaired_images_alone_are_decoded_again(tree, monkeypatch):
    monkeypatch.setattr(folder_module, "CHUNK", 2)
    damaged, steps = write_damaged(tree), []
    with pytest.raises(DatasetError, match="4 of 24"):
        prepare(tree, resolution=8)
    for path in damaged:
        path.write_bytes((tree / "train" / "cat" / "000.jpg").read_bytes())
    with capture_logs() as logs:
        assert prepare(tree, lambda *step: steps.append(step), resolution=8).n_train == 13
    assert 2 <= len(steps) <= 4
    assert logs == []


def test_a_copy_without_damaged_images_that_was_interrupted_starts_over(tree, tmp_path, monkeypatch):
    damaged = write_damaged(tree)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(folder_module, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(tree, resolution=8, on_error="skip")
    monkeypatch.undo()
    monkeypatch.setenv("MEMTAIL_CACHE", str(tmp_path / "cache"))
    steps = []
    dataset = prepare(tree, lambda *step: steps.append(step), resolution=8, on_error="skip")
    assert steps == []
    assert dataset.fingerprint == without(damaged, tree, tmp_path / "copy").fingerprint


def test_files_that_cannot_be_read_are_never_left_out(tree):
    write_damaged(tree)
    (tree / "train" / "dog" / "closed.jpg").symlink_to("/proc/self/mem")  # opens, but its beginning cannot be read, not even by root
    with pytest.raises(DatasetError, match=r"5 of 25 images .*dog/closed\.jpg: cannot be read \(Input/output error\)"):
        prepare(tree, resolution=8)
    with pytest.raises(DatasetError, match=r"1 of 25 images .*closed\.jpg: cannot be read .*: make them readable, or remove them"):
        prepare(tree, resolution=8, on_error="skip")


def test_a_split_without_a_usable_image_is_named(tree):
    for path in (tree / "train").glob("*/*.jpg"):
        path.write_bytes(b"")
    for parts in ({}, {"on_error": "skip"}, {"on_error": "skip", "resolution": 8}):
        with pytest.raises(DatasetError, match=rf"no image in {tree / 'train'} can be used"):
            prepare(tree, **parts)


def test_a_class_that_loses_all_its_images_is_named(tree):
    for path in (tree / "train" / "dog").glob("*.jpg"):
        path.write_bytes(b"")
    with capture_logs() as logs:
        prepare(tree, resolution=8, on_error="skip")
    assert {
        "event": "classes without a training example",
        "log_level": "warning",
        "dataset": "folder",
        "number": 1,
        "classes": "dog",
    } in logs


def test_a_decoding_process_that_is_killed_is_explained(tree, monkeypatch):
    monkeypatch.setattr(folder_module, "_begin_to_decode", os.abort)
    with pytest.raises(DatasetError, match=rf"a process that decodes the images of {tree} was killed, .* run again to resume"):
        prepare(tree, resolution=8)


def test_photographs_are_turned_in_the_prepared_dataset_on_request(tree):
    dark_left = np.repeat(np.repeat(np.array([[[0] * 3, [255] * 3]], np.uint8), 16, 0), 8, 1)
    Image.fromarray(dark_left).save(tree / "train" / "cat" / "zz.jpg", exif=with_orientation(6))
    stored, turned = prepare(tree, resolution=8), prepare(tree, resolution=8, orientation="exif")
    assert stored.fingerprint != turned.fingerprint
    dark, light = stored.train_images[5, :, :3], stored.train_images[5, :, 5:]
    assert dark.max() < 64 < light.min()
    dark, light = turned.train_images[5, :3], turned.train_images[5, 5:]
    assert dark.max() < 64 < light.min()
    assert (np.delete(stored.train_images, 5, 0) == np.delete(turned.train_images, 5, 0)).all()
