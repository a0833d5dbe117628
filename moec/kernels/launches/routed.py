"""The launches of an MoE layer of any routing for few tokens, as data."""

from dataclasses import dataclass
from typing import Any

from moec.kernels.launches import routed_one
from moec.kernels.launches.few_tokens import HOPPER
from moec.kernels.launches.launch import Buffers, Launch, early, fit, power_of_2
from moec.kernels.launches.routing import ONE_BY_ONE, choices, maxima_of, places_of, score, split_of
from moec.kernels.sizes import MOST_TOKENS, PLAIN, SMALLEST, RoutedSizes
from moec.kernels.triton import routed_decode
from moec.spec.errors import refuse

#: the most experts among which a program chooses
MOST_EXPERTS = 256
#: the side of blocks that have a scale
BLOCK = 128
#: more tokens than `MOST_TOKENS` are few if experts serve at most so many each, up to a limit
EACH, MOST_FEW = 8, 256


@dataclass(frozen=True, slots=True)
class Product:
    """How a product is tiled: outputs of a program, inputs of a step, steps under way, warps.

    `exact` is how many FP8 products the tensor core adds up before the sum goes to float32; None:
    all of them.
    """

    rows: int = 64
    depth: int = 128
    stages: int = 5
    warps: int = 4
    exact: int | None = 128


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tiles of each product, and the most assignments of an expert at a time."""

    gate_up: Product = Product()
    down: Product = Product(exact=None)
    columns: int = 16
    one: routed_one.One | None = None


#: the tiles that were fastest on an H200
TILES = Tiles()


def routed_moe(
    sizes: RoutedSizes, tokens: int, architecture: int = 0, tiles: Tiles = TILES
) -> tuple[tuple[Launch, ...], Buffers]:
    """The launches of one layer for `tokens` rows, one after the other, and what they write.

    From sm_90 on each launch starts while the previous one ends (programmatic dependent launch).

    Raises:
        MoecError: sizes that the tiles do not divide, too many tokens or experts, or scores that
            weigh the experts' inputs.
    """
    overlap = architecture >= HOPPER
    check_layer("routed_moe", sizes)
    if not 1 <= tokens <= most_tokens(sizes):
        refuse("routed_moe: tokens", tokens, f"1 to {most_tokens(sizes)}", PLAIN)
    products = (
        routed_one.products(sizes, architecture, tiles.one)
        if tokens == 1
        else _few(sizes, tokens, tiles, overlap)
    )
    split, rows = split_of(sizes, tokens), 1 if tokens <= ONE_BY_ONE else 16
    found = (
        score(sizes, tokens, rows, split, overlap),
        *choices(sizes, tokens, split, overlap),
        *products,
    )
    used = {name for each in found for name in each.arguments}
    return found, {name: each for name, each in _scratch(sizes, tokens).items() if name in used}


def most_tokens(sizes: RoutedSizes) -> int:
    """The most tokens for which the kernels for few tokens are faster than those for many."""
    return max(MOST_TOKENS, min(MOST_FEW, EACH * sizes.experts // sizes.top_k))


def unfit(sizes: RoutedSizes) -> tuple[str, object, str] | None:
    """What of a layer no kernel of this family takes: its name, its value, and what is taken."""
    for name, size in (("dim", sizes.dim), ("hidden", sizes.hidden)):
        each = max(SMALLEST, sizes.block)
        if size % each or size < each:
            return name, size, f"a multiple of {each}"
    if sizes.block not in (0, BLOCK):
        return "block", sizes.block, f"{BLOCK}, or 0 for none"
    if sizes.experts > MOST_EXPERTS:
        return "experts", sizes.experts, f"at most {MOST_EXPERTS}"
    if sizes.routing.weighed != "output":
        return "weighed", sizes.routing.weighed, "output"
    return None


def check_layer(where: str, sizes: RoutedSizes) -> None:
    """Refuse a layer that is `unfit`."""
    found = unfit(sizes)
    if found:
        name, value, expected = found
        refuse(f"{where}: {name}", value, expected, PLAIN)


def _scratch(sizes: RoutedSizes, tokens: int) -> Buffers:
    """Shape and element type of what the launches write."""
    rows, block = tokens * sizes.slots, sizes.block

    def scales(rows: int, width: int) -> tuple[int, ...]:
        return (rows, width // block) if block else (rows,)

    return {
        "logits": ((split_of(sizes, tokens), tokens, sizes.experts), "fp32"),
        "codes": ((tokens, sizes.dim), "fp8e4nv"),
        "scale": (scales(tokens, sizes.dim), "fp32"),
        "chosen": ((tokens, sizes.slots), "i32"),
        "score": ((tokens, sizes.slots), "fp32"),
        "present": ((sizes.experts,), "i32"),
        "plan": ((_slots(sizes, tokens), 2), "i32"),
        "place": ((_slots(sizes, tokens), places_of(tokens)), "i32"),
        "largest": ((maxima_of(sizes, tokens),), "i32"),
        "act": ((rows, sizes.hidden), "bf16"),
        "act_codes": ((rows, sizes.hidden), "fp8e4nv"),
        "act_scale": (scales(rows, sizes.hidden), "fp32"),
        "parts": ((rows, sizes.dim), "fp32"),
        "out": ((tokens, sizes.dim), "bf16"),
    }


def _slots(sizes: RoutedSizes, tokens: int) -> int:
    """The most experts that tokens can go through, the shared ones included."""
    return sizes.shared + min(sizes.experts, tokens * sizes.top_k)


def _few(sizes: RoutedSizes, tokens: int, tiles: Tiles, overlap: bool) -> tuple[Launch, ...]:
    width = fit(sizes.dim, 512)
    hidden_2 = power_of_2(sizes.hidden)
    return (
        _product(
            routed_decode.gate_up,
            ("codes", "scale", "gate_up", "gate_up_scale", "act"),
            sizes,
            tokens,
            tiles.gate_up,
            (sizes.hidden, sizes.dim),
            tiles.columns,
            overlap,
        ),
        Launch(
            routed_decode.encode,
            (tokens * sizes.slots, 1, 1),
            ("act", "act_codes", "act_scale"),
            {
                "HIDDEN": sizes.hidden,
                "HIDDEN_2": hidden_2,
                "BLOCK": sizes.block,
                "OVERLAP": overlap,
            },
            warps=4,
            options=early(overlap),
        ),
        _product(
            routed_decode.down,
            ("act_codes", "act_scale", "down", "down_scale", "parts"),
            sizes,
            tokens,
            tiles.down,
            (sizes.dim, sizes.hidden),
            tiles.columns,
            overlap,
        ),
        Launch(
            routed_decode.combine,
            (tokens, sizes.dim // width, 1),
            ("parts", "score", "out"),
            {"DIM": sizes.dim, "WIDTH": width, "SLOTS": sizes.slots, "OVERLAP": overlap},
            warps=4,
            options=early(overlap),
        ),
    )


def _product(
    kernel: Any,
    arguments: tuple[str, ...],
    sizes: RoutedSizes,
    tokens: int,
    cut: Product,
    outputs_inputs: tuple[int, int],
    columns: int,
    overlap: bool,
) -> Launch:
    outputs, inputs = outputs_inputs
    rows = fit(outputs, cut.rows)
    depth = sizes.block or fit(inputs, cut.depth)
    return Launch(
        kernel,
        (outputs // rows, _slots(sizes, tokens), 1),
        ("plan", "place", *arguments),
        {
            "DIM": sizes.dim,
            "HIDDEN": sizes.hidden,
            "SLOTS": sizes.slots,
            "PLACES": places_of(tokens),
            "COLUMNS": columns,
            "ROWS": rows,
            "DEPTH": depth,
            "EXACT": cut.exact and min(cut.exact, depth),
            "BLOCK": sizes.block,
            "OVERLAP": overlap,
        },
        cut.warps,
        cut.stages,
        early(overlap),
    )
