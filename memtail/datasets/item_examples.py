"""Examples of one kind, which are added one by one: texts, vectors of features, or images, which go to the disk at once."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from memtail.datasets.arrays import has_channels_first
from memtail.datasets.dataset import Images
from memtail.datasets.decoding import fitted
from memtail.datasets.prepared import CHUNK, ChunkSummary
from memtail.datasets.text_dataset import encoded
from memtail.errors import DatasetError

Array = npt.NDArray[Any]


class ItemTexts:
    """Texts."""

    kind = "text"
    shape: tuple[int, ...] = ()

    def __init__(self) -> None:
        self._texts: list[str] = []

    def add(self, what: str, text: Any) -> None:
        """Add a text, which messages call `what`. Raises: DatasetError: it is something else."""
        if not isinstance(text, str):
            raise DatasetError(f"{what} is {described(text)}, the first example a text: all must be alike")
        self._texts.append(text)

    def arrays(self) -> dict[str, Array]:
        """Return the arrays of a prepared dataset, without the name of the split."""
        return encoded(self._texts)

    def no_arrays(self) -> dict[str, Array]:
        """Return the arrays of no texts."""
        return encoded([])


class ItemFeatures:
    """Vectors of numbers."""

    kind = "features"

    def __init__(self) -> None:
        self._vectors: list[npt.NDArray[np.float32]] = []

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (D,) of a vector."""
        return self._vectors[0].shape

    def add(self, what: str, example: Any) -> None:
        """Add a vector, which messages call `what`. Raises: DatasetError: it is something else, or not finite."""
        vector = _as_array(example)
        if vector.ndim != 1 or vector.dtype.kind not in "iufb" or (self._vectors and vector.shape != self.shape):
            first = f"the first example has {self.shape[0]} numbers" if self._vectors else "needed is a vector of numbers"
            raise DatasetError(f"{what} is {described(example)}, {first}: all must be alike")
        with np.errstate(over="ignore"):
            self._vectors.append(vector.astype(np.float32))
        if not np.isfinite(self._vectors[-1]).all():
            place = int(np.flatnonzero(~np.isfinite(self._vectors[-1]))[0])
            raise DatasetError(f"{what}: feature {place} is {vector[place]}: features must be finite in float32: fill or drop them")

    def arrays(self) -> dict[str, Array]:
        """Return the array of a prepared dataset, without the name of the split."""
        return {"features": np.stack(self._vectors)}

    def no_arrays(self) -> dict[str, Array]:
        """Return the array of no vectors."""
        return {"features": np.empty((0, *self.shape), np.float32)}


class ItemImages:
    """Images, written into a memory-mapped array in their order.

    Args:
        path: of the array, a `.npy` file.
        count: number of images.
        resolution: side in pixels to which they are resized and cropped; None to keep their size.
    """

    kind = "images"

    def __init__(self, path: Path, count: int, resolution: int | None) -> None:
        self._path, self._count, self._resolution = path, count, resolution
        self._images: np.memmap[Any, Any] | None = None
        self._added = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (H, W, C) of an image."""
        return () if self._images is None else self._images.shape[1:]

    def add(self, what: str, example: Any) -> None:
        """Add an image, which messages call `what`. Raises: DatasetError: it is none, or of another size."""
        pixels = self._pixels(what, example)
        if self._images is None:
            self._images = np.lib.format.open_memmap(self._path, "w+", np.uint8, (self._count, *pixels.shape))
        if pixels.shape != self.shape:
            fix = "set dataset.resolution" if pixels.shape[2] == self.shape[2] else "convert all to grey or to RGB"
            raise DatasetError(f"{what} is {list(pixels.shape)} [H, W, C], the first image {list(self.shape)}: {fix}")
        self._images[self._added] = pixels
        self._added += 1

    def written(self) -> tuple[tuple[int, ...], list[ChunkSummary]]:
        """Write what is in memory; return the shape of an image and the summaries of all chunks."""
        assert self._images is not None  # noqa: S101 (there is an example)
        self._images.flush()
        return self.shape, [ChunkSummary.of(self._images[start : start + CHUNK]) for start in range(0, self._count, CHUNK)]

    def _pixels(self, what: str, example: Any) -> Images:
        if isinstance(example, Image.Image):
            if example.mode.startswith(("I", "F")):
                raise DatasetError(f"{what} has more than 8 bits per channel: convert it to 8 bits")
            image = example.convert("L" if example.mode in ("1", "L") else "RGB")
            pixels = np.asarray(fitted(image, self._resolution))
            return pixels if pixels.ndim == 3 else pixels[..., None]
        pixels = _bytes(what, example)
        if self._resolution is None:
            return pixels
        grey = pixels.shape[2] == 1
        if not grey and pixels.shape[2] != 3:
            raise DatasetError(f"{what} has {pixels.shape[2]} channels, and only images of 1 or 3 are resized: remove dataset.resolution")
        pixels = np.asarray(fitted(Image.fromarray(pixels[..., 0] if grey else pixels), self._resolution))
        return pixels[..., None] if grey else pixels


ItemExamples = ItemTexts | ItemFeatures | ItemImages


def examples_like(what: str, first: Any, path: Path, count: int, resolution: int | None) -> ItemExamples:
    """Return the place of examples of the kind of the first one.

    Args:
        what: name of the first example in messages.
        first: the first example.
        path: of an array, if they are images.
        count: number of examples.
        resolution: of images, as of `ItemImages`.

    Raises:
        DatasetError: the example is of no known kind.
    """
    if isinstance(first, str):
        return ItemTexts()
    if isinstance(first, Image.Image):
        return ItemImages(path, count, resolution)
    dimensions = _as_array(first).ndim if hasattr(first, "__array__") or isinstance(first, list | tuple) else 0
    if dimensions == 1:
        return ItemFeatures()
    if dimensions in (2, 3):
        return ItemImages(path, count, resolution)
    raise DatasetError(f"{what} is {described(first)}: needed is a text, an image (Pillow's, or an array), or a vector of numbers")


def described(value: Any) -> str:
    """Describe a value in a message: type and shape of an array, else the name of its type."""
    shape = getattr(value, "shape", None)
    return f"{value.dtype} {list(shape)}" if shape is not None else type(value).__name__


def _as_array(example: Any) -> Array:
    if hasattr(example, "detach"):  # a tensor, which may be on a device or belong to a graph
        example = example.detach().cpu()
    try:
        return np.asarray(example)
    except ValueError:  # lists of unequal length
        return np.empty((), dtype=object)


def _bytes(what: str, example: Any) -> Images:
    """Return the pixels uint8 [H, W, C] of an array. The channels of a tensor come first, and floats are from 0 to 1, as in torchvision."""
    pixels = _as_array(example)
    if pixels.ndim not in (2, 3) or pixels.size == 0 or pixels.dtype.kind not in "iufb":
        raise DatasetError(f"{what} is {described(example)}, needed is an image [H, W], [H, W, C], or a tensor [C, H, W]")
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    elif hasattr(example, "detach") or has_channels_first(pixels.shape):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels)
    low, high = pixels.min(), pixels.max()
    if pixels.dtype.kind in "fb" and low >= 0 and high <= 1:
        return np.rint(pixels.astype(np.float64) * 255).astype(np.uint8)
    raise DatasetError(
        f"{what} is {pixels.dtype} from {low:g} to {high:g}, needed are uint8 from 0 to 255 or floats from 0 to 1: leave normalization to "
        f"memtail, and convert other numbers to uint8"
    )
