"""The launches for few tokens on a GPU of a given architecture, as data.

On sm_90, for at most 16 tokens, the products are those of `moec.kernels.hopper`, whose weights come
through a pipeline of tiles. Otherwise they are the kernels for any GPU.
"""

from dataclasses import dataclass

from moec.kernels.hopper import linear as linear_hopper
from moec.kernels.hopper import moe_decode as moe_decode_hopper
from moec.kernels.launches import decode, step
from moec.kernels.launches.decode import Tiles
from moec.kernels.launches.launch import Buffers, Launch, power_of_2, shared_of
from moec.kernels.sizes import Sizes

#: the architecture that has pipelines, and the most tokens that one takes
HOPPER, MOST_COLUMNS = 90, 16
#: outputs of a program, and inputs of a step (bytes, as they are FP8)
ROWS, DEPTH = 64, 128
#: launches wait beside one another on a multiprocessor: with more registers they would not fit
OPTIONS = {"launch_pdl": True, "maxnreg": 64}


@dataclass(frozen=True, slots=True)
class Stages:
    """The stages of each product's pipeline, and the `split` of the inputs of `down` (split-k).

    A linear layer of at most `few_programs` programs takes all the shared memory that there is. One
    of more leaves room for the attention kernel, which comes next. A `gate_up` that would have at
    most `half_programs` programs has tiles of half the height in `gate_up_few` stages, and so twice
    as many programs; if even these are as few, it has two groups of them.
    """

    linear: int = 14
    linear_few: int = 21
    few_programs: int = 96
    gate_up: int = 11
    gate_up_few: int = 20
    half_programs: int = 66
    down: int = 6
    split: int = 4


def few_linear(
    width: int, dim: int, tokens: int, architecture: int, stages: Stages = Stages()
) -> Launch:
    """x [tokens, dim] by weight [width, dim], for at most 64 tokens.

    Raises:
        MoecError: a layer that no tiles divide.
    """
    few = tokens <= MOST_COLUMNS and architecture == HOPPER
    if not few or width % ROWS or dim % DEPTH:
        return step.linear(width, dim, tokens, architecture >= HOPPER, shared_of(architecture))
    programs = width // ROWS
    return Launch(
        linear_hopper.linear,
        (programs, 1, 1),
        ("codes", "scale", "weight", "weight_scale", "out", "tokens"),
        {
            "WIDTH": width,
            "DIM": dim,
            **_tile(stages.linear_few if programs <= stages.few_programs else stages.linear),
        },
        warps=4,
        options=OPTIONS,
    )


def few_moe(
    sizes: Sizes,
    tokens: int,
    architecture: int,
    tiles: Tiles | None = None,
    eps: float | None = None,
    combine: bool = True,
    stages: Stages = Stages(),
) -> tuple[tuple[Launch, ...], Buffers]:
    """The launches of `decode.decode_moe`, and the buffers that they write.

    With `tiles` given, the products are those for any GPU.

    Raises:
        MoecError: sizes that no tiles divide, or too many tokens.
    """
    if tiles is None and architecture == HOPPER and _has_pipelines(sizes, tokens, stages):
        parts, products = stages.split, (_gate_up(sizes, stages), _down(sizes, stages))
        found = decode.around(products, sizes, tokens, parts, True, eps, combine)
    else:
        tiles = tiles or decode.tiles_for(sizes, tokens)
        parts, overlap = 2 * tiles.split, architecture >= HOPPER
        found = decode.decode_moe(sizes, tokens, tiles, overlap, eps, combine)
    used = {name for each in found for name in each.arguments}
    written = decode.scratch(sizes, tokens, parts)
    return found, {name: each for name, each in written.items() if name in used}


def _has_pipelines(sizes: Sizes, tokens: int, stages: Stages) -> bool:
    few = 0 < tokens <= min(MOST_COLUMNS, sizes.experts)
    depth, split = DEPTH, stages.split * DEPTH  # multiples of these are multiples of ROWS too
    return few and all(
        size >= each and size % each == 0
        for size, each in ((sizes.dim, depth), (sizes.hidden, split))
    )


def _gate_up(sizes: Sizes, stages: Stages) -> Launch:
    rows = ROWS // 2 if sizes.hidden // ROWS <= stages.half_programs else ROWS
    programs = sizes.hidden // rows
    groups = 2 if programs <= stages.half_programs else 1
    tile = _tile(stages.gate_up if rows == ROWS else stages.gate_up_few, rows)
    return Launch(
        moe_decode_hopper.gate_up,
        (programs, groups, 1),
        ("logits", "codes", "scale", "gate_up", "gate_up_scale", "act", "largest", "tokens"),
        {**_layer(sizes), **tile, "GROUPS": groups},
        warps=4,
        options=OPTIONS,
    )


def _down(sizes: Sizes, stages: Stages) -> Launch:
    return Launch(
        moe_decode_hopper.down,
        (sizes.dim // ROWS, stages.split, 1),
        ("logits", "act_codes", "largest", "down", "down_scale", "parts", "tokens"),
        {**_layer(sizes), "SPLIT": stages.split, **_tile(stages.down)},
        warps=4,
        options=OPTIONS,
    )


def _layer(sizes: Sizes) -> dict[str, int]:
    return {
        "DIM": sizes.dim,
        "HIDDEN": sizes.hidden,
        "EXPERTS": sizes.experts,
        "EXPERTS_2": max(16, power_of_2(sizes.experts)),
    }


def _tile(stages: int, rows: int = ROWS) -> dict[str, int]:
    return {"COLUMNS": MOST_COLUMNS, "ROWS": rows, "DEPTH": DEPTH, "STAGES": stages}
