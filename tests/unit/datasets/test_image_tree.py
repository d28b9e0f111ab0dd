"""Trees of images: files that belong to them, their order, and links and folders that are refused."""

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from structlog.testing import capture_logs

from memtail import datasets
from memtail.errors import DatasetError
from memtail.spec import DatasetSpec
from tests.support import versions
from tests.support.arrays import write_tree


def prepare(root, **parts):
    return datasets.prepare(DatasetSpec(name="folder", root=root, **parts))


def names(dataset, split="train"):
    return [name.decode() for name in getattr(dataset, f"{split}_files")]


def save(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), 7, np.uint8)).save(path)


def test_hidden_files_and_those_of_macos_are_skipped_at_every_depth(tmp_path):
    write_tree(tmp_path)
    before = prepare(tmp_path)
    for path in (
        "train/cat/._000.png",
        "train/cat/.ipynb_checkpoints/000-checkpoint.png",
        "train/cat/more/.ipynb_checkpoints/000-checkpoint.png",
        "train/.ipynb_checkpoints/000.png",
        "val/.ipynb_checkpoints/000.png",
        "train/__MACOSX/000.png",
        "val/__MACOSX/000.png",
        "train/cat/__MACOSX/._000.png",
        "train/cat/more/__MACOSX/000.png",
    ):
        save(tmp_path / path)
    after = prepare(tmp_path)
    assert after.classes == ("cat", "dog")
    assert names(after) == names(before)
    assert after.fingerprint == before.fingerprint


def test_images_and_their_order_are_those_of_image_folder(tmp_path):
    from torchvision.datasets import ImageFolder

    write_tree(tmp_path, suffix=".jpg")
    folder = tmp_path / "train" / "cat"
    for name in ("aa.gif", "ab.pdf", "ac.PNG", "zz.webp", "Zz.jpeg", "b.bmp", "b.ppm", "b.pgm", "b.tif", "b.tiff", "b.jp2"):
        save(folder / name)
    (folder / "features.h5").write_bytes(b"\x89HDF")
    (folder / "README").write_text("")
    (tmp_path / "val" / "labels.csv").write_text("")
    save(tmp_path / "val" / "no-class.png")
    with capture_logs() as logs:
        dataset = prepare(tmp_path, resolution=8)
    known = ImageFolder(str(tmp_path / "train"))
    assert names(dataset) == [os.path.relpath(path, tmp_path / "train") for path, _ in known.samples]
    assert dataset.train_labels.tolist() == known.targets
    assert [entry for entry in logs if entry["event"] == "files left out that are no images"] == [
        {
            "event": "files left out that are no images",
            "log_level": "info",
            "files": 7,
            "kinds": ".csv 1, .gif 1, .h5 1, .jp2 1, .pdf 1, .png 1, no extension 1",
        }
    ]


def test_folders_in_class_folders_are_read_in_the_order_of_paths(tmp_path):
    write_tree(tmp_path, count=1)
    for path in ("b/1.png", "b.png", "b-2/1.png", "a/z/1.png"):
        save(tmp_path / "train" / "cat" / path)
    assert names(prepare(tmp_path)) == ["cat/000.png", "cat/a/z/1.png", "cat/b-2/1.png", "cat/b.png", "cat/b/1.png", "dog/000.png"]


def test_a_folder_of_images_that_0_1_0_prepared_is_not_prepared_again(tmp_path, monkeypatch):
    write_tree(tmp_path / "tree")
    save(tmp_path / "tree" / "train" / "cat" / "more" / "1.png")
    (tmp_path / "tree" / "train" / "cat" / "README.txt").write_text("")
    code, cache = versions.release_0_1_0(tmp_path / "0.1.0"), tmp_path / "cache"
    script = tmp_path / "prepare.py"
    script.write_text(
        "import sys; from memtail import datasets; from memtail.experiment import DatasetSpec\n"
        "if __name__ == '__main__': print(datasets.prepare(DatasetSpec(name='folder', root=sys.argv[1], max_train=9)).fingerprint)"
    )
    said = versions.python(code, script, tmp_path / "tree", env={**os.environ, "MEMTAIL_CACHE": str(cache)})
    monkeypatch.setenv("MEMTAIL_CACHE", str(cache))
    inode = (cache / "datasets" / said.strip() / "train_images.npy").stat().st_ino
    dataset = prepare(tmp_path / "tree", max_train=9)
    assert dataset.fingerprint == said.strip()
    assert (dataset.folder / "train_images.npy").stat().st_ino == inode
    assert len(list((cache / "sources").glob("*.lock"))) == 1


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_folder_without_images_is_refused(tmp_path, split):
    write_tree(tmp_path)
    (tmp_path / "train" / "empty").mkdir()
    (tmp_path / "train" / "empty" / "notes.txt").write_text("")
    if split == "val":
        save(tmp_path / "train" / "empty" / "1.png")
        (tmp_path / "val" / "empty").mkdir()
    with pytest.raises(
        DatasetError, match=rf"no images \(\.jpg, .*\) in {tmp_path}/{split}/empty: add images, or remove the class's folder"
    ):
        prepare(tmp_path)


@pytest.mark.parametrize("link", ["train/cat/broken.jpg", "val/dog/more", "train/bird", "train", "val", "."])
def test_a_link_that_leads_nowhere_is_named_with_its_target(tmp_path, link):
    root = tmp_path / "tree"
    write_tree(root)
    path = root / link
    if path.is_dir():
        shutil.rmtree(path)
    path.symlink_to("/nowhere/x")
    with pytest.raises(DatasetError, match=rf"{path} is a link to /nowhere/x, which does not exist") as error:
        prepare(root)
    assert "space" not in str(error.value)
    assert "\n" not in str(error.value)


def test_all_broken_links_are_counted_and_some_named(tmp_path):
    write_tree(tmp_path)
    for index in range(20):
        (tmp_path / "train" / "cat" / f"link{index:02}.jpg").symlink_to("/nowhere")
    with pytest.raises(DatasetError, match=r"link00\.jpg is a link to /nowhere, .*link04\.jpg .*; and 15 more: restore or remove them"):
        prepare(tmp_path)


def test_links_to_files_and_folders_are_followed_and_loops_refused(tmp_path):
    write_tree(tmp_path)
    save(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "train" / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "cat" / "file.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    assert {"cat/more/1.png", "cat/file.png"} <= set(names(prepare(tmp_path)))
    loop = tmp_path / "train" / "cat" / "loop"
    for target in (".", "..", tmp_path):
        loop.symlink_to(target)
        with pytest.raises(DatasetError, match=r"loop.* is a link to a folder that holds it: remove the link"):
            prepare(tmp_path)
        loop.unlink()
    loop.symlink_to("loop")
    with pytest.raises(DatasetError, match=r"cat/loop cannot be read \(Too many levels of symbolic links\)"):
        prepare(tmp_path)


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    write_tree(tmp_path)
    os.mkfifo(tmp_path / "train" / "cat" / "pipe.jpg")
    with pytest.raises(DatasetError, match=r"pipe\.jpg is no regular file"):
        prepare(tmp_path)


def test_a_folder_that_cannot_be_read_is_named():
    root = Path(tempfile.mkdtemp(dir="/tmp"))  # tmp_path is closed to other users
    uid = os.geteuid()
    try:
        write_tree(root)
        closed = root / "train" / "cat" / "more"
        closed.mkdir()
        closed.chmod(0)
        root.chmod(0o755)
        if uid == 0:
            os.seteuid(65534)
        with pytest.raises(DatasetError, match=rf"{closed} cannot be read \(Permission denied\): make it readable, or remove it"):
            prepare(root)
    finally:
        os.seteuid(uid)
        closed.chmod(0o700)
        shutil.rmtree(root)
