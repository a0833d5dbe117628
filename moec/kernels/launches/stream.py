"""What is launched for few tokens on a GPU of some architecture, as data.

On sm_90, for at most 16 tokens, products are those of `stream_hopper`; else those for any GPU.
"""

from dataclasses import dataclass, replace

from moec.kernels.hopper import stream as stream_hopper
from moec.kernels.launches import launch
from moec.kernels.launches import step as launch_step
from moec.kernels.launches.launch import Buffers, Launch, Tiles, power_of_2
from moec.kernels.sizes import Sizes

#: the architecture that has streams, and the most tokens of one
HOPPER, MOST_COLUMNS = 90, 16
#: outputs of a program, and bytes of a row that a step takes
ROWS, DEPTH = 64, 128
#: launches wait beside one another: with more registers for a thread they would not fit
OPTIONS = {"launch_pdl": True, "maxnreg": 64}


@dataclass(frozen=True, slots=True)
class Stream:
    """Steps under way in each product, and the shares of inputs that `down` has.

    A linear layer of at most `few_programs` takes what memory there is: others leave room for the
    attention that comes next.
    """

    linear: int = 14
    linear_few: int = 21
    few_programs: int = 96
    gate_up: int = 11
    down: int = 6
    split: int = 4


def few_linear(
    width: int, dim: int, tokens: int, architecture: int, stream: Stream = Stream()
) -> Launch:
    """x [tokens, dim] by weight [width, dim], for at most 64 tokens.

    Raises:
        MoecError: a layer that no tiles divide.
    """
    few = tokens <= MOST_COLUMNS and architecture == HOPPER
    if not few or width % ROWS or dim % DEPTH:
        room = launch.shared_of(architecture)
        return launch_step.linear(width, dim, tokens, architecture >= HOPPER, room)
    programs = width // ROWS
    stages = stream.linear_few if programs <= stream.few_programs else stream.linear
    return Launch(
        stream_hopper.linear,
        (programs, 1, 1),
        ("codes", "scale", "weight", "weight_scale", "out", "tokens"),
        {"WIDTH": width, "DIM": dim, **_tile(stages)},
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
    stream: Stream = Stream(),
) -> tuple[tuple[Launch, ...], Buffers]:
    """The launches of `launch.decode_moe`, and what of `launch.scratch` they use.

    With `tiles`, those that have some.

    Raises:
        MoecError: sizes that no tiles divide, or too many tokens.
    """
    streams = tiles is None and architecture == HOPPER and _streams(sizes, tokens, stream)
    tiles = tiles or launch.tiles_for(sizes, tokens)
    found = launch.decode_moe(sizes, tokens, tiles, architecture >= HOPPER, eps, combine)
    written = launch.scratch(sizes, tokens, tiles)
    if streams:
        route, _, encode, _, *rest = found
        parts = [
            replace(each, constants={**each.constants, "PARTS": stream.split}) for each in rest
        ]
        found = route, _gate_up(sizes, stream), encode, _down(sizes, stream), *parts
        written["parts"] = ((stream.split, tokens, sizes.dim), "fp32")
    used = {name for each in found for name in each.arguments}
    return found, {name: each for name, each in written.items() if name in used}


def _streams(sizes: Sizes, tokens: int, stream: Stream) -> bool:
    few = tokens <= min(MOST_COLUMNS, sizes.experts)
    inputs = not sizes.dim % DEPTH and not sizes.hidden % (stream.split * DEPTH)
    return few and inputs  # which outputs then are as well


def _gate_up(sizes: Sizes, stream: Stream) -> Launch:
    return Launch(
        stream_hopper.gate_up,
        (sizes.hidden // ROWS, 1, 1),
        ("logits", "codes", "scale", "gate_up", "gate_up_scale", "act", "largest", "tokens"),
        {**_layer(sizes), **_tile(stream.gate_up)},
        warps=4,
        options=OPTIONS,
    )


def _down(sizes: Sizes, stream: Stream) -> Launch:
    return Launch(
        stream_hopper.down,
        (sizes.dim // ROWS, stream.split, 1),
        ("logits", "act_codes", "largest", "down", "down_scale", "parts", "tokens"),
        {**_layer(sizes), "SPLIT": stream.split, **_tile(stream.down)},
        warps=4,
        options=OPTIONS,
    )


def _layer(sizes: Sizes) -> dict[str, int]:
    experts = max(16, power_of_2(sizes.experts))
    return {
        "DIM": sizes.dim,
        "HIDDEN": sizes.hidden,
        "EXPERTS": sizes.experts,
        "EXPERTS_2": experts,
    }


def _tile(stages: int) -> dict[str, int]:
    return {"COLUMNS": MOST_COLUMNS, "ROWS": ROWS, "DEPTH": DEPTH, "STAGES": stages}
