"""Files of every kind that decode to RGB, and files that are refused with one message."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import skimage
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from moec.runtime.inputs.image import read_image
from moec.spec.errors import MoecError

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's, of odd metadata and large size
PHOTOS = Path(skimage.__file__).parent / "data"
WHITE, BLACK = [255, 255, 255], [0, 0, 0]


def refusal(source: str | Path | bytes | Image.Image, names: str = "") -> MoecError:
    """The one clear message that `source` is refused with; it must name `names`."""
    with pytest.raises(MoecError) as caught:
        read_image(source)
    error = caught.value
    assert error.exit_code == 2, error
    assert all(part.strip() for part in (error.where, error.found, error.expected, error.next_step))
    assert len(str(error).splitlines()) == 4, "where, found, expected, next: a line each"
    assert str(error).replace("\n", "").isprintable(), "no control characters from the input"
    assert names in str(error), f"{names!r} should be named in:\n{error}"
    return error


# ---------------------------------------------------------------- files, byte by byte


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, row: bytes, *more: bytes) -> bytes:
    """A PNG of `height` equal rows; `more` are chunks before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = zlib.compress((b"\0" + row) * min(height, 9))
    chunks = [chunk(b"IHDR", header), *more, chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff(bits: int, zero_is_white: bool, row: bytes, width: int = 2, orientation: int = 1) -> bytes:
    """A little-endian, uncompressed gray TIFF of one row."""
    row += b"\0" * (len(row) % 2)
    shorts = {258: bits, 259: 1, 262: int(not zero_is_white), 274: orientation, 277: 1}
    longs = {256: width, 257: 1, 273: 8, 278: 1, 279: len(row)}
    entries = [(tag, 3, 1, value) for tag, value in shorts.items()]
    entries += [(tag, 4, 1, value) for tag, value in longs.items()]
    directory = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    start = struct.pack("<HIH", 42, 8 + len(row), len(entries))
    return b"II" + start[:6] + row + start[6:] + directory + b"\0" * 4


def gif(width: int, height: int) -> bytes:
    frame = struct.pack("<HHHHB", 0, 0, width, height, 0)
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\0\0\0," + frame + b"\x02\0;"


def palette(transparency: bytes | int | None = None) -> bytes:
    """Two pixels, red and green."""
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 100, 0])
    image.putpixel((1, 0), 1)
    options = {} if transparency is None else {"transparency": transparency}
    return encoded(image, "PNG", **options)


def array(mode: str, *pixels: int | tuple[int, ...]) -> Image.Image:
    """One row of `pixels` in `mode`."""
    image = Image.new(mode, (len(pixels), 1))
    for x, pixel in enumerate(pixels):
        image.putpixel((x, 0), pixel)
    return image


def big(*samples: int) -> bytes:
    return struct.pack(f">{len(samples)}H", *samples)


def little(*samples: int) -> bytes:
    return struct.pack(f"<{len(samples)}H", *samples)


#: a file, and the pixels of its one row; samples of 16 bits keep the high byte
ROWS: dict[str, tuple[bytes, list[list[int]]]] = {
    "gray": (encoded(array("L", 7, 200), "PNG"), [[7] * 3, [200] * 3]),
    "1 bit": (encoded(array("1", 0, 1), "PNG"), [BLACK, WHITE]),
    "1 bit PBM": (b"P4 2 1\n\x40", [WHITE, BLACK]),
    "palette": (palette(), [[200, 0, 0], [0, 100, 0]]),
    "palette, one index clear": (palette(1), [[200, 0, 0], WHITE]),
    "palette, alphas": (palette(b"\xff\x33"), [[200, 0, 0], [204, 224, 204]]),
    "gray, clear level": (png(2, 1, 8, 0, b"\7\x09", chunk(b"tRNS", big(9))), [[7] * 3, WHITE]),
    "RGB, clear colour": (
        png(2, 1, 8, 2, b"\1\2\3\4\5\6", chunk(b"tRNS", big(4, 5, 6))),
        [[1, 2, 3], WHITE],
    ),
    "LA": (encoded(array("LA", (9, 255), (9, 0)), "PNG"), [[9] * 3, WHITE]),
    "RGBA": (
        encoded(array("RGBA", (1, 2, 3, 255), (1, 2, 3, 0), (0, 100, 200, 51)), "PNG"),
        [[1, 2, 3], WHITE, [204, 224, 244]],
    ),
    "RGBA WebP": (
        encoded(array("RGBA", (1, 2, 3, 255), (1, 2, 3, 0)), "WEBP", lossless=True),
        [[1, 2, 3], WHITE],
    ),
    "BMP": (encoded(array("RGB", (1, 2, 3)), "BMP"), [[1, 2, 3]]),
    "text PPM": (b"P3 # a comment\n1 1 9\n0 3 9\n", [[0, 85, 255]]),
    "16-bit gray": (png(2, 1, 16, 0, big(0x00FF, 0xABCD)), [BLACK, [0xAB] * 3]),
    "16-bit gray, clear level": (
        png(3, 1, 16, 0, big(0x1234, 0x1235, 0xABCD), chunk(b"tRNS", big(0x1234))),
        [WHITE, [0x12] * 3, [0xAB] * 3],
    ),
    "16-bit gray and alpha": (png(2, 1, 16, 4, big(0x12FF, 65535, 9, 0)), [[0x12] * 3, WHITE]),
    "16-bit RGB": (
        png(2, 1, 16, 2, big(0x1234, 0xABCD, 0xFF80, 0x00FF, 0x0100, 0x01FF)),
        [[0x12, 0xAB, 0xFF], [0, 1, 1]],
    ),
    "16-bit RGBA": (
        png(2, 1, 16, 6, big(0x1234, 0xABCD, 0xFF80, 65535, 1, 2, 3, 0)),
        [[0x12, 0xAB, 0xFF], WHITE],
    ),
    "16-bit PGM": (b"P5 2 1 65535\n" + big(0x1234, 0xABCD), [[0x12] * 3, [0xAB] * 3]),
    "10-bit PGM": (b"P5 3 1 1023\n" + big(0, 512, 1023), [BLACK, [128] * 3, WHITE]),
    "16-bit PPM": (b"P6 1 1 65535\n" + big(0x1234, 0xABCD, 0xFF80), [[0x12, 0xAB, 0xFF]]),
    "16-bit TIFF": (tiff(16, False, little(0x1234, 0xABCD)), [[0x12] * 3, [0xAB] * 3]),
    "16-bit TIFF, big end first": (
        encoded(Image.fromarray(np.array([[0x1234, 0xABCD]], ">u2")), "TIFF"),
        [[0x12] * 3, [0xAB] * 3],
    ),
    "16-bit TIFF, zero is white": (tiff(16, True, little(0, 0xAB00)), [WHITE, [0x54] * 3]),
    "16-bit TIFF, mirrored": (
        tiff(16, False, little(0x1234, 0xABCD), orientation=2),
        [[0xAB] * 3, [0x12] * 3],
    ),
    "12-bit TIFF": (tiff(12, False, b"\xab\xcd\xef"), [[0xAB] * 3, [0xDE] * 3]),
    "8-bit TIFF, zero is white": (tiff(8, True, b"\0\x01"), [WHITE, [254] * 3]),
}


@pytest.mark.parametrize("name", ROWS)
def test_every_kind_of_sample_becomes_rgb(name: str) -> None:
    data, pixels = ROWS[name]
    image = read_image(data)
    assert image.mode == "RGB"
    assert np.asarray(image).tolist() == [pixels]


def test_cmyk_jpeg() -> None:
    cmyk = Image.open(PHOTOS / "rocket.jpg").resize((64, 40)).convert("CMYK")
    image = read_image(encoded(cmyk, "JPEG", quality=95))
    away = np.abs(np.asarray(image).astype(int) - np.asarray(cmyk.convert("RGB")))
    assert image.mode == "RGB" and away.mean() < 4


# ---------------------------------------------------------------- orientation, frames, sources

#: how a camera stored the upright picture, by EXIF orientation
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: np.rot90,
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}
LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}, "JPEG": {"quality": 100}}


@pytest.mark.parametrize("format", LOSSLESS)
@pytest.mark.parametrize("orientation", STORED)
def test_all_orientations_come_out_upright(orientation: int, format: str) -> None:
    upright = np.asarray(Image.open(PHOTOS / "chelsea.png").resize((48, 32)))
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, format, exif=exif, **LOSSLESS[format])
    image = np.asarray(read_image(data)).astype(int)
    assert image.shape == upright.shape
    assert np.abs(image - upright).mean() < (2 if format == "JPEG" else 1e-9)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_the_first_of_several_frames_is_taken(format: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    lossless = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **lossless)
    red = np.asarray(read_image(data)).reshape(-1, 3).mean(axis=0)
    assert np.allclose(red, [255, 0, 0], atol=2)


def test_a_path_its_bytes_and_an_open_image_give_the_same() -> None:
    path = PHOTOS / "astronaut.png"
    with Image.open(path) as opened:
        images = [read_image(s) for s in (path, str(path), path.read_bytes(), opened)]
    assert all(np.array_equal(image, images[0]) for image in images)
    assert images[0].size == (512, 512)


def test_a_pillow_image_is_left_as_it_was() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    row = array("RGBA", (1, 2, 3, 4), (5, 6, 7, 8))
    image = Image.open(io.BytesIO(encoded(row, "PNG", exif=exif)))
    before = image.copy()
    turned = read_image(image)
    assert turned.size == (1, 2) and turned.mode == "RGB"
    assert (image.mode, image.size, image.getexif()[0x0112]) == ("RGBA", (2, 1), 6)
    assert np.array_equal(image, before)
    rgb = Image.new("RGB", (2, 2), "red")
    read_image(rgb).putpixel((0, 0), (0, 0, 0))
    assert rgb.getpixel((0, 0)) == (255, 0, 0), "not the same pixels"


# ---------------------------------------------------------------- refusals

PHOTO = Image.open(PHOTOS / "coffee.png").convert("RGB").resize((61, 53))
FILES = {
    "png": encoded(PHOTO, "PNG"),
    "jpeg": encoded(PHOTO, "JPEG"),
    "progressive": encoded(PHOTO, "JPEG", progressive=True),
    "webp": encoded(PHOTO, "WEBP"),
    "gif": encoded(PHOTO, "GIF"),
    "bmp": encoded(PHOTO, "BMP"),
    "ppm": encoded(PHOTO, "PPM"),
    "tiff": encoded(PHOTO, "TIFF"),
    "tiff lzw": encoded(PHOTO, "TIFF", compression="tiff_lzw"),
    "tiff deflate": encoded(PHOTO, "TIFF", compression="tiff_adobe_deflate"),
    "tiff fax": encoded(PHOTO.convert("1"), "TIFF", compression="group4"),
}
FOREIGN = "no image, a damaged one, or another format"
DAMAGED = "does not decode"


def flipped(data: bytes, *, at: float = 0.5, length: int = 8) -> bytes:
    start = int(len(data) * at)
    wrong = bytes(byte ^ 0xFF for byte in data[start : start + length])
    return data[:start] + wrong + data[start + length :]


#: what is wrong, and a part of the message
BAD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", FOREIGN),
    "random": (bytes(np.random.default_rng(7).bytes(3000)), FOREIGN),
    "text": (b"a text file\n" * 20, FOREIGN),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', FOREIGN),
    "HTML": (b"<!DOCTYPE html><title>404</title>", FOREIGN),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", FOREIGN),
    "PDF": (b"%PDF-1.7\n", FOREIGN),
    "PNG header, then garbage": (FILES["png"][:33] + b"\x9f" * 500, FOREIGN),
    "PNG signature, then garbage": (FILES["png"][:8] + b"\x9f" * 500, FOREIGN),
    "JPEG header, then garbage": (FILES["jpeg"][:20] + b"\x9f" * 500, FOREIGN),
    "PNG, flipped in the middle": (flipped(FILES["png"]), DAMAGED),
    "LZW, flipped in the middle": (flipped(FILES["tiff lzw"], length=300), DAMAGED),
    "deflate, flipped": (flipped(FILES["tiff deflate"]), DAMAGED),
    "no pixels: PNG": (png(0, 0, 8, 2, b""), FOREIGN),
    "no pixels: GIF": (gif(0, 0), FOREIGN),
    "no pixels: PPM": (b"P6 0 9 255\n", FOREIGN),
    "bomb: PNG": (png(60_000, 60_000, 8, 2, b""), "3600000000 pixels"),
    "bomb: GIF": (gif(60_000, 60_000), "3600000000 pixels"),
    "floats: TIFF": (encoded(Image.new("F", (2, 2)), "TIFF"), "mode F"),
    "floats: PFM": (b"Pf 1 1 -1.0\n\0\0\0\0", "mode F"),
    "32-bit integers": (encoded(Image.new("I", (2, 2)), "TIFF"), "mode I"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_give_one_message(name: str, tmp_path: Path) -> None:
    data, names = BAD[name]
    assert refusal(data, names).where == "image"
    path = tmp_path / "photo.png"
    path.write_bytes(data)
    error = refusal(path, names if data else "an empty file")
    assert error.where == str(path)


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refusal(tmp_path, "a folder")
    refusal(str(tmp_path / "photo.png"), "No such file")
    refusal(tmp_path / "pipe", "a pipe or device")
    refusal("/dev/zero", "a pipe or device")
    refusal("a\0b.png", "null byte")
    refusal("x" * 5000, "too long")
    refusal("", "a folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(FILES["png"])
    path.chmod(0)
    refusal(path, "Permission denied")


def test_images_in_memory_are_refused_alike() -> None:
    refusal(Image.new("RGB", (0, 5)), "(0, 5) pixels")
    refusal(Image.new("F", (2, 2)), "mode F")
    refusal(Image.new("I", (2, 2)), "mode I")
    with Image.open(io.BytesIO(FILES["png"][:-600])) as lazy:
        refusal(lazy, DAMAGED)


def decodes_or_refuses(data: bytes) -> bool:
    try:
        assert read_image(data).mode == "RGB"
    except MoecError:
        refusal(data)
        return False
    return True


@pytest.mark.parametrize("name", FILES)
def test_truncated_anywhere(name: str) -> None:
    data = FILES[name]
    assert decodes_or_refuses(data)
    points = np.linspace(0, len(data) - 1, 24).astype(int)
    whole = [decodes_or_refuses(data[:point]) for point in points]
    assert not any(whole[:12]), "half a file is not an image"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", ["header", "anywhere"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_bytes(name: str, where: str, data: st.DataObject) -> None:
    wrong = bytearray(FILES[name])
    place = st.integers(0, len(wrong) - 1 if where == "anywhere" else 120)
    change = st.tuples(place, st.integers(0, 255))
    for at, byte in data.draw(st.lists(change, min_size=1, max_size=5)):
        wrong[at] = byte
    decodes_or_refuses(bytes(wrong))


def test_large_images_pass_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read_image(encoded(Image.new("RGB", (10, 20)), "PNG")).size == (10, 20)
    refusal(encoded(Image.new("RGB", (10, 21)), "PNG"), "210 pixels")
