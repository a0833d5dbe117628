"""Tiles against Hugging Face's own processor, bit for bit, and the settings files."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from transformers.image_utils import SizeDict
from transformers.models.llama4 import image_processing_llama4 as hf

from moec.runtime.inputs.image import read_image
from moec.runtime.inputs.tiling import Tiling, canvas, fitted, read_tiling, tile
from moec.spec.errors import MoecError

PHOTOS = Path(skimage.__file__).parent / "data"
NAMES = """
    astronaut.png coffee.png chelsea.png rocket.jpg retina.jpg hubble_deep_field.jpg camera.png
    page.png cell.png coins.png moon.png text.png ihc.png motorcycle_left.png clock_motion.png
    grass.png color.png logo.png horse.png phantom.png
""".split()


def processor(tiling: Tiling) -> hf.Llama4ImageProcessor:
    return hf.Llama4ImageProcessor(
        size={"height": tiling.side, "width": tiling.side},
        max_patches=tiling.most,
        resize_to_max_canvas=tiling.fill_canvas,
        rescale_factor=tiling.rescale,
        image_mean=list(tiling.mean),
        image_std=list(tiling.std),
    )


def expect_equal(image: Image.Image, tiling: Tiling) -> tuple[int, int]:
    """`tile` must give what the processor gives for `image`, whatever its mode."""
    tiles, grid = tile(read_image(image), tiling)
    expected = processor(tiling)(images=[image], return_tensors="pt")
    pixels: Tensor = expected["pixel_values"]
    assert pixels.dtype == torch.bfloat16 and tiles.dtype == torch.float32
    assert expected["aspect_ratios"].tolist() == [list(grid)], tiling
    assert torch.equal(tiles, pixels.float()), (image, tiling)
    assert tiles.is_contiguous()
    return grid


def photo(name: str, height: int, width: int) -> Image.Image:
    """A real picture, or what of it has this shape: cropped where large enough, else enlarged."""
    image = Image.open(PHOTOS / name)
    if image.height >= height and image.width >= width:
        top, left = (image.height - height) // 2, (image.width - width) // 3
        return image.crop((left, top, left + width, top + height))
    return image.convert("RGB").resize((width, height))


# ---------------------------------------------------------------- pixels

#: (height, width), and the grids without and with `fill_canvas`
SHAPES = {
    (1, 1): ((1, 1), (4, 4)),
    (1, 50): ((1, 1), (1, 16)),
    (50, 1): ((1, 1), (16, 1)),
    (1, 9001): ((1, 16), (1, 16)),
    (97, 89): ((1, 1), (4, 4)),
    (30, 40): ((1, 1), (3, 4)),
    (335, 336): ((1, 1), (4, 4)),
    (336, 336): ((1, 1), (4, 4)),
    (336, 337): ((1, 2), (4, 4)),
    (337, 337): ((2, 2), (4, 4)),
    (100, 1500): ((1, 5), (1, 15)),
    (1500, 100): ((5, 1), (15, 1)),
    (701, 1601): ((3, 5), (3, 5)),
    (1344, 1344): ((4, 4), (4, 4)),
    (1345, 1344): ((4, 4), (4, 4)),
    (1999, 2003): ((4, 4), (4, 4)),
    (2411, 1607): ((5, 3), (5, 3)),
    (6000, 40): ((16, 1), (16, 1)),
}


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_odd_shapes_equal_the_processor(shape: tuple[int, int], fill: bool) -> None:
    name = NAMES[sum(shape) % len(NAMES)]
    assert expect_equal(photo(name, *shape), Tiling(336, fill_canvas=fill)) == SHAPES[shape][fill]


def test_photos_equal_the_processor() -> None:
    for name in NAMES:
        expect_equal(Image.open(PHOTOS / name), Tiling(336))


@pytest.mark.full
@pytest.mark.parametrize("side", [28, 56, 336])
def test_random_shapes_equal_the_processor(side: int) -> None:
    for _ in range(20 if side == 336 else 150):
        seed = random.randrange(2**32)
        rng = random.Random(seed)
        height, width = (int(side ** rng.uniform(0, 1.1) * rng.uniform(1, 4)) for _ in range(2))
        tiling = Tiling(
            side,
            most=rng.randint(1, 16),
            fill_canvas=rng.random() < 0.5,
            rescale=rng.choice([1 / 255, 1 / 256, 0.0037]),
            mean=rng.choice([(0.5, 0.5, 0.5), (0.48145466, 0.4578275, 0.40821073)]),
            std=rng.choice([(0.5, 0.5, 0.5), (0.26862954, 0.26130258, 0.27577711)]),
        )
        print(f"seed {seed}")  # shown if it fails
        expect_equal(photo(rng.choice(NAMES), height, width), tiling)


def clear_palette() -> Image.Image:
    image = Image.open(PHOTOS / "coffee.png").quantize(40)
    image.info["transparency"] = 3
    return image


def half_clear() -> Image.Image:
    image = Image.open(PHOTOS / "chelsea.png").convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


MODES: dict[str, Callable[[], Image.Image]] = {
    "palette": lambda: Image.open(PHOTOS / "coffee.png").quantize(64),
    "palette, one index clear": clear_palette,
    "RGBA": half_clear,
    "LA": lambda: half_clear().convert("LA"),
    "PA": lambda: half_clear().convert("LA").convert("PA"),
    "gray": lambda: Image.open(PHOTOS / "camera.png"),
    "1 bit": lambda: Image.open(PHOTOS / "page.png").convert("1"),
    "CMYK": lambda: Image.open(PHOTOS / "chelsea.png").convert("CMYK"),
    "YCbCr": lambda: Image.open(PHOTOS / "chelsea.png").convert("YCbCr"),
    "HSV": lambda: Image.open(PHOTOS / "chelsea.png").convert("HSV"),
    "GIF": lambda: Image.open(PHOTOS / "no_time_for_that_tiny.gif"),
}


@pytest.mark.parametrize("mode", MODES)
def test_other_modes_equal_the_processor(mode: str) -> None:
    expect_equal(MODES[mode](), Tiling(56))


def test_tiles_go_row_by_row_and_the_whole_image_comes_last() -> None:
    """Four flat quarters: each is a tile, and a quarter of the global tile."""
    levels = torch.tensor([[0, 51], [102, 255]], dtype=torch.uint8)
    image = Image.fromarray(levels.repeat_interleave(8, 0).repeat_interleave(8, 1).numpy())
    tiles, grid = tile(image.convert("RGB"), Tiling(8))
    assert grid == (2, 2) and tiles.shape == (5, 3, 8, 8)
    corners = torch.tensor([-1, -0.6, -0.2, 1])
    assert (tiles[:4] - corners[:, None, None, None]).abs().max() < 0.01
    assert (tiles[4, :, ::7, ::7].flatten(1) - corners).abs().max() < 0.01


def test_padding_is_black_not_gray() -> None:
    tiles, _ = tile(Image.new("RGB", (8, 4), "white"), Tiling(8))
    assert tiles[0, :, :4].eq(1).all() and tiles[0, :, 4:].eq(-1).all()


# ---------------------------------------------------------------- shapes alone


def hf_shapes(height: int, width: int, tiling: Tiling) -> tuple[tuple[int, int], tuple[int, int]]:
    """The canvas and the resized shape, by the processor's own functions."""
    side = tiling.side
    grids = hf.find_supported_resolutions(
        max_num_chunks=tiling.most, patch_size=SizeDict(height=side, width=side)
    )
    best = hf.get_best_fit((height, width), torch.tensor(grids), tiling.fill_canvas)
    target = best
    if not tiling.fill_canvas:  # an integer or a tensor, which decides the precision that follows
        target = (min(max(height, side), best[0]), min(max(width, side), best[1]))
    tall, wide = hf.get_max_res_without_distortion((height, width), target)
    return (int(best[0]) // side, int(best[1]) // side), (max(int(tall), 1), max(int(wide), 1))


def our_shapes(height: int, width: int, tiling: Tiling) -> tuple[tuple[int, int], tuple[int, int]]:
    grid = canvas(height, width, tiling)
    return grid, fitted(height, width, grid, tiling)


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int]:
    """Any height and width, or close to some grid's proportions, where scales nearly tie."""
    if draw(st.booleans()):
        edge = st.integers(1, draw(st.sampled_from([400, 6000, 100_000])))
        return draw(edge), draw(edge)
    zoom = draw(st.floats(0.01, 8)) * draw(st.sampled_from([28, 336, 100]))
    rows, columns = draw(st.tuples(st.integers(1, 16), st.integers(1, 16)))
    return max(1, round(rows * zoom)), max(1, round(columns * zoom))


tilings = st.builds(
    Tiling, st.sampled_from([28, 56, 336, 7]), most=st.integers(1, 16), fill_canvas=st.booleans()
)


@pytest.mark.full
@settings(max_examples=500, deadline=None)
@given(sizes(), tilings)
def test_shapes_equal_the_processor(size: tuple[int, int], tiling: Tiling) -> None:
    assert our_shapes(*size, tiling) == hf_shapes(*size, tiling)


#: height, width, fill_canvas; the last pixel depends on float32, float64, or which scale wins a tie
EDGES = [
    (2058, 5145, False),
    (2185, 34960, True),
    (14624, 36560, False),
    (19624, 19624, False),
    (640, 1920, True),
    (2562, 2562, False),
    (95, 266, False),
    (316, 79, False),
    (213, 142, False),
    (69, 23, False),
]


@pytest.mark.parametrize(("height", "width", "fill"), EDGES)
def test_the_last_pixel(height: int, width: int, fill: bool) -> None:
    tiling = Tiling(336, fill_canvas=fill)
    assert our_shapes(height, width, tiling) == hf_shapes(height, width, tiling)


# ---------------------------------------------------------------- settings


def finder(folder: Path) -> Callable[[str], Path | None]:
    return lambda name: folder / name if (folder / name).is_file() else None


def write(folder: Path, values: object, name: str = "preprocessor_config.json") -> None:
    (folder / name).write_text(json.dumps(values))


#: as Scout and Maverick were released
RELEASED: dict[str, Any] = {
    "crop_size": None, "data_format": "channels_first", "default_to_square": True, "device": None,
    "do_center_crop": None, "do_convert_rgb": True, "do_normalize": True, "do_rescale": True,
    "do_resize": True, "image_mean": [0.5, 0.5, 0.5], "image_processor_type":
    "Llama4ImageProcessorFast", "image_std": [0.5, 0.5, 0.5], "input_data_format": None,
    "max_patches": 16, "processor_class": "Llama4Processor", "resample": 2,
    "rescale_factor": 0.00392156862745098, "resize_to_max_canvas": False, "return_tensors": None,
    "size": {"height": 336, "width": 336},
}  # fmt: skip
ODD = Tiling(56, 9, True, 1 / 256, (0.4, 0.5, 0.25), (0.5, 0.25, 1.0))


def test_without_files_the_released_models_settings(tmp_path: Path) -> None:
    assert read_tiling(finder(tmp_path), 336) == Tiling(336)
    write(
        tmp_path, {"processor_class": "Llama4Processor", "patch_size": 14}, "processor_config.json"
    )
    assert read_tiling(finder(tmp_path), 28) == Tiling(28), "as transformers 4 wrote it"
    write(tmp_path, RELEASED)
    assert read_tiling(finder(tmp_path), 336) == Tiling(336)
    write(tmp_path, {})
    assert read_tiling(finder(tmp_path), 56) == Tiling(56)


@pytest.mark.parametrize("tiling", [Tiling(336), ODD])
def test_saved_processors_are_read_back(tiling: Tiling, tmp_path: Path) -> None:
    processor(tiling).save_pretrained(tmp_path)
    assert read_tiling(finder(tmp_path), tiling.side) == tiling
    saved = tmp_path / "preprocessor_config.json"
    nested = {
        "image_processor": json.loads(saved.read_text()),
        "processor_class": "Llama4Processor",
    }
    saved.unlink()
    write(tmp_path, nested, "processor_config.json")
    assert read_tiling(finder(tmp_path), tiling.side) == tiling


def test_of_both_files_the_nested_settings_count_as_they_do_for_transformers(
    tmp_path: Path,
) -> None:
    write(tmp_path, RELEASED | {"max_patches": 4})
    write(tmp_path, {"image_processor": RELEASED | {"max_patches": 9}}, "processor_config.json")
    assert hf.Llama4ImageProcessor.from_pretrained(tmp_path).max_patches == 9
    assert read_tiling(finder(tmp_path), 336).most == 9


#: fields put in, and what the message names
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"do_sharpen": True}, "do_sharpen"),
    "size, other": ({"size": {"height": 448, "width": 448}}, "size.height"),
    "size, not square": ({"size": {"height": 336, "width": 448}}, "size.width"),
    "size, a number": ({"size": 336}, "size"),
    "size, other keys": ({"size": {"shortest_edge": 336}}, "size.shortest_edge"),
    "no resize": ({"do_resize": False}, "do_resize"),
    "no rescale": ({"do_rescale": False}, "do_rescale"),
    "no normalisation": ({"do_normalize": False}, "do_normalize"),
    "no RGB": ({"do_convert_rgb": False}, "do_convert_rgb"),
    "switch, a number": ({"do_resize": 1}, "do_resize"),
    "bicubic": ({"resample": 3}, "resample"),
    "patches, none": ({"max_patches": 0}, "max_patches"),
    "patches, many": ({"max_patches": 1025}, "1 to 1024"),
    "patches, text": ({"max_patches": "16"}, "max_patches"),
    "fill, text": ({"resize_to_max_canvas": "no"}, "resize_to_max_canvas"),
    "mean, one": ({"image_mean": 0.5}, "image_mean"),
    "mean, two": ({"image_mean": [0.5, 0.5]}, "three numbers"),
    "mean, text": ({"image_mean": [0.5, 0.5, "0.5"]}, "image_mean"),
    "mean, true": ({"image_mean": [0.5, 0.5, True]}, "image_mean"),
    "mean, NaN": ({"image_mean": [0.5, 0.5, float("nan")]}, "image_mean"),
    "mean, huge": ({"image_mean": [0.5, 0.5, 10**400]}, "image_mean"),
    "std, zero": ({"image_std": [0.5, 0, 0.5]}, "image_std"),
    "std, zero in bfloat16": ({"image_std": [0.5, 0.5, 1e-60]}, "image_std"),
    "rescale, huge": ({"rescale_factor": 1e200}, "rescale_factor"),
    "rescale, infinite": ({"rescale_factor": float("inf")}, "rescale_factor"),
    "rescale, text": ({"rescale_factor": "1/255"}, "rescale_factor"),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_named(name: str, nested: bool, tmp_path: Path) -> None:
    fields, names = BAD[name]
    if nested:
        write(tmp_path, {"image_processor": RELEASED | fields}, "processor_config.json")
    else:
        write(tmp_path, RELEASED | fields)
    with pytest.raises(MoecError) as caught:
        read_tiling(finder(tmp_path), 336)
    error = caught.value
    assert error.exit_code == 2 and len(str(error).splitlines()) == 4
    assert names in str(error) and str(tmp_path) in error.where, error


@pytest.mark.parametrize("text", ["", "[]", "{", '{"image_processor": 3}'])
def test_broken_files(text: str, tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text(text)
    with pytest.raises(MoecError):
        read_tiling(finder(tmp_path), 336)


def test_the_image_given_stays_as_it_was() -> None:
    image = read_image(PHOTOS / "chelsea.png")
    before = np.array(image)
    tile(image, Tiling(336))
    assert np.array_equal(image, before)
