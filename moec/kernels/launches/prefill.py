"""The launches of an MoE layer for many tokens, as data."""

from dataclasses import dataclass
from typing import Any

from moec.kernels.hopper import moe_prefill as moe_prefill_hopper
from moec.kernels.launches.launch import TYPES, Buffers, Launch, fit, power_of_2
from moec.kernels.sizes import PLAIN, RoutedSizes, Sizes
from moec.kernels.triton import moe_prefill
from moec.spec.errors import refuse

#: rows of a tile of the Hopper kernels
HOPPER_ROWS = 128


@dataclass(frozen=True, slots=True)
class Product:
    """How a product is tiled: a tile has 2 * columns outputs, a step takes `depth` inputs.

    `stages` is how many steps are under way at once. `group` rows of tiles are computed one after
    the other, so that they find their weights in L2. `chunk`, for Hopper, is how many FP8 products
    the tensor core adds up at most before the sum goes to a total; 0 means all. Results that are
    quantised for the next product need smaller chunks.
    """

    columns: int = 128
    depth: int = 128
    stages: int = 4
    chunk: int = 640
    group: int = 8


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows of a tile, how each product is tiled, and how many programs share the tiles.

    There is one program per multiprocessor. With `hopper` the products are those of
    `moec.kernels.hopper`, for sm_90 only, with tiles of 128 rows.
    """

    rows: int = 128
    gate_up: Product = Product()
    down: Product = Product(chunk=2048)
    programs: int = 132
    hopper: bool = True


#: tiles that compile for every GPU, within the smallest shared memory
PORTABLE = Product(columns=64, depth=64, stages=3)


def tiles_for(architecture: int, programs: int) -> Tiles:
    """The tiles for a compute capability, such as 90, and `programs` multiprocessors."""
    if architecture == 90:
        return Tiles(programs=programs)
    return Tiles(128, PORTABLE, PORTABLE, programs, hopper=False)


def fits(sizes: Sizes) -> bool:
    """Whether the tiles divide a layer of these sizes, on every GPU."""
    return sizes.dim % 256 == 0 and sizes.hidden % 128 == 0


def most_tiles(sizes: Sizes, tokens: int, rows: int) -> int:
    """The most tiles of `rows` rows that `tokens` tokens need, however they are routed."""
    routed = min((tokens + sizes.experts * (rows - 1)) // rows, tokens)
    return -(-tokens // rows) + routed


def scratch(sizes: Sizes, tokens: int, tiles: Tiles) -> Buffers:
    """Shape and element type of what the launches write; none of it needs initial values."""
    many = most_tiles(sizes, tokens, tiles.rows)
    rows = many * tiles.rows
    shapes: dict[str, tuple[int, ...]] = {
        "chosen": (tokens,),
        "score": (tokens,),
        "rows": (rows, sizes.dim),
        "row_scale": (rows,),
        "place": (tokens,),
        "plan": (1 + 2 * many,),
        "act": (rows, sizes.hidden),
        "act_codes": (rows, sizes.hidden),
        "act_scale": (rows,),
        "products": (rows, sizes.dim),
        "out": (tokens, sizes.dim),
    }
    return {name: (shape, TYPES[name][1:]) for name, shape in shapes.items()}


def prefill_moe(sizes: Sizes, tokens: int, tiles: Tiles | None = None) -> tuple[Launch, ...]:
    """The launches of one layer for `tokens` rows, one after the other.

    Raises:
        MoecError: sizes that the tiles do not divide.
    """
    tiles = tiles or Tiles()
    first, last = tiles.gate_up, tiles.down
    for name, size, multiple in (
        ("dim", sizes.dim, first.depth),
        ("dim", sizes.dim, 2 * last.columns),
        ("hidden", sizes.hidden, first.columns),
        ("hidden", sizes.hidden, last.depth),
    ):
        if size % multiple or size < multiple:
            refuse(f"prefill_moe: {name}", size, f"a multiple of {multiple}", PLAIN)
    if tiles.hopper and tiles.rows != HOPPER_ROWS:
        refuse("prefill_moe: rows", tiles.rows, HOPPER_ROWS, PLAIN)
    if tokens < 1:
        refuse("prefill_moe: tokens", tokens, "at least 1", PLAIN)
    many = most_tiles(sizes, tokens, tiles.rows)
    experts = max(16, power_of_2(sizes.experts))
    depth = max(
        16, 8192 // (16 + experts)
    )  # the more experts, the fewer inputs fit in shared memory
    routed = {
        "DIM": sizes.dim,
        "EXPERTS": sizes.experts,
        "EXPERTS_2": experts,
        "BLOCK": 16,
        "WIDTH": fit(sizes.dim, 1024),
    }
    return (
        Launch(
            moe_prefill.route,
            (-(-tokens // 16), 1, 1),
            ("x", "router", "chosen", "score", "rows", "row_scale", "tokens"),
            routed | {"DEPTH": fit(sizes.dim, power_of_2(depth + 1) // 2)},
            warps=8,
        ),
        Launch(
            moe_prefill.arrange,
            (-(-tokens // 16), 1, 1),
            ("chosen", "score", "rows", "row_scale", "place", "plan", "tokens"),
            routed | {"SCAN": 512, "TILE": tiles.rows, "TILES_2": power_of_2(many)},
            warps=8,
        ),
        product(
            "gate_up",
            ("rows", "row_scale", "plan", "gate_up", "gate_up_scale", "act"),
            sizes,
            tiles,
            first,
        ),
        Launch(
            moe_prefill.encode,
            (many * tiles.rows, 1, 1),
            ("act", "plan", "act_codes", "act_scale"),
            {
                "HIDDEN": sizes.hidden,
                "HIDDEN_2": power_of_2(sizes.hidden),
                "TILE": tiles.rows,
            },
            warps=8,
        ),
        product(
            "down",
            ("act_codes", "act_scale", "plan", "down", "down_scale", "products"),
            sizes,
            tiles,
            last,
        ),
        Launch(
            moe_prefill.combine,
            (tokens, 1, 1),
            ("products", "place", "out"),
            {"DIM": sizes.dim, "DIM_2": power_of_2(sizes.dim)},
            warps=8,
        ),
    )


def product(
    name: str, arguments: tuple[str, ...], sizes: Sizes | RoutedSizes, tiles: Tiles, cut: Product
) -> Launch:
    """One product, "gate_up" or "down", of all tiles."""
    inputs = {"gate_up": sizes.dim, "down": sizes.hidden}[name]
    constants: dict[str, Any] = {
        "DIM": sizes.dim,
        "HIDDEN": sizes.hidden,
        "TILE": tiles.rows,
        "COLUMNS": cut.columns,
        "DEPTH": cut.depth,
        "GROUP": cut.group,
    }
    grid = (tiles.programs, 1, 1)
    if tiles.hopper:
        constants |= {"STAGES": cut.stages, "CHUNK": chunk_of(inputs, cut)}
        return Launch(getattr(moe_prefill_hopper, name), grid, arguments, constants, warps=4)
    kernel = getattr(moe_prefill, name)
    return Launch(kernel, grid, arguments, constants, 8, cut.stages)


def chunk_of(inputs: int, cut: Product) -> int:
    """The largest multiple of a step, up to `cut.chunk`, that divides `inputs`; at least a step."""
    steps = inputs // cut.depth
    fits = (each for each in range(steps, 0, -1) if steps % each == 0)
    most = (cut.chunk or inputs) // cut.depth
    return cut.depth * next((each for each in fits if each <= most), 1)
