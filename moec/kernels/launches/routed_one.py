"""The launches of an MoE layer of any routing for one token, as data: its two products."""

from dataclasses import dataclass

from moec.kernels.hopper import routed_one as hopper
from moec.kernels.launches.few_tokens import DEPTH, HOPPER, OPTIONS
from moec.kernels.launches.launch import Launch, early, fit, power_of_2
from moec.kernels.launches.routing import constants_of, is_chosen_apart
from moec.kernels.sizes import RoutedSizes
from moec.kernels.triton import routed_one

#: on Hopper: outputs of a program of `gate_up` and its steps under way; outputs of one of `down`,
#: and the most inputs of which shared memory holds all
GATE_UP_ROWS, GATE_UP_STAGES, DOWN_ROWS, MOST_INPUTS = 32, 12, 8, 1536
#: what one kernel or the other takes of these
_ARGUMENTS = {
    "gate_up": "chosen logits bias codes scale gate_up gate_up_scale act largest",
    "down": "chosen score logits bias act largest down down_scale out",
}


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


def products(
    sizes: RoutedSizes, architecture: int, tiles: One | None = None
) -> tuple[Launch, Launch]:
    """`gate_up` and `down` for one token. With `tiles` given, those for any GPU."""
    if tiles is None and architecture == HOPPER and _fits_the_tensor_core(sizes):
        return _on_tensor_cores(sizes)
    if tiles is None:
        tiles = next(each for most, each in ONE.items() if sizes.hidden <= most)
    overlap = architecture >= HOPPER
    layer = {
        **constants_of(sizes),
        "CHOSEN": is_chosen_apart(sizes),
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
            tuple(_ARGUMENTS["gate_up"].split()),
            {**layer, "ROWS": rows, "DEPTH": fit(sizes.dim, tiles.depth)},
            tiles.gate_up_warps,
            options=early(overlap),
        ),
        Launch(
            routed_one.down,
            (sizes.dim // down_rows, 1, 1),
            tuple(_ARGUMENTS["down"].split()),
            {
                **layer,
                "SHARED": sizes.shared,
                "HIDDEN_2": power_of_2(sizes.hidden),
                "ROWS": down_rows,
                "EARLY": min(tiles.early, sizes.slots),
            },
            tiles.down_warps,
            options=early(overlap),
        ),
    )


def _fits_the_tensor_core(sizes: RoutedSizes) -> bool:
    """Whether a tile takes all of a token's experts at once, and shared memory all their inputs."""
    whole = sizes.hidden % DEPTH == sizes.dim % DEPTH == 0 and sizes.hidden <= MOST_INPUTS
    chooses = is_chosen_apart(sizes) or sizes.routing.groups == 1  # the kernels know no groups
    return whole and chooses and sizes.block == 0 and sizes.slots <= hopper.SLOTS.value


def _on_tensor_cores(sizes: RoutedSizes) -> tuple[Launch, Launch]:
    layer = {
        "DIM": sizes.dim,
        "HIDDEN": sizes.hidden,
        "EXPERTS": sizes.experts,
        "EXPERTS_2": max(32, power_of_2(sizes.experts)),
        "TOP_K": sizes.top_k,
        "CHOSEN": is_chosen_apart(sizes),
        "DEPTH": DEPTH,
    }
    routing = sizes.routing
    return (
        Launch(
            hopper.gate_up,
            (sizes.hidden // GATE_UP_ROWS, sizes.slots, 1),
            tuple(each for each in _ARGUMENTS["gate_up"].split() if each != "bias"),
            {
                **layer,
                "COLUMNS": hopper.SLOTS.value,
                "ROWS": GATE_UP_ROWS,
                "STAGES": GATE_UP_STAGES,
            },
            warps=4,
            options=OPTIONS,
        ),
        Launch(
            hopper.down,
            (sizes.dim // DOWN_ROWS, 1, 1),
            tuple(each for each in _ARGUMENTS["down"].split() if each != "bias"),
            {
                **layer,
                "SHARED": sizes.shared,
                "SCORE": routing.score,
                "NORMALISE": routing.normalise,
                "FACTOR": routing.factor,
                "ROWS": DOWN_ROWS,
            },
            warps=4,
            options=OPTIONS,
        ),
    )
