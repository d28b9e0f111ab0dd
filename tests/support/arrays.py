"""Small datasets on disk: an archive of arrays, and a folder of images."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def write_arrays(path: Path, **changes: Any) -> Path:
    """An `arrays` dataset of 40 training and 20 test images of 6 x 6 in two classes, told apart by their brightness."""
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
    """A `folder` dataset of random images in two classes; returns them by their paths below `root`."""
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
