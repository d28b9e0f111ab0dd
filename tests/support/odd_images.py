"""Files that real image folders hold beside good images: damaged ones, photographs that lie on their side, and very large images."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

#: File format and Pillow's options of each kind of file that is read.
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "jpg": ("JPEG", {}),
    "png": ("PNG", {}),
    "ppm": ("PPM", {}),
    "bmp": ("BMP", {}),
    "pgm": ("PPM", {}),
    "tif": ("TIFF", {}),
    "tiff": ("TIFF", {"compression": "tiff_lzw"}),
    "webp": ("WEBP", {}),
}


def encoded(suffix: str, size: tuple[int, int] = (24, 24), **options: Any) -> bytes:
    """Return a random image in the format of a suffix; `size` is height and width."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert("L" if suffix == "pgm" else "RGB")
    kind, more = FORMATS[suffix]
    file = io.BytesIO()
    image.save(file, kind, **more, **options)
    return file.getvalue()


def write_damaged(root: Path) -> dict[Path, str]:
    """Add four damaged files to a tree of two classes; return the reason of each in part."""
    jpeg = encoded("jpg", (200, 200))
    files = {
        root / "train" / "cat" / "cut.jpg": (jpeg[: len(jpeg) // 2], "image file is truncated"),
        root / "train" / "cat" / "empty.jpg": (b"", "is empty"),
        root / "train" / "cat" / "page.jpg": (b"<html>404 not found</html>", "is no image"),
        root / "val" / "dog" / "cut.jpg": (jpeg[:100], "is truncated or corrupt"),
    }
    for path, (data, _) in files.items():
        path.write_bytes(data)
    return {path: reason for path, (_, reason) in files.items()}


def write_large(path: Path, width: int, height: int) -> None:
    """Write a black image of one bit per pixel, whose file is small."""
    Image.new("1", (width, height)).save(path)


def with_orientation(orientation: int) -> Image.Exif:
    """Return the EXIF data of a photograph that is to be turned."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif
