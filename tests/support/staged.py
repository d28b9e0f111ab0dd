"""Small datasets, and a store that counts what it sends and receives."""

from pathlib import Path

import numpy as np

from memtail import datasets
from memtail.datasets import ImageDataset
from memtail.spec import DatasetSpec
from memtail.storage.local import LocalStore
from tests.support.arrays import write_arrays


class CountingStore(LocalStore):
    """A store that lists its downloads and uploads in files, to which other processes add."""

    def download(self, key: str, path: Path) -> None:
        self._note("downloads", key)
        super().download(key, path)

    def upload(self, key: str, path: Path, start: int = 0, length: int | None = None) -> None:
        self._note("uploads", key)
        super().upload(key, path, start, length)

    def noted(self, kind: str) -> list[str]:
        path = self.root / kind
        return path.read_text().splitlines() if path.exists() else []

    def _note(self, kind: str, key: str) -> None:
        self.root.mkdir(exist_ok=True)
        with (self.root / kind).open("a") as file:
            file.write(f"{key}\n")


def prepare(folder: Path, shade: int = 0) -> ImageDataset:
    """Prepare one of several small datasets."""
    rng = np.random.default_rng(shade)
    path = write_arrays(folder / f"{shade}.npz", train_images=rng.integers(0, 255, (40, 6, 6)).astype(np.uint8))
    return datasets.as_images(datasets.prepare(DatasetSpec(name="arrays", root=path)))


def size_of(dataset: ImageDataset) -> int:
    """Return the bytes of a dataset's files."""
    return sum(path.stat().st_size for path in dataset.folder.iterdir())
