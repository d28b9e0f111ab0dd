"""Decoding of one image file: reasons for which a file cannot be used, and the orientation of photographs."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image

from memtail.datasets.decoding import DamagedImageError, decode, refuse_large_images
from tests.support.odd_images import FORMATS, encoded, with_orientation, write_large

# Transposition of an upright image into the one that a camera stores, by orientation.
_TAKEN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.fixture
def file(tmp_path):
    def write(data):
        path = tmp_path / "image"
        path.write_bytes(data)
        return path

    return write


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_is_decoded_as_pillow_decodes_the_file(file, suffix):
    path = file(encoded(suffix))
    assert (decode(path, None, False) == np.asarray(Image.open(path).convert("RGB"))).all()


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.filterwarnings("ignore")  # Pillow warns of damaged metadata
def test_every_damage_is_one_kind_of_error(file, suffix):
    refuse_large_images()
    random, good, reasons = np.random.default_rng(0), encoded(suffix, **({"exif": with_orientation(6)} if suffix != "pgm" else {})), set()
    for round_ in range(400):
        data = bytearray(good)
        if round_ % 4 == 0:
            del data[random.integers(0, len(data)) :]
        for place in random.integers(0, min(len(data), 200), 3) if data else ():
            data[place] = random.choice([0, 1, 128, 255, random.integers(256)])
        try:
            decode(file(bytes(data)), 16, True)
        except DamagedImageError as error:
            reasons.add(str(error).split(":")[0])
    assert "is no image, or damaged at its beginning" in reasons
    assert "is truncated or corrupt" in reasons


@pytest.mark.parametrize(("width", "height"), [(20000, 10000), (10000, 10000)])
def test_an_image_above_pillows_limit_is_refused_with_its_size_and_the_limit(tmp_path, width, height):
    refuse_large_images()
    write_large(tmp_path / "large.png", width, height)
    with pytest.raises(DamagedImageError, match=rf"image size \({width * height} pixels\) .*, scale it down to at most 89478485 pixels"):
        decode(tmp_path / "large.png", 16, False)


def test_files_that_hold_no_image_are_told_from_those_that_cannot_be_read(file, tmp_path):
    for data, reason in ((b"", "is empty"), (b"<html>404</html>", "is no image")):
        with pytest.raises(DamagedImageError, match=reason):
            decode(file(data), None, False)
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(OSError, match=r"No such file|Is a directory"):
            decode(path, None, False)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_photographs_are_turned_upright_only_on_request(file, orientation, kind):
    upright = np.kron(np.arange(6, dtype=np.uint8).reshape(2, 3) * 50, np.ones((8, 8), np.uint8))
    image = Image.fromarray(upright)
    stored = image if orientation == 1 else image.transpose(_TAKEN[orientation])
    buffer = io.BytesIO()
    stored.convert("RGB").save(buffer, kind, exif=with_orientation(orientation), quality=100, lossless=True)
    path = file(buffer.getvalue())
    np.testing.assert_allclose(decode(path, None, True)[..., 0].astype(int), upright, atol=3)
    np.testing.assert_allclose(decode(path, None, False)[..., 0].astype(int), np.asarray(stored), atol=3)


def test_a_tiff_file_which_pillow_turns_is_not_turned_twice(file):
    upright = np.arange(6, dtype=np.uint8).reshape(2, 3) * 50
    buffer = io.BytesIO()
    Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90).save(buffer, "TIFF", exif=with_orientation(6))
    assert (decode(file(buffer.getvalue()), None, True)[..., 0] == upright).all()


def test_metadata_that_pillow_cannot_write_again_do_not_matter(file):
    exif = with_orientation(6)
    exif[ExifTags.Base.ImageWidth] = 7
    data = exif.tobytes()
    width = data.index((ExifTags.Base.ImageWidth).to_bytes(2, "big"))
    broken = data[: width + 2] + b"\x00\x02" + data[width + 4 :]  # text instead of a number
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2)).save(buffer, "PNG", exif=broken)
    assert decode(file(buffer.getvalue()), None, True).shape == (3, 2, 3)
