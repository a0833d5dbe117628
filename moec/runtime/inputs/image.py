"""An image file to pixels: 8-bit RGB, upright, on white.

Pillow decodes. Colour profiles are ignored, and of several frames or pages the first is taken.
"""

import stat
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from moec.spec.errors import MoecError, refuse

#: Left to itself, Pillow tries some forty formats, EPS among them, for which it starts ghostscript.
#: JPEG covers MPO, the several pictures of a phone's camera; Pillow opens no format of that name.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def read_image(source: str | Path | bytes | Image.Image) -> Image.Image:
    """The picture in `source` (a path, a file's bytes, or a Pillow image), in mode RGB.

    EXIF orientation is applied. Transparency is laid on white. 16-bit samples keep their high byte.
    A Pillow image is left as it was.

    Raises:
        MoecError: no such file, not an image of `FORMATS`, damaged, of more pixels than Pillow
            trusts (179 million), or of samples without a known range (32-bit integers, floats).
    """
    if not isinstance(source, str | Path | bytes | Image.Image):
        refuse(
            "image",
            f"{type(source).__name__}",
            "a path, a file's bytes, or a Pillow image",
            "open files and arrays by Pillow (Image.open, Image.fromarray)",
        )
    where = "image" if isinstance(source, bytes | Image.Image) else Path(source)
    try:
        if isinstance(source, Image.Image):
            return _rgb(source, where)
        with (
            BytesIO(source) if isinstance(source, bytes) else _open(Path(source)) as file,
            Image.open(file, formats=FORMATS) as image,
        ):
            return _rgb(image, where)
    except MoecError:
        raise
    except UnidentifiedImageError:
        refuse(
            where,
            "no image, a damaged one, or another format",
            ", ".join(FORMATS),
            "fetch it again, or save it as PNG",
        )
    except Image.DecompressionBombError as error:
        refuse(where, error, "an image within that limit", "scale it down")
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, zlib.error, ...
        refuse(
            where,
            f"does not decode: {str(error) or type(error).__name__}",
            "an undamaged image",
            "fetch it again, or open it in another program and save it as PNG",
        )


def _open(path: Path) -> BinaryIO:
    """`path`, opened; a pipe or device is refused, since opening it may wait for ever."""
    try:
        status = path.stat()
        folder, regular = stat.S_ISDIR(status.st_mode), stat.S_ISREG(status.st_mode)
        if regular and status.st_size:
            return path.open("rb")
        found = "an empty file" if regular else "a folder" if folder else "a pipe or device"
    except OSError as error:
        found = error.strerror or str(error)
    refuse(path, found, "an image file on this machine", "check the path")


def _rgb(image: Image.Image, where: object) -> Image.Image:
    """A copy of `image` in mode RGB, upright."""
    if 0 in image.size:
        refuse(where, f"{image.size} pixels", "at least one pixel", "check the image")
    upright = ImageOps.exif_transpose(image)  # a copy, without the format and tags of `image`
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        upright = _high_byte(upright, image)
    elif image.mode in ("I", "F"):
        refuse(
            where,
            f"32-bit samples (mode {image.mode}), of unknown range",
            "8 or 16 bits a sample",
            "scale them to 8 bits and save as PNG",
        )
    elif "A" in upright.getbands() or upright.info.get("transparency") is not None:
        white = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(white, _in(upright, "RGBA"))
    return _in(upright, "RGB")


def _in(image: Image.Image, mode: str) -> Image.Image:
    """`image` in `mode`; itself if it is, where Pillow's own would copy it (400 MB of 100 MP)."""
    return image if image.mode == mode else image.convert(mode)


def _high_byte(upright: Image.Image, image: Image.Image) -> Image.Image:
    """`upright`, which is the 16-bit gray `image`, as 8-bit gray.

    Pillow's own conversion clips: all above 255 turns white. Of TIFF, it also leaves 12-bit samples
    unscaled, and black as it is where the file says that zero is white.
    """
    tags = getattr(image, "tag_v2", {})
    bits, zero_is_white = tags.get(258, (16,))[0], tags.get(262) == 0
    samples = np.asarray(upright)
    gray = (samples >> (bits - 8)).astype(np.uint8)
    if zero_is_white:
        gray = 255 - gray
    clear = upright.info.get("transparency")  # PNG: the one level that is transparent
    if clear is not None:
        gray[samples == clear] = 255
    return Image.fromarray(gray)
