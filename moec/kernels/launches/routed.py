"""The launches of an MoE layer of any routing for few tokens, as data."""

from dataclasses import dataclass
from typing import Any

from moec.kernels.launches.launch import Buffers, Launch, early, fit, power_of_2
from moec.kernels.sizes import MOST_TOKENS, PLAIN, SMALLEST, RoutedSizes
from moec.kernels.triton import choice, routed_decode, routed_one
from moec.spec.errors import refuse
from moec.spec.parts.routing import Routing

#: the most experts among which a program chooses
MOST_EXPERTS = 256
#: the side of blocks that have a scale
BLOCK = 128
#: more tokens than `MOST_TOKENS` are few if experts serve at most so many each, up to a limit
EACH, MOST_FEW = 8, 256
#: the most tokens whose logits are computed one by one, without a tensor core
ONE_BY_ONE = 8


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
class One:
    """How the products for one token are tiled: outputs of a program, inputs of a step, warps.

    `early` experts' weights of `down` are asked for before `gate_up` has ended.
    """

    gate_up_rows: int
    gate_up_warps: int
    depth: int
    down_rows: int
    down_warps: int
    early: int


#: most outputs of an expert's first product -> the tiles for one token that were fastest on an H200
ONE = {1024: One(2, 1, 2048, 2, 1, 8), 2**31: One(2, 2, 1024, 4, 4, 1)}


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tiles of each product, and the most assignments of an expert at a time."""

    gate_up: Product = Product()
    down: Product = Product(rows=128, exact=None)
    columns: int = 16
    one: One | None = None


#: the tiles that were fastest on an H200
TILES = Tiles()


def routed_moe(
    sizes: RoutedSizes, tokens: int, overlap: bool = False, tiles: Tiles = TILES
) -> tuple[tuple[Launch, ...], Buffers]:
    """The launches of one layer for `tokens` rows, one after the other, and what they write.

    With `overlap` each launch starts while the previous one ends (programmatic dependent launch,
    sm_90 and later).

    Raises:
        MoecError: sizes that the tiles do not divide, too many tokens or experts, or scores that
            weigh the experts' inputs.
    """
    check_layer("routed_moe", sizes)
    if not 1 <= tokens <= most_tokens(sizes):
        refuse("routed_moe: tokens", tokens, f"1 to {most_tokens(sizes)}", PLAIN)
    products = (
        _one(sizes, tiles.one or _tiles(sizes), overlap)
        if tokens == 1
        else _few(sizes, tokens, tiles, overlap)
    )
    split = _split(sizes, tokens)
    alone = tokens == 1 and not _is_chosen_apart(sizes)
    choices = () if alone else (choose(sizes, tokens, split, overlap),)
    rows = 1 if tokens <= ONE_BY_ONE else 16
    found = (score(sizes, tokens, rows, split, overlap), *choices, *products)
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
        "logits": ((_split(sizes, tokens), tokens, sizes.experts), "fp32"),
        "codes": ((tokens, sizes.dim), "fp8e4nv"),
        "scale": (scales(tokens, sizes.dim), "fp32"),
        "chosen": ((tokens, sizes.slots), "i32"),
        "score": ((tokens, sizes.slots), "fp32"),
        "present": ((sizes.experts,), "i32"),
        "plan": ((_slots(sizes, tokens), 2), "i32"),
        "place": ((_slots(sizes, tokens), _places(tokens)), "i32"),
        "largest": ((_maxima(sizes, tokens),), "i32"),
        "act": ((rows, sizes.hidden), "bf16"),
        "act_codes": ((rows, sizes.hidden), "fp8e4nv"),
        "act_scale": (scales(rows, sizes.hidden), "fp32"),
        "parts": ((rows, sizes.dim), "fp32"),
        "out": ((tokens, sizes.dim), "bf16"),
    }


def _choice(sizes: RoutedSizes) -> dict[str, Any]:
    """Constants of a program that chooses."""
    routing = sizes.routing
    return {
        "EXPERTS": sizes.experts,
        "GROUPS": routing.groups,
        "GROUPS_2": power_of_2(routing.groups),
        "EACH_2": power_of_2(sizes.experts // routing.groups),
        "TOP_K": sizes.top_k,
        "SCORE": routing.score,
        "CHOICE": _choice_by(routing),
        "BIAS": routing.bias,
        "KEPT": routing.kept_groups,
        "NORMALISE": routing.normalise,
        "FACTOR": routing.factor,
    }


def _choice_by(routing: Routing) -> str:
    """What a program chooses by: a softmax without a bias is in the order of its logits."""
    same = routing.score == "softmax" and not routing.bias and routing.groups == 1
    return "logits" if same else routing.choice


def _is_chosen_apart(sizes: RoutedSizes) -> bool:
    """Whether choosing is so much work that programs for one token do not do it themselves."""
    return _choice_by(sizes.routing) != "logits"


def choose(sizes: RoutedSizes, tokens: int, split: int, overlap: bool) -> Launch:
    """Choose from logits that are the sum of `split` parts."""
    return Launch(
        choice.choose,
        (tokens, 1, 1),
        ("logits", "bias", "chosen", "score", "present", "tokens"),
        {
            **_choice(sizes),
            "SPLIT": split,
            "SHARED": sizes.shared,
            "OVERLAP": overlap,
        },
        warps=1,  # which reduces without a barrier
        options=early(overlap),
    )


def _arrange(sizes: RoutedSizes, tokens: int, overlap: bool) -> Launch:
    return Launch(
        choice.arrange,
        (-(-sizes.experts // 16), 1, 1),
        ("chosen", "present", "plan", "place", "tokens"),
        {
            "TOKENS_2": power_of_2(tokens),
            "EXPERTS": sizes.experts,
            "EXPERTS_2": max(16, power_of_2(sizes.experts)),
            "TOP_K": sizes.top_k,
            "SHARED": sizes.shared,
            "PLACES": _places(tokens),
            "OVERLAP": overlap,
        },
        warps=4,
        options=early(overlap),
    )


def _split(sizes: RoutedSizes, tokens: int) -> int:
    """The parts into which the router's inputs are split."""
    return 1 if tokens <= ONE_BY_ONE else max(1, sizes.dim // fit(sizes.dim, 512) // 2)


def _slots(sizes: RoutedSizes, tokens: int) -> int:
    """The most experts that tokens can go through, the shared ones included."""
    return sizes.shared + min(sizes.experts, tokens * sizes.top_k)


def _places(tokens: int) -> int:
    """The places for the assignments of an expert; one token needs none."""
    return max(16, power_of_2(tokens)) if tokens > 1 else 0


def _maxima(sizes: RoutedSizes, tokens: int) -> int:
    """The largest magnitudes that the products for one token keep."""
    each = sizes.hidden // sizes.block if sizes.block else 1
    return sizes.slots * each if tokens == 1 else 0


def score(sizes: RoutedSizes, tokens: int, rows: int, split: int, overlap: bool) -> Launch:
    """The router's logits in `split` parts, for `rows` tokens a program; the quantised input."""
    columns = fit(sizes.experts, 4) if rows == 1 else min(64, max(16, rows))
    many = -(-sizes.experts // columns)
    return Launch(
        routed_decode.score,
        (-(-tokens // rows), many + rows, split),
        ("x", "router", "logits", "codes", "scale", "present", "largest", "tokens"),
        {
            "DIM": sizes.dim,
            "DIM_2": power_of_2(sizes.dim),
            "EXPERTS": sizes.experts,
            "EXPERTS_2": max(16, power_of_2(sizes.experts)),
            "MAXIMA": _maxima(sizes, tokens),
            "BLOCK": sizes.block,
            "ROWS": rows,
            "COLUMNS": columns,
            "DEPTH": fit(sizes.dim // split, 512 if rows <= 16 else 128),
            "SPLIT": split,
            "OVERLAP": overlap,
        },
        warps=8 if rows == 1 else 4,
        options=early(overlap),
    )


def _tiles(sizes: RoutedSizes) -> One:
    return next(tiles for most, tiles in ONE.items() if sizes.hidden <= most)


def _one(sizes: RoutedSizes, tiles: One, overlap: bool) -> tuple[Launch, ...]:
    layer = {
        "CHOSEN": _is_chosen_apart(sizes),
        "DIM": sizes.dim,
        "HIDDEN": sizes.hidden,
        "BLOCK": sizes.block,
        "OVERLAP": overlap,
    }
    rows, down_rows = fit(sizes.hidden, tiles.gate_up_rows), fit(sizes.dim, tiles.down_rows)
    return (
        Launch(
            routed_one.gate_up,
            (sizes.hidden // rows, sizes.slots, 1),
            (
                "chosen",
                "logits",
                "bias",
                "codes",
                "scale",
                "gate_up",
                "gate_up_scale",
                "act",
                "largest",
            ),
            {**layer, **_choice(sizes), "ROWS": rows, "DEPTH": fit(sizes.dim, tiles.depth)},
            tiles.gate_up_warps,
            options=early(overlap),
        ),
        Launch(
            routed_one.down,
            (sizes.dim // down_rows, 1, 1),
            ("chosen", "score", "logits", "bias", "act", "largest", "down", "down_scale", "out"),
            {
                **layer,
                **_choice(sizes),
                "SHARED": sizes.shared,
                "HIDDEN_2": power_of_2(sizes.hidden),
                "ROWS": down_rows,
                "EARLY": min(tiles.early, sizes.slots),
            },
            tiles.down_warps,
            options=early(overlap),
        ),
    )


def _few(sizes: RoutedSizes, tokens: int, tiles: Tiles, overlap: bool) -> tuple[Launch, ...]:
    width = fit(sizes.dim, 512)
    hidden_2 = power_of_2(sizes.hidden)
    return (
        _arrange(sizes, tokens, overlap),
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
            "PLACES": _places(tokens),
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
