"""Trees of image files, class by class: `train/CLASS/*.png` and `test/` or `val/` beside it, as in ImageNet.

Several processes decode the images, chunk by chunk, directly into the memory-mapped array, so memory is bounded. An interrupted
preparation is resumed from a journal of its chunks; a chunk whose files have changed since is decoded again. The order is that of
torchvision's ImageFolder: classes by name, then files by path.
"""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from memtail.datasets.dataset import Images, Labels
from memtail.datasets.prepared import CHUNK, ChunkSummary, OnProgress, Split, finish
from memtail.errors import DatasetError
from memtail.processes import cores, follow_parent


@dataclass(frozen=True)
class ImageFiles:
    """Files of one split.

    Attributes:
        folder: of the split.
        files: paths below the folder.
        labels: int64 [N], index of each file's class.
    """

    folder: Path
    files: list[str]
    labels: Labels

    def stamps(self, start: int, stop: int) -> str:
        """Return a digest of the names, sizes and modification times of files `start` to `stop`."""
        digest = hashlib.sha256()
        for file in self.files[start:stop]:
            status = (self.folder / file).stat()
            digest.update(os.fsencode(file) + f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def limited(self, most: int | None) -> "ImageFiles":
        """Return evenly spaced files, `most` at most."""
        if most is None or most >= len(self.files):
            return self
        chosen = np.arange(most) * len(self.files) // most
        return ImageFiles(self.folder, [self.files[index] for index in chosen], self.labels[chosen])


@dataclass(frozen=True)
class ImageTree:
    """Both splits of a tree, and the names of its classes."""

    root: Path
    classes: list[str]
    train: ImageFiles
    test: ImageFiles

    def identity(self) -> list[str]:
        """Return digests that change with the tree."""
        return [str(self.root), *(split.stamps(0, len(split.files)) for split in (self.train, self.test))]


def find_images(root: Path, max_train: int | None, max_test: int | None) -> ImageTree:
    """List a tree.

    Args:
        root: holds the splits.
        max_train: number of training images, evenly spaced; all if None.
        max_test: number of test images.

    Raises:
        DatasetError: a folder or its images are missing, or the test split has a class that the training split lacks.
    """
    if not root.is_dir():
        raise DatasetError(f"dataset 'folder': there is no folder {root}: give dataset.root the folder that holds train/ and test/")
    train_folder = root / "train"
    test_folder = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if not train_folder.is_dir() or test_folder is None:
        raise DatasetError(f"dataset 'folder': {root} must hold train/ and test/ (or val/), each with one folder per class")
    classes = _class_folders(train_folder)
    index = {name: label for label, name in enumerate(classes)}
    train, test = _list_split(train_folder, index), _list_split(test_folder, index)
    return ImageTree(root, classes, train.limited(max_train), test.limited(max_test))


def _class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _list_split(folder: Path, index: dict[str, int]) -> ImageFiles:
    extensions = tuple(Image.registered_extensions())
    files: list[str] = []
    labels: list[int] = []
    for name in _class_folders(folder):
        if name not in index:
            raise DatasetError(f"dataset 'folder': {folder / name} is a class that train/ does not have: remove it or add training images")
        paths = sorted(
            os.path.relpath(os.path.join(parent, file), folder)
            for parent, _, members in os.walk(folder / name, followlinks=True)
            for file in members
            if file.lower().endswith(extensions)
        )
        files += paths
        labels += [index[name]] * len(paths)
    if not files:
        raise DatasetError(f"dataset 'folder': {folder} holds no images: put them into one folder per class")
    return ImageFiles(folder, files, np.array(labels, dtype=np.int64))


def prepare_folder(tree: ImageTree, resolution: int | None, target: Path, on_progress: OnProgress | None) -> Path:
    """Decode a tree into a prepared dataset.

    Args:
        tree: the files.
        resolution: side in pixels to which images are resized (shorter side, bicubic) and cropped (centre); None for images of one size,
            which are not changed.
        target: the folder of all prepared datasets.
        on_progress: called with (images done, all images).

    Returns:
        The dataset's folder below `target`.

    Raises:
        DatasetError: a file is corrupt, or images differ in size without a resolution.
    """
    size = _decode(tree.train.folder / tree.train.files[0], resolution).shape[:2]
    names = hashlib.sha256(os.fsencode("\n".join([*tree.train.files, "", *tree.test.files]))).hexdigest()
    key = hashlib.sha256(json.dumps([str(tree.root), resolution, size, names]).encode()).hexdigest()[:16]
    folder = target / f".unfinished-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    splits = {"train": tree.train, "test": tree.test}
    for name, split in splits.items():
        path = folder / f"{name}_images.npy"
        if not path.exists():
            np.lib.format.open_memmap(path, "w+", np.uint8, (len(split.files), *size, 3)).flush()
    journal = _Journal(folder / "journal.jsonl")
    chunks = [
        (name, start, min(start + CHUNK, len(split.files))) for name, split in splits.items() for start in range(0, len(split.files), CHUNK)
    ]
    stamps = {chunk: splits[chunk[0]].stamps(*chunk[1:]) for chunk in chunks}
    done = {chunk: summary for chunk in chunks if (summary := journal.get(chunk, stamps[chunk]))}
    total = sum(stop - start for _, start, stop in chunks)
    finished = sum(stop - start for _, start, stop in done)
    todo = iter([chunk for chunk in chunks if chunk not in done])
    processes = cores()
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"), initializer=follow_parent) as pool:

        def start_chunks(count: int) -> dict[Future[ChunkSummary], tuple[str, int, int]]:
            return {
                pool.submit(
                    _decode_chunk, folder / f"{name}_images.npy", start, splits[name].folder, splits[name].files[start:stop], resolution
                ): (name, start, stop)
                for name, start, stop in islice(todo, count)
            }

        running = start_chunks(2 * processes)
        try:
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    chunk = running.pop(future)
                    done[chunk] = future.result()
                    journal.add(chunk, stamps[chunk], done[chunk])
                    finished += chunk[2] - chunk[1]
                    if on_progress:
                        on_progress(finished, total)
                    running |= start_chunks(1)
        finally:
            for future in running:
                future.cancel()
    prepared = {
        name: Split(
            split.labels,
            np.array([os.fsencode(file) for file in split.files]),
            (*size, 3),
            [done[chunk] for chunk in chunks if chunk[0] == name],
        )
        for name, split in splits.items()
    }
    journal.path.unlink()
    return finish(folder, target, prepared["train"], prepared["test"], tree.classes)


class _Journal:
    """One line of JSON per decoded chunk; a line cut short by a kill is ignored."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[tuple[str, int, int], tuple[str, ChunkSummary]] = {}
        for chunk, stamps, summary in self._read():
            self._entries[chunk] = (stamps, summary)

    def _read(self) -> Iterator[tuple[tuple[str, int, int], str, ChunkSummary]]:
        if not self.path.exists():
            return
        for line in self.path.read_text().splitlines():
            try:
                entry = json.loads(line)
                name, start, stop = entry["chunk"]
                yield (name, start, stop), entry["stamps"], ChunkSummary(**entry["summary"])
            except (ValueError, KeyError, TypeError):
                continue

    def get(self, chunk: tuple[str, int, int], stamps: str) -> ChunkSummary | None:
        """Return the summary of a chunk, if it was decoded from files with these stamps."""
        entry = self._entries.get(chunk)
        return entry[1] if entry is not None and entry[0] == stamps else None

    def add(self, chunk: tuple[str, int, int], stamps: str, summary: ChunkSummary) -> None:
        """Add a chunk whose images are on the disk."""
        with self.path.open("a") as file:
            file.write("\n" + json.dumps({"chunk": chunk, "stamps": stamps, "summary": asdict(summary)}))


def _decode_chunk(target: Path, start: int, folder: Path, files: list[str], resolution: int | None) -> ChunkSummary:
    """Decode files into the memory-mapped array, from `start` on; runs in a pool's process."""
    array = np.lib.format.open_memmap(target, "r+")
    places = array[start : start + len(files)]
    for place, file in zip(places, files, strict=True):
        image = _decode(folder / file, resolution)
        if image.shape != place.shape:
            raise DatasetError(
                f"{folder / file}: is {image.shape[1]} x {image.shape[0]} pixels, the first image {place.shape[1]} x {place.shape[0]}: "
                f"images of unequal size need dataset.resolution"
            )
        place[:] = image
    array.flush()
    return ChunkSummary.of(places)


def _decode(path: Path, resolution: int | None) -> Images:
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise DatasetError(f"{path}: has more than 8 bits per channel: convert it to 8 bits")
            if resolution is not None:
                image.draft("RGB", (resolution, resolution))  # decodes a JPEG at a fraction of its size
            rgb = image.convert("RGB")
            if resolution is not None:
                rgb = ImageOps.fit(rgb, (resolution, resolution), Image.Resampling.BICUBIC)
            return np.asarray(rgb)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise DatasetError(f"{path}: is truncated or corrupt, or not an image ({error}): replace or remove it") from None
