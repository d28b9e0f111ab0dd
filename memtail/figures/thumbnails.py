"""Images of a dataset as files that people and browsers look at."""

import io

import numpy as np
import numpy.typing as npt
from PIL import Image


def png(image: npt.NDArray[np.uint8]) -> bytes:
    """One image, uint8 [H, W, 1] or [H, W, 3], as a PNG file of the same size."""
    buffer = io.BytesIO()
    Image.fromarray(np.squeeze(image, axis=2) if image.shape[2] == 1 else image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def thumbnail(image: npt.NDArray[np.uint8], side: int = 96) -> tuple[str, bytes]:
    """One image, uint8 [H, W, 1] or [H, W, 3], as small as a page of many needs it: a MIME type and a file.

    One of no more than `side` pixels a side is a PNG of its own size, a larger one a JPEG of that side.
    """
    if max(image.shape[:2]) <= side:
        return "image/png", png(image)
    buffer = io.BytesIO()
    smaller = Image.fromarray(np.squeeze(image, axis=2) if image.shape[2] == 1 else image)
    smaller.thumbnail((side, side), Image.Resampling.LANCZOS)
    smaller.save(buffer, "JPEG", quality=88)
    return "image/jpeg", buffer.getvalue()
