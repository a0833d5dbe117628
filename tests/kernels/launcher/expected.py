"""What a layer's launches must be, from the launches themselves, as torch would run them."""

from collections.abc import Iterator
from math import prod
from typing import Any

from triton import knobs

from moec.kernels.ahead_of_time.compile import Compiled, compile_launch
from moec.kernels.launches import prefill as launch_prefill
from moec.kernels.launches.few_tokens import few_moe
from moec.kernels.launches.launch import Launch
from moec.kernels.sizes import MOST_TOKENS, Sizes

MULTIPROCESSORS = 132
#: of the layers under test; the first has kernels for many tokens
SIZES = (Sizes(dim=256, hidden=128, experts=20), Sizes(dim=64, hidden=64, experts=2))
MOST = 600
BYTES = {"fp8e4nv": 1, "bf16": 2, "fp32": 4, "i32": 4}


def launches(
    sizes: Sizes, tokens: int, architecture: int
) -> tuple[tuple[Launch, ...], dict[str, tuple[tuple[int, ...], int]]]:
    """Launches; and shape and bytes of each buffer."""
    if tokens <= MOST_TOKENS:
        found, buffers = few_moe(sizes, tokens, architecture)
    else:
        tiles = launch_prefill.tiles_for(architecture, MULTIPROCESSORS)
        found = launch_prefill.prefill_moe(sizes, tokens, tiles)
        buffers = launch_prefill.scratch(sizes, tokens, tiles)
    return found, {
        name: (shape, prod(shape) * BYTES[kind])
        for name, (shape, kind) in buffers.items()
        if name not in ("out", "total")
    }


def compiled(one: Launch, architecture: int) -> Compiled:
    with knobs.compilation.scope():
        knobs.compilation.disable_line_info = True
        return compile_launch(one, architecture)


def values(
    made: Compiled, sizes: Sizes, tokens: int, buffers: dict[str, tuple[tuple[int, ...], int]]
) -> Iterator[tuple[Any, ...]]:
    """(pointer, name), (number, bytes, value) or (map, name, and all that it is made of)."""
    experts = sizes.experts + 1
    matrices = {
        "gate_up": (experts * 2 * sizes.hidden, sizes.dim),
        "down": (experts * sizes.dim, sizes.hidden),
        **{name: shape for name, (shape, _) in buffers.items()},
    }
    maps = {each.name: each for each in made.maps}
    for each in made.parameters:
        if each.type == "map":
            rows, columns = matrices[each.name]
            cut = maps[each.name]
            tile = cut.rows, cut.columns, cut.swizzle, cut.element, cut.bytes
            yield "map", each.name, rows, columns, *tile
        elif each.type[0] == "*":
            yield "pointer", None if each.name in ("skip", "gain", "total") else each.name
        elif each.name == "tokens":
            yield "number", 4, tokens
        else:
            rows, columns = matrices[each.name]
            of = {"rows": rows, "columns": columns, "row stride": columns, "column stride": 1}
            size = {"i1": 1, "i32": 4, "i64": 8}[each.type]
            yield "number", size, of.get(each.part, 0)
