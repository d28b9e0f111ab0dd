"""Datasets of the rows, found on this machine, or made up in a dry run."""

import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from memtail import datasets
from memtail.settings import Settings
from memtail.spec import DatasetSpec
from tests.benchmarks.gpu.runner import Bench

_FOLDERS = {"mnist": "MNIST/raw", "cifar10": "cifar-10-batches-py"}
_SHARED = Path(__file__).parents[3].parent / "shared" / "data"


def dataset(name: str, bench: Bench) -> dict[str, Any]:
    """Return the declaration of MNIST or CIFAR-10, prepared so that it is only opened from now on.

    Raises:
        FileNotFoundError: it is not on this machine.
    """
    declared = _made_up(bench.folder / f"{name}.npz", 1 if name == "mnist" else 3) if bench.tiny else _found(name)
    datasets.prepare(DatasetSpec.model_validate(declared))
    return declared


def made_up(path: Path, images: int, size: int, channels: int, classes: int) -> dict[str, Any]:
    """Write random images that differ between classes, and a fifth as many for a test set; return their declaration."""
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for split, count in (("train", images), ("test", max(classes, images // 5))):
        labels = np.arange(count) % classes
        shade = (labels * 155 // classes)[:, None, None, None]
        arrays[f"{split}_labels"] = labels
        arrays[f"{split}_images"] = (rng.integers(0, 100, (count, size, size, channels)) + shade).astype(np.uint8)
    np.savez(path, **arrays)
    return {"name": "arrays", "root": str(path)}


def _made_up(path: Path, channels: int) -> dict[str, Any]:
    return {"name": "arrays", "root": str(path)} if path.exists() else made_up(path, 60, 12, channels, 4)


def _found(name: str) -> dict[str, Any]:
    settings = Settings()
    places = [*settings.places(None), _SHARED]
    for place in places:
        if (place / _FOLDERS[name]).is_dir():
            return {"name": name, "root": str(place)}
    for place in places:
        if (archive := place / f"{name}-jpeg.tar.xz").is_file():
            return {"name": "folder", "root": str(_unpacked(archive, settings.cache / "unpacked") / name)}
    raise FileNotFoundError(f"{name} is in none of {', '.join(map(str, places))}: name its folder in MEMTAIL_DATA")


def _unpacked(archive: Path, into: Path) -> Path:
    """Unpack an archive of image files once; return the folder."""
    folder = into / archive.name.partition(".")[0]
    if not folder.is_dir():
        partial = folder.with_suffix(".partial")
        with tarfile.open(archive) as opened:
            opened.extractall(partial, filter="data")
        partial.rename(folder)
    return folder
