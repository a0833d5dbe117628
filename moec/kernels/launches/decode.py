"""The launches of an MoE layer for few tokens, as data; kernels for any GPU.

`few_tokens` puts the products of `moec.kernels.hopper` in their place where a GPU has them.
"""

from dataclasses import dataclass, replace

from moec.kernels.launches.launch import Buffers, Launch, early, fit, power_of_2
from moec.kernels.sizes import MOST_TOKENS, PLAIN, SMALLEST, Sizes
from moec.kernels.triton import moe_decode, moe_decode_products
from moec.spec.errors import refuse


@dataclass(frozen=True, slots=True)
class Tiles:
    """How both products are tiled: outputs per program (rows), inputs per step (depth), warps.

    `stages` is how many steps are under way at once, `split` into how many parts the inputs of
    `down` are split (split-k). `exact` is how many FP8 products the tensor core adds up before the
    sum goes to float32; None: all of them. Experts that serve at most `few` tokens get narrower
    tiles.
    """

    gate_up_rows: int = 64
    gate_up_depth: int = 256
    gate_up_stages: int = 3
    down_rows: int = 64
    down_depth: int = 128
    down_stages: int = 7
    split: int = 2
    warps: int = 4
    gate_up_exact: int | None = 128
    down_exact: int | None = None
    few: int = 16


#: most tokens -> the tiles that were fastest
TILES = {
    2: Tiles(),
    16: Tiles(down_stages=5),
    64: Tiles(gate_up_depth=128, gate_up_stages=4, split=1),
}


def tiles_for(sizes: Sizes, tokens: int) -> Tiles:
    """The tiles for this number of tokens, cut to sizes that divide the layer's."""
    best = next((tiles for most, tiles in TILES.items() if tokens <= most), Tiles())
    depth = fit(sizes.hidden, best.split * best.down_depth)
    split = max(1, depth // best.down_depth)
    return replace(
        best,
        gate_up_rows=fit(sizes.hidden, best.gate_up_rows),
        gate_up_depth=fit(sizes.dim, best.gate_up_depth),
        down_rows=fit(sizes.dim, best.down_rows),
        down_depth=depth // split,
        split=split,
    )


def scratch(sizes: Sizes, tokens: int, parts: int) -> Buffers:
    """Shape and element type of what the launches write; `down` writes `parts` partial sums."""
    return {
        "logits": ((tokens, sizes.experts), "fp32"),
        "codes": ((tokens, sizes.dim), "fp8e4nv"),
        "scale": ((tokens,), "fp32"),
        "act": ((2 * tokens, sizes.hidden), "bf16"),
        "act_codes": ((2 * tokens, sizes.hidden), "fp8e4nv"),
        "largest": ((2 * tokens,), "i32"),
        "parts": ((parts, tokens, sizes.dim), "fp32"),
        "out": ((tokens, sizes.dim), "bf16"),
        "total": ((tokens, sizes.dim), "bf16"),
    }


def decode_moe(
    sizes: Sizes,
    tokens: int,
    tiles: Tiles | None = None,
    overlap: bool = False,
    eps: float | None = None,
    combine: bool = True,
) -> tuple[Launch, ...]:
    """The launches of one layer for `tokens` rows, one after the other, as `around` has them.

    Raises:
        MoecError: sizes that the tiles do not divide, or too many tokens.
    """
    tiles = tiles or tiles_for(sizes, tokens)
    _check(sizes, tokens, tiles)
    products = _gate_up(sizes, tokens, tiles, overlap), _down(sizes, tokens, tiles, overlap)
    return around(products, sizes, tokens, 2 * tiles.split, overlap, eps, combine)


def around(
    products: tuple[Launch, Launch],
    sizes: Sizes,
    tokens: int,
    parts: int,
    overlap: bool,
    eps: float | None,
    combine: bool,
) -> tuple[Launch, ...]:
    """The launches of a layer around its two products, of which the second writes `parts`.

    With `eps` the layer's input is the RMS norm of total = x + skip, times gain. Without `combine`
    the result is the partial sums `parts`, which the next launch has to add up.

    With `overlap` each launch starts while the previous one ends (programmatic dependent launch,
    sm_90 and later).
    """
    gate_up, down = products
    found = _route(sizes, tokens, overlap, eps), gate_up, _encode(sizes, tokens, overlap), down
    return (*found, _combine(sizes, tokens, parts, overlap)) if combine else found


def _check(sizes: Sizes, tokens: int, tiles: Tiles) -> None:
    for name, size, multiple in (
        ("dim", sizes.dim, max(SMALLEST, tiles.gate_up_depth)),
        ("dim", sizes.dim, max(SMALLEST, tiles.down_rows)),
        ("hidden", sizes.hidden, max(SMALLEST, tiles.gate_up_rows)),
        ("hidden", sizes.hidden, tiles.split * max(SMALLEST, tiles.down_depth)),
    ):
        if size % multiple or size < multiple:
            refuse(f"decode_moe: {name}", size, f"a multiple of {multiple}", PLAIN)
    if not 1 <= tokens <= MOST_TOKENS:
        refuse("decode_moe: tokens", tokens, f"1 to {MOST_TOKENS}", PLAIN)


def _route(sizes: Sizes, tokens: int, overlap: bool, eps: float | None) -> Launch:
    return Launch(
        moe_decode.route,
        (tokens, sizes.experts + 1, 1),
        ("x", "skip", "gain", "total", "router", "logits", "codes", "scale", "largest", "tokens"),
        {
            "DIM": sizes.dim,
            "EXPERTS": sizes.experts,
            "OVERLAP": overlap,
            "DIM_2": power_of_2(sizes.dim),
            "NORM": eps is not None,
            "EPS": eps or 0.0,
        },
        warps=8,
        options=early(overlap),
    )


def _gate_up(sizes: Sizes, tokens: int, tiles: Tiles, overlap: bool) -> Launch:
    return Launch(
        moe_decode_products.gate_up,
        (sizes.hidden // tiles.gate_up_rows, _slots(sizes, tokens), 1),
        ("logits", "codes", "scale", "gate_up", "gate_up_scale", "act", "largest", "tokens"),
        {
            **_by_slot(sizes, tokens, tiles, overlap),
            **_tile(tiles.gate_up_rows, tiles.gate_up_depth, tiles.gate_up_exact),
        },
        tiles.warps,
        tiles.gate_up_stages,
        early(overlap),
    )


def _encode(sizes: Sizes, tokens: int, overlap: bool) -> Launch:
    width = fit(sizes.hidden, 2048)
    return Launch(
        moe_decode.encode,
        (2 * tokens, sizes.hidden // width, 1),
        ("act", "largest", "act_codes"),
        {"HIDDEN": sizes.hidden, "OVERLAP": overlap, "WIDTH": width},
        warps=4,
        options=early(overlap),
    )


def _down(sizes: Sizes, tokens: int, tiles: Tiles, overlap: bool) -> Launch:
    return Launch(
        moe_decode_products.down,
        (sizes.dim // tiles.down_rows, _slots(sizes, tokens), tiles.split),
        ("logits", "act_codes", "largest", "down", "down_scale", "parts", "tokens"),
        {
            **_by_slot(sizes, tokens, tiles, overlap),
            **_tile(tiles.down_rows, tiles.down_depth, tiles.down_exact),
            "SPLIT": tiles.split,
        },
        tiles.warps,
        tiles.down_stages,
        early(overlap),
    )


def _combine(sizes: Sizes, tokens: int, parts: int, overlap: bool) -> Launch:
    width = fit(sizes.dim, 512)
    return Launch(
        moe_decode.combine,
        (tokens, sizes.dim // width, 1),
        ("parts", "out"),
        {"DIM": sizes.dim, "WIDTH": width, "PARTS": parts, "OVERLAP": overlap},
        warps=4,
        options=early(overlap),
    )


def _slots(sizes: Sizes, tokens: int) -> int:
    """A slot for each token or for each expert, whichever are fewer; and the shared expert's."""
    return min(tokens, sizes.experts) + 1


def _by_slot(sizes: Sizes, tokens: int, tiles: Tiles, overlap: bool) -> dict[str, int]:
    """Constants of a product whose programs each serve one slot."""
    columns = max(16, power_of_2(tokens))
    return {
        "DIM": sizes.dim,
        "EXPERTS": sizes.experts,
        "OVERLAP": overlap,
        "HIDDEN": sizes.hidden,
        "EXPERTS_2": max(16, power_of_2(sizes.experts)),
        "TOKENS_2": columns,
        "FEW": tiles.few if columns > tiles.few else 0,
        "BY_TOKEN": tokens <= sizes.experts,
    }


def _tile(rows: int, depth: int, exact: int | None) -> dict[str, int | None]:
    """Constants of a product whose programs have `rows` outputs and take `depth` inputs a step."""
    return {"ROWS": rows, "DEPTH": depth, "EXACT": exact and min(exact, depth)}
