"""Read an image file as 8-bit RGB pixels, upright and on a white background.

Pillow decodes the file. Colour profiles are ignored. If a file has several frames or pages, the
first one counts.
"""

import os
import warnings
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from moec.spec.bounded.limits import IMAGE_FILE, PIXELS
from moec.spec.bounded.read import open_file
from moec.spec.bounded.worker import shared
from moec.spec.errors import MoecError, refuse

#: The formats that Pillow may try. By default it tries about forty, with EPS among them, for which
#: it starts ghostscript. JPEG includes MPO, the file of several pictures that phone cameras write.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
#: rows that are converted at once
_STRIP = 256


def read_image(source: str | Path | bytes | Image.Image) -> Image.Image:
    """Read the picture in `source`, which is a path, a file's bytes, or a Pillow image.

    The result is a Pillow image of mode RGB. The EXIF orientation is applied. Transparent pixels
    are blended with white. 16-bit samples keep their high byte. A given Pillow image is not
    changed.

    A child process decodes paths and bytes, because a small file may take all memory.

    Raises:
        MoecError: there is no such file; it is damaged or not of one of `FORMATS`; it has more than
            67 million pixels; it takes over 8 s or 1 GiB to decode; or its samples have no known
            range (32-bit integers, floats).
    """
    if isinstance(source, Image.Image):
        try:
            _check_pixels(source, "image", _most())
            return _rgb(source.copy(), "image")
        except MoecError:
            raise
        except Exception as error:  # an image that its owner has not loaded yet
            _damaged("image", error)
    if not isinstance(source, str | Path | bytes):
        refuse(
            "image",
            f"{type(source).__name__}",
            "a path, a file's bytes, or a Pillow image",
            "open files and arrays with Pillow (Image.open, Image.fromarray)",
        )
    data, path, where = b"", "", "image"
    if isinstance(source, bytes):
        data = source
    else:
        where = str(Path(source))
        _open(Path(source), where).close()
        path = os.path.abspath(source)
    size, pixels = shared().ask(
        f"{__name__}:decode",
        {"path": path, "where": where, "most": _most()},
        data,
        where=where,
        what="decode the image",
        next_step="scale the image down, and save it as PNG",
    )
    return Image.frombytes("RGB", tuple(size), pixels)


def _most() -> int:
    """The most pixels: `PIXELS`, or the limit of Pillow if the user has set a lower one."""
    return min(PIXELS, 2 * (Image.MAX_IMAGE_PIXELS or PIXELS))


def decode(data: bytes, path: str, where: str, most: int) -> tuple[tuple[int, int], bytearray]:
    """Decode the image file `path`, or else `data`: its (width, height), and its RGB bytes.

    `where` stands for the image in messages, and `most` is the most pixels.

    Raises:
        MoecError: see `read_image`.
    """
    Image.MAX_IMAGE_PIXELS = None  # `_check_pixels` does this, with a limit of ours
    warnings.simplefilter("ignore")
    try:
        with (
            _open(Path(path), where) if path else BytesIO(data) as file,
            Image.open(file, formats=FORMATS) as image,
        ):
            _check_pixels(image, where, most)
            return _bytes(_rgb(image, where))
    except (MoecError, MemoryError):
        raise
    except UnidentifiedImageError:
        refuse(
            where,
            "no image, a damaged one, or another format",
            f"an image of one of the formats {', '.join(FORMATS)}",
            "download the file again, or save it as PNG",
        )
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, zlib.error, ...
        _damaged(where, error)


def _open(path: Path, where: str) -> BinaryIO:
    file = open_file(path, IMAGE_FILE, "an image file on this machine", where=where)
    if not os.fstat(file.fileno()).st_size:
        file.close()
        refuse(where, "an empty file", "an image file on this machine", "check the path")
    return file


def _check_pixels(image: Image.Image, where: str, most: int) -> None:
    width, height = image.size
    if not width * height:
        refuse(where, f"{image.size} pixels", "at least one pixel", "give another image")
    if width * height > most:
        refuse(
            where,
            f"{width * height} pixels ({width} x {height})",
            f"an image within the limit of {most} pixels",
            "scale the image down",
        )


def _damaged(where: str, error: Exception) -> NoReturn:
    refuse(
        where,
        f"does not decode: {str(error) or type(error).__name__}",
        "an undamaged image",
        "download the file again, or open it in another program and save it as PNG",
    )


def _bytes(image: Image.Image) -> tuple[tuple[int, int], bytearray]:
    """The size and the bytes of an RGB image, strip by strip: Pillow would make two copies."""
    width, height = image.size
    out = bytearray(3 * width * height)
    for top in range(0, height, _STRIP):
        strip = image.crop((0, top, width, min(top + _STRIP, height))).tobytes()
        out[3 * width * top : 3 * width * top + len(strip)] = strip
    return image.size, out


def _rgb(image: Image.Image, where: object) -> Image.Image:
    """`image` in mode RGB, upright; it may change `image`."""
    upright = image
    ImageOps.exif_transpose(image, in_place=True)
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
        return _on_white(upright)
    return _in(upright, "RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """Blend a transparent image with white, strip by strip, because each copy takes memory."""
    out = Image.new("RGB", image.size)
    width, height = image.size
    for top in range(0, height, _STRIP):
        strip = image.crop((0, top, width, min(top + _STRIP, height)))
        white = Image.new("RGBA", strip.size, "white")
        out.paste(Image.alpha_composite(white, _in(strip, "RGBA")).convert("RGB"), (0, top))
    return out


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
