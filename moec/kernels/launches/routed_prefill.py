"""The launches of an MoE layer of any routing for many tokens, as data."""

from typing import Any

from moec.kernels.launches.launch import TYPES, Buffers, Launch, power_of_2
from moec.kernels.launches.prefill import PORTABLE, Product, Tiles, product
from moec.kernels.launches.routed import check_layer
from moec.kernels.launches.routing import choose, score
from moec.kernels.sizes import PLAIN, RoutedSizes
from moec.kernels.triton import blocks_prefill, routed_prefill
from moec.spec.errors import refuse

#: tokens of a block that is counted, and counted blocks of a step
BLOCK, STEP = 16, 64
#: those of an H100 or H200
TILES = Tiles()


def most_tiles(sizes: RoutedSizes, tokens: int, rows: int) -> int:
    """The most tiles of `rows` rows that `tokens` tokens need, however they are routed."""
    chosen = tokens * sizes.top_k
    routed = min((chosen + sizes.experts * (rows - 1)) // rows, chosen)
    return sizes.shared * -(-tokens // rows) + routed


def _scratch(sizes: RoutedSizes, tokens: int, tiles: Tiles) -> Buffers:
    """Shape and element type of what the launches write; none of it needs initial values."""
    many, block = most_tiles(sizes, tokens, tiles.rows), sizes.block
    rows = many * tiles.rows

    def scales(rows: int, width: int) -> tuple[int, ...]:
        return (rows, width // block) if block else (rows,)

    shapes: dict[str, tuple[int, ...]] = {
        "logits": (1, tokens, sizes.experts),
        "codes": (tokens, sizes.dim),
        "scale": scales(tokens, sizes.dim),
        "present": (sizes.experts,),
        "largest": (0,),
        "chosen": (tokens, sizes.slots),
        "score": (tokens, sizes.slots),
        "counts": (-(-tokens // BLOCK), sizes.experts),
        "earlier": (-(-tokens // BLOCK), sizes.experts),
        "totals": (sizes.experts,),
        "plan": (1 + 2 * many,),
        "rows": (rows, sizes.dim),
        "row_scale": scales(rows, sizes.dim),
        "place": (tokens, sizes.slots),
        "act": (rows, sizes.hidden),
        "act_codes": (rows, sizes.hidden),
        "act_scale": scales(rows, sizes.hidden),
        "products": (rows, sizes.dim),
        "out": (tokens, sizes.dim),
    }
    return {name: (shape, TYPES[name][1:]) for name, shape in shapes.items()}


def fits(sizes: RoutedSizes) -> bool:
    """Whether the tiles divide a layer of these sizes, on every GPU."""
    return sizes.dim % 256 == 0 and sizes.hidden % 128 == 0


def routed_prefill_moe(
    sizes: RoutedSizes, tokens: int, tiles: Tiles = TILES
) -> tuple[tuple[Launch, ...], Buffers]:
    """The launches of one layer for `tokens` rows, one after the other, and what they write.

    Raises:
        MoecError: sizes that the tiles do not divide, too many experts, or scores that weigh the
            experts' inputs.
    """
    check_layer("routed_prefill_moe", sizes)
    if tokens < 1:
        refuse("routed_prefill_moe: tokens", tokens, "at least 1", PLAIN)
    first, last = _cuts(sizes, tiles)
    for name, size, multiple in (
        ("dim", sizes.dim, first.depth),
        ("dim", sizes.dim, last.columns if sizes.block else 2 * last.columns),
        ("hidden", sizes.hidden, first.columns),
        ("hidden", sizes.hidden, last.depth),
    ):
        if size % multiple or size < multiple:
            refuse(f"routed_prefill_moe: {name}", size, f"a multiple of {multiple}", PLAIN)
    return _launches(sizes, tokens, tiles, first, last), _scratch(sizes, tokens, tiles)


def _cuts(sizes: RoutedSizes, tiles: Tiles) -> tuple[Product, Product]:
    """How both products are tiled: with blocks, a step is a block."""
    if not sizes.block:
        return tiles.gate_up, tiles.down
    cut = Product(PORTABLE.columns, sizes.block, PORTABLE.stages)
    return cut, cut


def _launches(
    sizes: RoutedSizes, tokens: int, tiles: Tiles, first: Product, last: Product
) -> tuple[Launch, ...]:
    blocks, many = -(-tokens // BLOCK), most_tiles(sizes, tokens, tiles.rows)
    experts = {"EXPERTS": sizes.experts, "EXPERTS_2": max(16, power_of_2(sizes.experts))}
    slots = {"TOP_K": sizes.top_k, "SHARED": sizes.shared}
    scales = sizes.dim // sizes.block if sizes.block else 1
    return (
        score(sizes, tokens, 16 if tokens < 64 else 64, 1, False),
        choose(sizes, tokens, 1, False),
        Launch(
            routed_prefill.count,
            (blocks, 1, 1),
            ("chosen", "counts", "tokens"),
            {**experts, **slots, "BLOCK": BLOCK},
            warps=4,
        ),
        Launch(
            routed_prefill.before,
            (-(-sizes.experts // 16), 1, 1),
            ("counts", "earlier", "totals", "blocks"),
            {"EXPERTS": sizes.experts, "STEP": STEP},
            warps=4,
        ),
        Launch(
            routed_prefill.plan,
            (many, 1, 1),
            ("totals", "plan", "tokens"),
            {**experts, "SHARED": sizes.shared, "TILE": tiles.rows},
            warps=1,
        ),
        Launch(
            routed_prefill.arrange,
            (blocks, 1, 1),
            ("chosen", "earlier", "totals", "place", "tokens"),
            {**experts, **slots, "TILE": tiles.rows, "BLOCK": BLOCK},
            warps=8,
        ),
        Launch(
            routed_prefill.spread,
            (tokens, sizes.slots, 1),
            ("codes", "scale", "place", "rows", "row_scale"),
            {
                "DIM": sizes.dim,
                "DIM_2": power_of_2(sizes.dim),
                "SCALES": scales,
                "SCALES_2": power_of_2(scales),
            },
            warps=4,
        ),
        _product("gate_up", sizes, tiles, first),
        Launch(
            routed_prefill.encode,
            (many * tiles.rows, 1, 1),
            ("act", "plan", "act_codes", "act_scale"),
            {
                "HIDDEN": sizes.hidden,
                "HIDDEN_2": power_of_2(sizes.hidden),
                "TILE": tiles.rows,
                "BLOCK": sizes.block,
            },
            warps=4,
        ),
        _product("down", sizes, tiles, last),
        Launch(
            routed_prefill.combine,
            (tokens, 1, 1),
            ("products", "place", "score", "out"),
            {"DIM": sizes.dim, "DIM_2": power_of_2(sizes.dim), "SLOTS": sizes.slots},
            warps=8,
        ),
    )


#: product -> its arguments
ARGUMENTS = {
    "gate_up": ("rows", "row_scale", "plan", "gate_up", "gate_up_scale", "act"),
    "down": ("act_codes", "act_scale", "plan", "down", "down_scale", "products"),
}


def _product(name: str, sizes: RoutedSizes, tiles: Tiles, cut: Product) -> Launch:
    if not sizes.block:
        return product(name, ARGUMENTS[name], sizes, tiles, cut)
    constants: dict[str, Any] = {
        "DIM": sizes.dim,
        "HIDDEN": sizes.hidden,
        "TILE": tiles.rows,
        "COLUMNS": cut.columns,
        "DEPTH": cut.depth,
        "GROUP": cut.group,
    }
    kernel = getattr(blocks_prefill, name)
    grid = (tiles.programs, 1, 1)
    return Launch(kernel, grid, ARGUMENTS[name], constants, 8, cut.stages)
