"""Preparation of image files: of a tree, or listed by a table or by torchvision.

Several processes decode the images, chunk by chunk, directly into the memory-mapped array, so memory is bounded. An interrupted
preparation is resumed from a journal of its chunks; a chunk whose files have changed since is decoded again. Damaged images do not end a
preparation before all of them are known.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from memtail.datasets.decoding import DamagedImageError, decode, refuse_large_images
from memtail.datasets.image_tree import ImageFiles, ImageTree
from memtail.datasets.prepared import CHUNK, ChunkSummary, OnProgress, Split, finish
from memtail.datasets.sources import MOST_SHOWN, shortened
from memtail.errors import DatasetError
from memtail.processes import check_script, cores, follow_parent
from memtail.spec import DatasetSpec, TorchvisionDataset

# Images that a process decodes in about the time in which another one starts.
_IMAGES_PER_START = 256


# Declarations with a resolution, an orientation, and the choice of leaving damaged images out.
_Images = DatasetSpec | TorchvisionDataset


class _Chunk(NamedTuple):
    """Consecutive images of a split."""

    split: str
    start: int
    stop: int


@dataclass(frozen=True)
class _Decoded:
    """A chunk on the disk.

    Attributes:
        summary: of its pixels, those of unusable images included.
        damaged: index in the split of each image whose content is unusable, and the reason.
        unreadable: likewise, of each file that could not be read, whatever its content.
    """

    summary: ChunkSummary
    damaged: list[tuple[int, str]]
    unreadable: list[tuple[int, str]]


def prepare_folder(tree: ImageTree, spec: _Images, target: Path, unusable: Path, on_progress: OnProgress | None) -> Path:
    """Decode a tree into a prepared dataset.

    Args:
        tree: the files.
        spec: the `dataset` part of an experiment: the resolution, the orientation, and whether damaged images are left out.
        target: the folder of all prepared datasets.
        unusable: a file that gets a line for each unusable image, with its path and the reason; removed if there are none.
        on_progress: called with (images done, all images).

    Returns:
        The dataset's folder below `target`.

    Raises:
        DatasetError: files are damaged and not to be left out, or cannot be read; or images differ in size without a resolution.
        SpecError: the script prepares datasets when a process imports it.
    """
    images = len(tree.train.files) + len(tree.test.files)
    processes = min(cores(), -(-images // _IMAGES_PER_START))
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"), initializer=_begin_to_decode)
    with pool:
        try:
            return _Preparation(tree, spec, target, pool).to_the_end(unusable, on_progress)
        except BrokenProcessPool:
            check_script(pool)
            raise DatasetError(
                f"dataset '{spec.name}': a process that decodes the images of {tree.root} was killed, as for want of memory or of disk "
                f"space in {target}: free some, then run again to resume"
            ) from None


def _begin_to_decode() -> None:
    follow_parent()
    refuse_large_images()


class _Preparation:
    """One preparation in its folder, which is kept until it is complete."""

    def __init__(self, tree: ImageTree, spec: _Images, target: Path, pool: Executor) -> None:
        self._tree, self._spec, self._target, self._pool = tree, spec, target, pool
        self._splits = {"train": tree.train, "test": tree.test}
        self._size = (spec.resolution, spec.resolution) if spec.resolution else self._first_size()
        names = hashlib.sha256(os.fsencode("\n".join([*tree.train.files, "", *tree.test.files]))).hexdigest()
        options = [] if spec.orientation == "stored" else [spec.orientation]
        key = hashlib.sha256(json.dumps([str(tree.root), spec.resolution, self._size, names, *options]).encode()).hexdigest()[:16]
        self._folder = target / f".unfinished-{key}"

    def _first_size(self) -> tuple[int, ...]:
        """Return height and width of the first image that is not damaged."""
        files, reason = self._tree.train, ""
        for file in files.files:
            try:
                return self._pool.submit(_size_of, files.folder / file, self._spec).result()
            except (DamagedImageError, OSError, MemoryError) as error:
                reason = reason or _reason(error)
        raise DatasetError(f"dataset '{self._spec.name}': no image in {files.folder} can be used: {files.files[0]} {reason}")

    def to_the_end(self, unusable: Path, on_progress: OnProgress | None) -> Path:
        """Decode what is not decoded, check it, and move it to its place."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for name, files in self._splits.items():
            path = self._images(name)
            if not path.exists():
                np.lib.format.open_memmap(path, "w+", np.uint8, (len(files.files), *self._size, 3)).flush()
        decoded = self._decode(on_progress)
        self._report(decoded, unusable)
        damaged = {
            name: {index for chunk, each in decoded.items() if chunk.split == name for index, _ in each.damaged} for name in self._splits
        }
        if any(damaged.values()):
            return self._finish_without(damaged)
        chunks = {name: [each.summary for chunk, each in sorted(decoded.items()) if chunk.split == name] for name in self._splits}
        (self._folder / _JOURNAL).unlink()
        return self._finish(self._folder, self._splits, chunks)

    def _decode(self, on_progress: OnProgress | None) -> dict[_Chunk, _Decoded]:
        chunks = [
            _Chunk(name, start, min(start + CHUNK, len(files.files)))
            for name, files in self._splits.items()
            for start in range(0, len(files.files), CHUNK)
        ]
        journal = _Journal(self._folder / _JOURNAL)
        stamps = {chunk: self._splits[chunk.split].stamps(chunk.start, chunk.stop) for chunk in chunks}
        done = {chunk: decoded for chunk in chunks if (decoded := journal.get(chunk, stamps[chunk])) and self._settled(decoded)}
        total = sum(chunk.stop - chunk.start for chunk in chunks)
        finished = sum(chunk.stop - chunk.start for chunk in done)
        todo = iter([chunk for chunk in chunks if chunk not in done])

        def start_chunks(count: int) -> dict[Future[_Decoded], _Chunk]:
            return {
                self._pool.submit(
                    _decode_chunk,
                    self._images(chunk.split),
                    chunk.start,
                    self._splits[chunk.split].folder,
                    self._splits[chunk.split].files[chunk.start : chunk.stop],
                    self._spec,
                ): chunk
                for chunk in islice(todo, count)
            }

        running = start_chunks(2 * cores())
        try:
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    chunk = running.pop(future)
                    done[chunk] = future.result()
                    if not done[chunk].unreadable:
                        journal.add(chunk, stamps[chunk], done[chunk])
                    finished += chunk.stop - chunk.start
                    if on_progress:
                        on_progress(finished, total)
                    running |= start_chunks(1)
        finally:
            for future in running:
                future.cancel()
        return done

    def _settled(self, decoded: _Decoded) -> bool:
        """Return whether a chunk of the journal needs no second look; damaged images get one, unless they are left out."""
        return self._spec.on_error == "skip" or not decoded.damaged

    def _report(self, decoded: dict[_Chunk, _Decoded], unusable: Path) -> None:
        """List the unusable images, and refuse those that are not to be left out."""

        def lines(faults: dict[tuple[str, int], str]) -> list[str]:
            return [
                f"{self._splits[name].folder / self._splits[name].files[index]}: {reason}"
                for (name, index), reason in sorted(faults.items(), key=lambda fault: (fault[0][0] == "test", fault[0][1]))
            ]

        damaged = {(chunk.split, index): reason for chunk, each in decoded.items() for index, reason in each.damaged}
        unreadable = {(chunk.split, index): reason for chunk, each in decoded.items() for index, reason in each.unreadable}
        if not (damaged or unreadable):
            unusable.unlink(missing_ok=True)
            return
        unusable.write_text("\n".join(lines(damaged | unreadable)) + "\n", encoding="utf-8", errors="surrogateescape")
        skip = self._spec.on_error == "skip"
        if faults := lines(unreadable if skip else damaged | unreadable):
            fix = "make them readable, or remove them" if skip else "replace or remove them, or set dataset.on_error to skip"
            total = sum(len(files.files) for files in self._splits.values())
            complete = f"; all are listed in {unusable}" if len(faults) > MOST_SHOWN else ""
            raise DatasetError(
                f"dataset '{self._spec.name}': {len(faults)} of {total} images cannot be used: {shortened(faults)}: {fix}{complete}"
            )

    def _finish_without(self, damaged: dict[str, set[int]]) -> Path:
        """Copy all images but the damaged ones, which takes the disk space twice: a copy that is interrupted starts over."""
        folder = self._folder / "usable"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        splits: dict[str, ImageFiles] = {}
        chunks: dict[str, list[ChunkSummary]] = {}
        for name, files in self._splits.items():
            usable = [index for index in range(len(files.files)) if index not in damaged[name]]
            if files.files and not usable:
                raise DatasetError(f"dataset '{self._spec.name}': no image in {files.folder} can be used: replace them")
            images = np.load(self._images(name), mmap_mode="r")
            copy = np.lib.format.open_memmap(folder / f"{name}_images.npy", "w+", np.uint8, (len(usable), *self._size, 3))
            chunks[name] = []
            for start in range(0, len(usable), CHUNK):
                copy[start : start + CHUNK] = images[usable[start : start + CHUNK]]
                chunks[name].append(ChunkSummary.of(copy[start : start + CHUNK]))
            copy.flush()
            splits[name] = files.chosen(usable)
        finished = self._finish(folder, splits, chunks)
        shutil.rmtree(self._folder, ignore_errors=True)
        return finished

    def _finish(self, folder: Path, splits: dict[str, ImageFiles], chunks: dict[str, list[ChunkSummary]]) -> Path:
        prepared = {
            name: Split(files.labels, np.array([os.fsencode(name) for name in files.names], np.bytes_), (*self._size, 3), chunks[name])
            for name, files in splits.items()
        }
        return finish(folder, self._target, prepared["train"], prepared["test"], self._tree.classes)

    def _images(self, split: str) -> Path:
        return self._folder / f"{split}_images.npy"


_JOURNAL = "journal.jsonl"


class _Journal:
    """One line of JSON per decoded chunk; a line cut short by a kill is ignored."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[_Chunk, tuple[str, _Decoded]] = {}
        for chunk, stamps, decoded in self._read():
            self._entries[chunk] = (stamps, decoded)

    def _read(self) -> Iterator[tuple[_Chunk, str, _Decoded]]:
        if not self._path.exists():
            return
        for line in self._path.read_text().splitlines():
            try:
                entry = json.loads(line)
                damaged = [(int(index), str(reason)) for index, reason in entry.get("damaged", [])]
                yield _Chunk(*entry["chunk"]), entry["stamps"], _Decoded(ChunkSummary(**entry["summary"]), damaged, [])
            except (ValueError, KeyError, TypeError, AttributeError):
                continue

    def get(self, chunk: _Chunk, stamps: str) -> _Decoded | None:
        """Return a chunk, if it was decoded from files with these stamps."""
        entry = self._entries.get(chunk)
        return entry[1] if entry is not None and entry[0] == stamps else None

    def add(self, chunk: _Chunk, stamps: str, decoded: _Decoded) -> None:
        """Add a chunk whose images are on the disk, and whose files were all read."""
        entry = {"chunk": chunk, "stamps": stamps, "summary": asdict(decoded.summary), "damaged": decoded.damaged}
        with self._path.open("a") as file:
            file.write("\n" + json.dumps(entry))


def _decode_chunk(target: Path, start: int, folder: Path, files: list[str], spec: _Images) -> _Decoded:
    """Decode files into the memory-mapped array, from `start` on; runs in a pool's process."""
    array = np.lib.format.open_memmap(target, "r+")
    places = array[start : start + len(files)]
    damaged, unreadable = [], []
    for index, (place, file) in enumerate(zip(places, files, strict=True), start):
        try:
            image = decode(folder / file, spec.resolution, spec.orientation == "exif")
        except DamagedImageError as error:
            damaged.append((index, _reason(error)))
            continue
        except (OSError, MemoryError) as error:
            unreadable.append((index, _reason(error)))
            continue
        if image.shape != place.shape:
            raise DatasetError(
                f"{folder / file}: is {image.shape[1]} x {image.shape[0]} pixels, the first image {place.shape[1]} x {place.shape[0]}: "
                f"images of unequal size need dataset.resolution"
            )
        place[:] = image
    array.flush()
    return _Decoded(ChunkSummary.of(places), damaged, unreadable)


def _size_of(path: Path, spec: _Images) -> tuple[int, ...]:
    return decode(path, spec.resolution, spec.orientation == "exif").shape[:2]


def _reason(error: Exception) -> str:
    if isinstance(error, DamagedImageError):
        return " ".join(str(error).split())
    return "needs more memory than there is" if isinstance(error, MemoryError) else f"cannot be read ({getattr(error, 'strerror', error)})"
