"""Images of a dataset as PNG and JPEG files."""

import io

import numpy as np
import numpy.typing as npt
from PIL import Image


def png(image: npt.NDArray[np.uint8]) -> bytes:
    """Encode an image, uint8 [H, W, 1] or [H, W, 3], as a PNG file of the same size."""
    buffer = io.BytesIO()
    Image.fromarray(np.squeeze(image, axis=2) if image.shape[2] == 1 else image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def thumbnail(image: npt.NDArray[np.uint8], side: int = 96) -> tuple[str, bytes]:
    """Encode an image for a page with many of them.

    Args:
        image: uint8 [H, W, 1] or [H, W, 3].
        side: largest side in pixels. A smaller image becomes a PNG of its size, a larger one a JPEG scaled down to `side`.

    Returns:
        The MIME type and the file.
    """
    if max(image.shape[:2]) <= side:
        return "image/png", png(image)
    buffer = io.BytesIO()
    smaller = Image.fromarray(np.squeeze(image, axis=2) if image.shape[2] == 1 else image)
    smaller.thumbnail((side, side), Image.Resampling.LANCZOS)
    smaller.save(buffer, "JPEG", quality=88)
    return "image/jpeg", buffer.getvalue()
