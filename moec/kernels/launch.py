"""What is launched for a layer, as data: kernels, grids, sizes, scratch. No tensor, no torch.

The same description runs under torch, in Triton's interpreter, and compiles ahead of time.
"""

from dataclasses import dataclass, field
from typing import Any

from moec.kernels import moe_decode
from moec.spec.errors import MoecError

#: the most tokens that the kernels for few tokens take
MOST_TOKENS = 64
#: FP8 products that the tensor core adds up before they go to float32: more would cost digits
EXACT = 128
#: name of an argument -> what it points at, or its type, as Triton says it
TYPES = {
    "x": "*bf16",
    "router": "*bf16",
    "logits": "*fp32",
    "codes": "*fp8e4nv",
    "scale": "*fp32",
    "gate_up": "*fp8e4nv",
    "gate_up_scale": "*fp32",
    "act": "*bf16",
    "act_codes": "*fp8e4nv",
    "largest": "*i32",
    "down": "*fp8e4nv",
    "down_scale": "*fp32",
    "parts": "*fp32",
    "arrived": "*i32",
    "out": "*bf16",
    "tokens": "i32",
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """One MoE layer with a shared expert as wide as a routed one; top-1."""

    dim: int
    hidden: int
    experts: int


@dataclass(frozen=True, slots=True)
class Tiles:
    """Outputs a program has, inputs a step has, steps under way, warps; for both products."""

    gate_up_rows: int = 64
    gate_up_depth: int = 256
    gate_up_stages: int = 3
    down_rows: int = 64
    down_depth: int = 128
    down_stages: int = 5
    split: int = 2
    warps: int = 4


#: tokens at most -> tiles that were fastest
TILES = {16: Tiles(), 64: Tiles(gate_up_depth=128, gate_up_stages=5)}


def tiles_for(tokens: int) -> Tiles:
    """The tiles for so many tokens."""
    return next((tiles for most, tiles in TILES.items() if tokens <= most), Tiles())


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


def scratch(sizes: Sizes, tokens: int, tiles: Tiles) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and element type of what the launches write; `arrived` must be zero at first."""
    return {
        "logits": ((tokens, sizes.experts), "fp32"),
        "codes": ((tokens, sizes.dim), "fp8e4nv"),
        "scale": ((tokens,), "fp32"),
        "act": ((2 * tokens, sizes.hidden), "bf16"),
        "act_codes": ((2 * tokens, sizes.hidden), "fp8e4nv"),
        "largest": ((2 * tokens,), "i32"),
        "parts": ((2 * tiles.split, tokens, sizes.dim), "fp32"),
        "arrived": ((sizes.dim // tiles.down_rows,), "i32"),
        "out": ((tokens, sizes.dim), "bf16"),
    }


def decode_moe(
    sizes: Sizes, tokens: int, tiles: Tiles | None = None, overlap: bool = False
) -> tuple[Launch, ...]:
    """The launches of one layer for `tokens` rows, one after the other.

    With `overlap` each starts while the one before ends (programmatic dependent launch, sm_90 on).

    Raises:
        MoecError: sizes that the tiles do not divide, or too many tokens.
    """
    tiles = tiles or tiles_for(tokens)
    for name, size, multiple in (
        ("dim", sizes.dim, tiles.gate_up_depth),
        ("dim", sizes.dim, tiles.down_rows),
        ("hidden", sizes.hidden, tiles.gate_up_rows),
        ("hidden", sizes.hidden, tiles.split * tiles.down_depth),
    ):
        if size % multiple or size < multiple:
            raise _refusal(name, size, f"a multiple of {multiple}")
    if not 1 <= tokens <= MOST_TOKENS:
        raise _refusal("tokens", tokens, f"1 to {MOST_TOKENS}")
    by_token = tokens <= sizes.experts
    slots = (tokens if by_token else sizes.experts) + 1
    common = {"DIM": sizes.dim, "EXPERTS": sizes.experts, "OVERLAP": overlap}
    slotted = common | {
        "HIDDEN": sizes.hidden,
        "EXPERTS_2": max(16, _power_of_2(sizes.experts)),
        "TOKENS_2": max(16, _power_of_2(tokens)),
        "BY_TOKEN": by_token,
    }
    options = {"launch_pdl": True} if overlap else {}
    width = min(2048, sizes.hidden & -sizes.hidden)
    return (
        Launch(
            moe_decode.route, (tokens, sizes.experts + 1, 1),
            ("x", "router", "logits", "codes", "scale", "largest", "tokens"),
            common | {"DIM_2": _power_of_2(sizes.dim)}, warps=8, options=options,
        ),
        Launch(
            moe_decode.gate_up, (sizes.hidden // tiles.gate_up_rows, slots, 1),
            ("logits", "codes", "scale", "gate_up", "gate_up_scale", "act", "largest", "tokens"),
            slotted | _product(tiles.gate_up_rows, tiles.gate_up_depth),
            tiles.warps, tiles.gate_up_stages, options,
        ),
        Launch(
            moe_decode.encode, (2 * tokens, sizes.hidden // width, 1),
            ("act", "largest", "act_codes"),
            {"HIDDEN": sizes.hidden, "OVERLAP": overlap, "WIDTH": width}, warps=4, options=options,
        ),
        Launch(
            moe_decode.down, (sizes.dim // tiles.down_rows, slots, tiles.split),
            (
                "logits", "act_codes", "largest", "down", "down_scale", "parts", "arrived", "out",
                "tokens",
            ),
            slotted | _product(tiles.down_rows, tiles.down_depth) | {"SPLIT": tiles.split},
            tiles.warps, tiles.down_stages, options,
        ),
    )  # fmt: skip


def _product(rows: int, depth: int) -> dict[str, int]:
    return {"ROWS": rows, "DEPTH": depth, "EXACT": min(EXACT, depth)}


def _power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _refusal(name: str, found: object, expected: str) -> MoecError:
    return MoecError(f"decode_moe: {name}", found, expected, "use the eager op moec::fp8_moe")
