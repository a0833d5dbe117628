"""What is launched for a layer, as data: kernels, grids, sizes, scratch. No tensor, no torch.

The same description runs under torch, in Triton's interpreter, and compiles ahead of time.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from moec.kernels.sizes import PLAIN, SMALLEST
from moec.kernels.sizes import Sizes as Sizes  # part of what launches are made of
from moec.kernels.triton import moe_decode
from moec.spec.errors import MoecError

#: the most tokens that the kernels for few tokens take
MOST_TOKENS = 64
#: compute capability that kernels are compiled for -> bytes of shared memory of a program
SHARED = {89: 101_376, 90: 232_448, 120: 101_376}
#: name of an argument -> what it points at, or its type, as Triton says it
TYPES = {
    **dict.fromkeys(("x", "router", "act", "out", "skip", "gain", "total", "normed"), "*bf16"),
    **dict.fromkeys(("hidden", "qkv", "q", "key", "value"), "*bf16"),
    **dict.fromkeys(("codes", "gate_up", "act_codes", "down", "weight"), "*fp8e4nv"),
    **dict.fromkeys(("logits", "scale", "gate_up_scale", "down_scale", "weight_scale"), "*fp32"),
    **dict.fromkeys(("parts", "most", "sums", "cos", "sin", "temperature"), "*fp32"),
    "rates": "*fp32",
    **dict.fromkeys(("largest", "last", "chosen", "place", "plan"), "*i32"),
    **dict.fromkeys(("score", "row_scale", "act_scale"), "*fp32"),
    "rows": "*fp8e4nv",
    "products": "*bf16",
    "positions": "*i64",
    **dict.fromkeys(("tokens", "steps", "slots"), "i32"),
}
#: shape and element type of memory that launches write
Buffers = dict[str, tuple[tuple[int, ...], str]]


@dataclass(frozen=True, slots=True)
class Tiles:
    """Outputs a program has, inputs a step has, steps under way, warps; for both products.

    `exact` is how many FP8 products the tensor core adds up before they go to float32; None: all.
    Experts that serve `few` tokens of many get narrower tiles.
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


#: tokens at most -> tiles that were fastest
TILES = {
    2: Tiles(),
    16: Tiles(down_stages=5),
    64: Tiles(gate_up_depth=128, gate_up_stages=4, split=1),
}


def tiles_for(sizes: Sizes, tokens: int) -> Tiles:
    """The tiles for so many tokens, cut to what divides a small layer."""
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


def shared_of(architecture: int) -> int:
    """Bytes of shared memory of a program: of a GPU that nobody compiled for, the least of all."""
    return SHARED.get(architecture, min(SHARED.values()))


def fit(size: int, most: int) -> int:
    """The largest power of 2 that divides `size`, at most `most`."""
    return min(most, size & -size)


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel: `arguments` by name, in order; then constants by the kernel's own names."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: tuple[str, ...]
    constants: dict[str, Any]
    warps: int
    stages: int = 3
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.fn.__name__)


def scratch(sizes: Sizes, tokens: int, tiles: Tiles) -> Buffers:
    """Shape and element type of what the launches write."""
    return {
        "logits": ((tokens, sizes.experts), "fp32"),
        "codes": ((tokens, sizes.dim), "fp8e4nv"),
        "scale": ((tokens,), "fp32"),
        "act": ((2 * tokens, sizes.hidden), "bf16"),
        "act_codes": ((2 * tokens, sizes.hidden), "fp8e4nv"),
        "largest": ((2 * tokens,), "i32"),
        "parts": ((2 * tiles.split, tokens, sizes.dim), "fp32"),
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
    """The launches of one layer for `tokens` rows, one after the other.

    With `eps` its input is the RMS norm of total = x + skip, times gain. Without `combine` the
    result is 2 * split `parts`, for who comes next to add up.

    With `overlap` each starts while the one before ends (programmatic dependent launch, sm_90 on).

    Raises:
        MoecError: sizes that the tiles do not divide, or too many tokens.
    """
    tiles = tiles or tiles_for(sizes, tokens)
    for name, size, multiple in (
        ("dim", sizes.dim, max(SMALLEST, tiles.gate_up_depth)),
        ("dim", sizes.dim, max(SMALLEST, tiles.down_rows)),
        ("hidden", sizes.hidden, max(SMALLEST, tiles.gate_up_rows)),
        ("hidden", sizes.hidden, tiles.split * max(SMALLEST, tiles.down_depth)),
    ):
        if size % multiple or size < multiple:
            raise _refusal(name, size, f"a multiple of {multiple}")
    if not 1 <= tokens <= MOST_TOKENS:
        raise _refusal("tokens", tokens, f"1 to {MOST_TOKENS}")
    by_token = tokens <= sizes.experts
    slots = (tokens if by_token else sizes.experts) + 1
    common = {"DIM": sizes.dim, "EXPERTS": sizes.experts, "OVERLAP": overlap}
    columns = max(16, power_of_2(tokens))
    slotted = common | {
        "HIDDEN": sizes.hidden,
        "EXPERTS_2": max(16, power_of_2(sizes.experts)),
        "TOKENS_2": columns,
        "FEW": tiles.few if columns > tiles.few else 0,
        "BY_TOKEN": by_token,
    }
    options, width = early(overlap), fit(sizes.hidden, 2048)
    route = Launch(
        moe_decode.route,
        (tokens, sizes.experts + 1, 1),
        ("x", "skip", "gain", "total", "router", "logits", "codes", "scale", "largest", "tokens"),
        common | {"DIM_2": power_of_2(sizes.dim), "NORM": eps is not None, "EPS": eps or 0.0},
        warps=8,
        options=options,
    )
    gate_up = Launch(
        moe_decode.gate_up,
        (sizes.hidden // tiles.gate_up_rows, slots, 1),
        ("logits", "codes", "scale", "gate_up", "gate_up_scale", "act", "largest", "tokens"),
        slotted | product(tiles.gate_up_rows, tiles.gate_up_depth, tiles.gate_up_exact),
        tiles.warps,
        tiles.gate_up_stages,
        options,
    )
    encode = Launch(
        moe_decode.encode,
        (2 * tokens, sizes.hidden // width, 1),
        ("act", "largest", "act_codes"),
        {"HIDDEN": sizes.hidden, "OVERLAP": overlap, "WIDTH": width},
        warps=4,
        options=options,
    )
    down = Launch(
        moe_decode.down,
        (sizes.dim // tiles.down_rows, slots, tiles.split),
        ("logits", "act_codes", "largest", "down", "down_scale", "parts", "tokens"),
        slotted
        | product(tiles.down_rows, tiles.down_depth, tiles.down_exact)
        | {"SPLIT": tiles.split},
        tiles.warps,
        tiles.down_stages,
        options,
    )
    columns = fit(sizes.dim, 512)
    total = Launch(
        moe_decode.combine,
        (tokens, sizes.dim // columns, 1),
        ("parts", "out"),
        {"DIM": sizes.dim, "WIDTH": columns, "PARTS": 2 * tiles.split, "OVERLAP": overlap},
        warps=4,
        options=options,
    )
    return (route, gate_up, encode, down, total) if combine else (route, gate_up, encode, down)


def product(rows: int, depth: int, exact: int | None) -> dict[str, int | None]:
    """Constants of a kernel whose programs have `rows` outputs and take `depth` inputs a step."""
    return {"ROWS": rows, "DEPTH": depth, "EXACT": exact and min(exact, depth)}


def early(overlap: bool) -> dict[str, bool]:
    """Triton's options for a launch that may start before the one ahead of it ends."""
    return {"launch_pdl": True} if overlap else {}


def power_of_2(size: int) -> int:
    """The smallest power of 2 that is at least `size`."""
    return 1 << (size - 1).bit_length()


def _refusal(name: str, found: object, expected: str) -> MoecError:
    return MoecError(f"decode_moe: {name}", found, expected, PLAIN)
