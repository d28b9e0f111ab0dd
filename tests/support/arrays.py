"""Small datasets on disk: an archive of arrays, a folder of images, MNIST in torchvision's layout."""

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def write_arrays(path: Path, **changes: Any) -> Path:
    """Write an `arrays` dataset: 40 training and 20 test images of 6 x 6 pixels, in two classes of different brightness."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, count in (("train", 40), ("test", 20)):
        labels = np.arange(count) % 2
        arrays[f"{split}_labels"] = labels
        arrays[f"{split}_images"] = (rng.integers(0, 100, (count, 6, 6)) + 150 * labels[:, None, None]).astype(np.uint8)
    arrays.update(changes)
    np.savez(path, **arrays)
    return path


def write_tree(root: Path, count: int = 5, size: tuple[int, int] = (8, 8), suffix: str = ".png") -> dict[str, np.ndarray[Any, Any]]:
    """Write a `folder` dataset of random images in two classes; return the images by path below `root`."""
    rng = np.random.default_rng(0)
    held = {}
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True)
            for index in range(count):
                image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(image).save(root / split / label / f"{index:03}{suffix}")
                held[f"{split}/{label}/{index:03}{suffix}"] = image
    return held


def write_mnist(root: Path, compress: bool = False) -> dict[str, np.ndarray[Any, Any]]:
    """Write eight training and four test images in torchvision's layout; return the images by the prefix of their file."""
    rng = np.random.default_rng(0)
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    held = {}
    for prefix, count in (("train", 8), ("t10k", 4)):
        images, labels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8)
        held[prefix] = images
        for name, magic, array in (("images-idx3", 2051, images), ("labels-idx1", 2049, labels)):
            data = struct.pack(f">{1 + array.ndim}i", magic, *array.shape) + array.tobytes()
            path = folder / f"{prefix}-{name}-ubyte{'.gz' if compress else ''}"
            path.write_bytes(gzip.compress(data) if compress else data)
    return held
