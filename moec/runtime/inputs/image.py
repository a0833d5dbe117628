"""Read an image file as 8-bit RGB pixels, upright and on a white background.

Pillow decodes the file. Colour profiles are ignored. If a file has several frames or pages, the
first one counts.
"""

import stat
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from moec.spec.errors import MoecError, refuse

#: The formats that Pillow may try. By default it tries about forty, with EPS among them, for which
#: it starts ghostscript. JPEG includes MPO, the file of several pictures that phone cameras write.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def read_image(source: str | Path | bytes | Image.Image) -> Image.Image:
    """Read the picture in `source`, which is a path, a file's bytes, or a Pillow image.

    The result is a Pillow image of mode RGB. The EXIF orientation is applied. Transparent pixels
    are blended with white. 16-bit samples keep their high byte. A given Pillow image is not
    changed.

    Raises:
        MoecError: there is no such file; it is damaged or not of one of `FORMATS`; it has more
            pixels than Pillow accepts (179 million); or its samples have no known range (32-bit
            integers, floats).
    """
    if not isinstance(source, str | Path | bytes | Image.Image):
        refuse(
            "image",
            f"{type(source).__name__}",
            "a path, a file's bytes, or a Pillow image",
            "open files and arrays with Pillow (Image.open, Image.fromarray)",
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
            f"an image of one of the formats {', '.join(FORMATS)}",
            "download the file again, or save it as PNG",
        )
    except Image.DecompressionBombError as error:
        refuse(where, error, "an image within that limit", "scale the image down")
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, zlib.error, ...
        refuse(
            where,
            f"does not decode: {str(error) or type(error).__name__}",
            "an undamaged image",
            "download the file again, or open it in another program and save it as PNG",
        )


def _open(path: Path) -> BinaryIO:
    """Open `path`. A pipe or device is refused, because opening it may never return."""
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
        refuse(where, f"{image.size} pixels", "at least one pixel", "give another image")
    upright = ImageOps.exif_transpose(image)  # a copy, without the format and tags of `image`
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        upright = _high_byte(upright, image)
    elif image.mode in ("I", "F"):
        refuse(
            where,
            f"32-bit samples (mode {image.mode}) of unknown range",
            "samples of 8 or 16 bits",
            "scale the samples to 8 bits and save the image as PNG",
        )
    elif "A" in upright.getbands() or upright.info.get("transparency") is not None:
        white = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(white, _in(upright, "RGBA"))
    return _in(upright, "RGB")


def _in(image: Image.Image, mode: str) -> Image.Image:
    """`image` in `mode`, without a copy if it has that mode already.

    Pillow's `convert` would copy it, which takes 400 MB for 100 megapixels.
    """
    return image if image.mode == mode else image.convert(mode)


def _high_byte(upright: Image.Image, image: Image.Image) -> Image.Image:
    """Convert `upright`, a turned copy of the 16-bit gray `image`, to 8-bit gray.

    Pillow's own conversion clips, so that all values above 255 turn white. For TIFF files it also
    does not scale 12-bit samples, and ignores that a file may define zero as white.
    """
    tags = getattr(image, "tag_v2", {})
    bits, zero_is_white = tags.get(258, (16,))[0], tags.get(262) == 0
    samples = np.asarray(upright)
    gray = (samples >> (bits - 8)).astype(np.uint8)
    if zero_is_white:
        gray = 255 - gray
    clear = upright.info.get("transparency")  # PNG: the one gray value that is transparent
    if clear is not None:
        gray[samples == clear] = 255
    return Image.fromarray(gray)
