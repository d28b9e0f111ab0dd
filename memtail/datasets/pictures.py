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
