"""Tests of read_image with generated images and, where present, the hostile ones of the test data."""

import io
import os
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from halodet.errors import ImageError
from halodet.utils.image_io import apply_exif_orientation, read_image, to_bgr

import numpy as np
import pytest
from detectron2.data.detection_utils import _apply_exif_orientation, convert_PIL_to_numpy
from helpers import png
from PIL import Image

HOSTILE = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")) / "bad_inputs" / "images"
# The transposition that undoes each EXIF orientation, so that applying it to an upright picture makes the stored one.
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.fixture
def photo():
    """A picture without any symmetry, as RGB."""
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))


def bgr(image):
    return np.asarray(image.convert("RGB"))[:, :, ::-1]


def test_colors_come_in_bgr_order(tmp_path):
    Image.new("RGB", (4, 3), (250, 100, 5)).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.shape == (3, 4, 3) and image.dtype == np.uint8 and image.flags.c_contiguous
    assert image[0, 0].tolist() == [5, 100, 250]


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, photo, orientation, suffix):
    stored = photo.transpose(STORED[orientation]) if orientation in STORED else photo
    exif = Image.Exif()
    exif[274] = orientation
    stored.save(tmp_path / f"a.{suffix}", exif=exif)
    assert np.array_equal(read_image(tmp_path / f"a.{suffix}"), bgr(photo))


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV", "LAB"])
@pytest.mark.parametrize("orientation", [*range(10), "6", 6.0])
def test_conversion_equals_detectron2s(photo, orientation, mode):
    image = photo.convert("RGB" if mode == "LAB" else mode)
    if mode == "LAB":
        image = Image.fromarray(np.asarray(photo), "LAB")
    image.getexif()[274] = orientation
    expected = _apply_exif_orientation(image)
    assert np.array_equal(np.asarray(apply_exif_orientation(image)), np.asarray(expected))
    assert np.array_equal(to_bgr(image), convert_PIL_to_numpy(expected, "BGR"))


def test_threads_restore_warnings_and_stderr(tmp_path, photo, capfd):
    for index in range(8):
        photo.resize((200, 200)).save(tmp_path / f"{index}.tif")
    filters = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(read_image, [tmp_path / f"{index % 8}.tif" for index in range(80)]))
    assert len({image.tobytes() for image in images}) == 1
    assert warnings.filters == filters
    os.write(2, b"restored")
    assert capfd.readouterr().err == "restored"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # from Image.open in the test itself
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"])
def test_broken_exif_is_ignored(tmp_path, photo, exif):
    photo.save(tmp_path / "a.jpg", exif=exif, quality=100)
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.info["exif"] == exif
        expected = bgr(image)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert np.array_equal(read_image(tmp_path / "a.jpg"), expected)
    assert not shown


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk_red_stays_red(tmp_path, suffix):
    # The JPEG is stored inverted, as Adobe does.
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / f"a.{suffix}")
    blue, green, red = read_image(tmp_path / f"a.{suffix}")[8, 8].tolist()
    assert red > 240 and green < 15 and blue < 15


def test_lab_green_stays_green(tmp_path):
    Image.new("LAB", (4, 4), (119, 72, 198)).save(tmp_path / "a.tif")  # L 46.6, a -56, b +70, offset by 128
    blue, green, red = read_image(tmp_path / "a.tif")[0, 0].astype(int).tolist()
    assert green > 100 and green > red + 60 and green > blue + 60


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_grey_one_bit_and_palette(tmp_path, photo, mode):
    photo.convert(mode).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), bgr(photo.convert(mode)))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_spans_the_whole_range(tmp_path, suffix):
    ramp = (np.arange(256, dtype=np.uint16) * 257)[None].repeat(4, axis=0)
    Image.fromarray(ramp).save(tmp_path / f"a.{suffix}")
    expected = np.arange(256)[None, :, None].repeat(4, axis=0).repeat(3, axis=2)
    assert np.array_equal(read_image(tmp_path / f"a.{suffix}"), expected)


def test_16_bit_grey_is_not_stretched(tmp_path):
    Image.fromarray(np.full((4, 4), 257 * 3, dtype=np.uint16)).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png") == 3).all()


def test_16_bit_rgb_is_scaled(tmp_path):
    pixels = np.array([[[65535, 32896, 0], [257, 65535, 40 * 257]]], dtype=">u2")
    (tmp_path / "a.png").write_bytes(png(2, 1, b"\0" + pixels.tobytes(), bit_depth=16, color_type=2))
    assert read_image(tmp_path / "a.png").tolist() == [[[0, 128, 255], [40, 255, 1]]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 100, 200]], np.float32), [0, 100, 200]),
        (np.array([[0, 0, 65535]], np.float32), [0, 0, 255]),
        (np.array([[-1, 0, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 7, 255]], np.int32), [0, 7, 255]),
        (np.array([[0, 257 * 9, 65535]], np.int32), [0, 9, 255]),
        (np.array([[-1000, 99000, 99000]], np.int32), [0, 255, 255]),
        (np.array([[-7, -7, -7]], np.int32), [0, 0, 0]),
    ],
)
def test_32_bit_values_are_scaled_from_the_smallest_usual_range(tmp_path, values, expected):
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif")[0, :, 0].tolist() == expected


def test_nan_pixels_are_an_error_with_their_number(tmp_path):
    Image.fromarray(np.array([[0, np.nan, np.inf]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match="2 of 3 pixels"):
        read_image(tmp_path / "a.tif")


def test_transparency_is_composited_on_white(tmp_path):
    rgba = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [255, 0, 0, 51]]], dtype=np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").tolist() == [[[0, 0, 255], [255, 255, 255], [204, 204, 255]]]
    Image.fromarray(np.array([[[10, 255], [10, 0]]], dtype=np.uint8), "LA").save(tmp_path / "la.png")
    assert read_image(tmp_path / "la.png").tolist() == [[[10] * 3, [255] * 3]]


@pytest.mark.parametrize("mode", ["P", "L", "1", "I;16"])
def test_a_transparent_value_is_composited_on_white(tmp_path, mode):
    image = Image.new(mode, (2, 1), 0)
    if mode == "P":
        image.putpalette([0, 0, 0, 9, 9, 9])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=0)
    first, second = read_image(tmp_path / "a.png")[0].tolist()
    assert first == [255] * 3
    assert second == {"P": [9] * 3, "L": [1] * 3, "1": [255] * 3, "I;16": [0] * 3}[mode]


@pytest.mark.parametrize("suffix", ["gif", "tif", "webp", "png"])
def test_the_first_frame_of_several_is_taken(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
    with Image.open(tmp_path / f"a.{suffix}") as image:
        assert image.n_frames == 2
    assert (read_image(tmp_path / f"a.{suffix}") == (0, 0, 255)).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tif", "webp"])
def test_a_truncated_file_is_an_error(tmp_path, suffix):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix))
    (tmp_path / f"a.{suffix}").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(ImageError, match=f"a.{suffix}"):
        read_image(tmp_path / f"a.{suffix}")


def test_unusable_paths_are_an_error_with_the_reason(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "page.jpg").write_text("<html></html>")
    os.mkfifo(tmp_path / "pipe.jpg")
    reasons = {
        "none.jpg": "does not exist",
        "": "is a folder",
        "empty.jpg": "0 bytes",
        "page.jpg": "not an image",
        "pipe.jpg": "regular",
    }
    for name, reason in reasons.items():
        with pytest.raises(ImageError, match=reason) as caught:
            read_image(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_a_decompression_bomb_is_an_error_with_the_numbers(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png(60_000, 60_000, b"\0"))
    with pytest.raises(ImageError, match="3600000000.*178956970"):
        read_image(tmp_path / "bomb.png")


def test_pillow_and_libtiff_print_nothing(tmp_path, photo, capfd, recwarn):
    # A tag (65000) of an unknown type makes Pillow warn and libtiff print.
    photo.save(tmp_path / "a.tif", compression="tiff_lzw")
    data = bytearray((tmp_path / "a.tif").read_bytes())
    start = struct.unpack("<I", data[4:8])[0]
    entries = struct.unpack("<H", data[start : start + 2])[0]
    odd = struct.pack("<HHII", 65000, 99, 1, 0)
    directory = data[start + 2 : start + 2 + 12 * entries] + odd + bytes(4)
    data[4:8] = struct.pack("<I", len(data))
    data += struct.pack("<H", entries + 1) + directory
    (tmp_path / "a.tif").write_bytes(data)
    assert np.array_equal(read_image(tmp_path / "a.tif"), bgr(photo))
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    os.write(2, b"restored")
    assert capfd.readouterr().err == "restored"


def _hostile_files():
    files = [path for path in sorted(HOSTILE.rglob("*")) if path.is_file()] if HOSTILE.is_dir() else []
    return files or [pytest.param(None, marks=pytest.mark.skip(reason=f"{HOSTILE} is not there"))]


@pytest.mark.parametrize("path", _hostile_files(), ids=lambda path: path and path.name)
def test_hostile_image_is_read_or_a_one_line_error(path, capfd):
    try:
        image = read_image(path)
    except ImageError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not HOSTILE.is_dir(), reason=f"{HOSTILE} is not there")
def test_which_hostile_images_are_unreadable():
    def is_unreadable(path):
        try:
            read_image(path)
        except ImageError:
            return True
        return False

    assert {
        path.name for path in HOSTILE.rglob("*") if path.is_file() and path.suffix != ".json" and is_unreadable(path)
    } == {
        "badwidth.bmp",
        "broken.png",
        "crash-2020-10-test.tif",
        "decompression_bomb.gif",
        "half_file.jpg",
        "html_not_image.jpg",
        "shortfile.bmp",
        "truncated_image.png",
        "ultrahdr.jpg",  # its data ends before the first scan
        "zero_bytes.jpg",
        "zero_width.gif",
    }
