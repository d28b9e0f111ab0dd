"""Decoding of one image file into pixels."""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from memtail.datasets.dataset import Images

# Turns that bring an image upright, by its EXIF orientation. ImageOps.exif_transpose also writes the EXIF data again, and fails on the data
# of some cameras.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DamagedImageError(Exception):
    """The content of a file is no usable image; the text says why."""


def refuse_large_images() -> None:
    """Make Pillow raise an error, in this process, on every image above its limit; between once and twice the limit it only warns."""
    warnings.simplefilter("error", Image.DecompressionBombWarning)


def decode(path: Path, resolution: int | None, upright: bool) -> Images:
    """Return the pixels of an image file, uint8 [H, W, 3].

    Args:
        path: of the file.
        resolution: side in pixels to which the image is resized (shorter side, bicubic) and cropped (centre); None to keep its size.
        upright: whether to turn the image as its EXIF orientation says.

    Raises:
        DamagedImageError: the file is no image, is truncated or corrupt, too large, or has more than 8 bits per channel.
        OSError: the file cannot be read.
        MemoryError: the image does not fit into memory.
    """
    return decode_bytes(path.read_bytes(), resolution, upright)


def decode_bytes(data: bytes, resolution: int | None, upright: bool, keep_grey: bool = False) -> Images:
    """Return the pixels of the content of an image file, uint8 [H, W, 3], or [H, W, 1] of a grey image if `keep_grey` is true.

    Other arguments and errors as of `decode`.
    """
    if not data:
        raise DamagedImageError("is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _pixels(image, resolution, upright, "L" if keep_grey and image.mode in ("1", "L") else "RGB")
    except (DamagedImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise DamagedImageError("is no image, or damaged at its beginning") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        text = str(error).split(",")[0]  # Image size (N pixels) exceeds limit of M pixels
        raise DamagedImageError(f"{text[:1].lower()}{text[1:]}, scale it down to at most {Image.MAX_IMAGE_PIXELS} pixels") from None
    except Exception as error:  # Pillow's decoders raise every kind of exception on a damaged file
        raise DamagedImageError(f"is truncated or corrupt: {error}") from None


def _pixels(image: Image.Image, resolution: int | None, upright: bool, mode: str) -> Images:
    if image.mode.startswith(("I", "F")):
        raise DamagedImageError("has more than 8 bits per channel, convert it to 8 bits")
    if resolution is not None:
        image.draft(mode, (resolution, resolution))  # decodes a JPEG at a fraction of its size
    converted = image.convert(mode)
    if upright:
        orientation = image.getexif().get(ExifTags.Base.Orientation)  # after loading, in which Pillow turns a TIFF file itself
        if orientation in _TURNS:
            converted = converted.transpose(_TURNS[orientation])
    pixels = np.asarray(fitted(converted, resolution))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def fitted(image: Image.Image, resolution: int | None) -> Image.Image:
    """Resize an image, by its shorter side, and crop it to a square; arguments as of `decode`."""
    return image if resolution is None else ImageOps.fit(image, (resolution, resolution), Image.Resampling.BICUBIC)
