"""The launch that attends from many tokens per sequence, as data."""

from dataclasses import dataclass

from moec.kernels.hopper import attend_many as attend_many_hopper
from moec.kernels.launches.launch import Launch
from moec.kernels.sizes import LARGEST_HEAD, PLAIN, SMALLEST_HEAD, Heads, is_head
from moec.kernels.triton.prefill import attend_many as attend_many_any
from moec.spec.errors import refuse

#: the heads that Hopper's kernel takes
HOPPER_HEADS = (64, 128)
#: the architecture that Hopper's kernel is for, and the base-2 logarithm of e
HOPPER, LOG2_E = 90, 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Cut:
    """A program attends from `rows` tokens to `keys` slots at a time, `stages` of them under way.

    With `hopper` the kernel is that of `moec.kernels.hopper`, for sm_90 only. With `turns` its two
    groups of warps take turns to multiply: one computes weights while the other multiplies.
    """

    rows: int = 128
    keys: int = 64
    stages: int = 3
    warps: int = 8
    hopper: bool = False
    turns: bool = True


#: the cut on Hopper for heads of `HOPPER_HEADS`
FAST = Cut(128, 128, 2, 4, hopper=True)


def cut_for(size: int, architecture: int) -> Cut:
    """How to cut the attention of heads of this size, for a compute capability such as 90."""
    if architecture == HOPPER and size in HOPPER_HEADS:
        return FAST
    if size > 128:
        return Cut(64, 32, 2)
    return Cut() if architecture == HOPPER else Cut(stages=2)


def attend_many(
    heads: Heads,
    batch: int,
    steps: int,
    architecture: int,
    programs: int = 132,
    cut: Cut | None = None,
) -> Launch:
    """Attention of `steps` tokens per sequence over buffers, whose slots a launch is told.

    Hopper's kernel has one program per multiprocessor for each sequence; any number of `programs`
    gives the same. The kernel for any GPU has one for each head and each `Cut.rows` tokens.

    Raises:
        MoecError: heads that the kernels do not take.
    """
    good = is_head(heads.size) and heads.size <= LARGEST_HEAD
    for name, found, fits, expected in (
        ("size", heads.size, good, f"a power of 2, {SMALLEST_HEAD} to {LARGEST_HEAD}"),
        ("heads", heads.heads, not heads.heads % heads.kv_heads, f"multiple of {heads.kv_heads}"),
    ):
        if not fits:
            refuse(f"attend_many: {name}", found, expected, PLAIN)
    cut = cut or cut_for(heads.size, architecture)
    constants = {
        "HEADS": heads.heads,
        "GROUP": heads.heads // heads.kv_heads,
        "SIZE": heads.size,
        "SCALE": heads.size**-0.5 * LOG2_E,
        "ROWS": cut.rows,
        "KEYS": cut.keys,
    }
    if cut.hopper:
        constants |= {"STAGES": cut.stages, "TURNS": cut.turns}
    return Launch(
        (attend_many_hopper if cut.hopper else attend_many_any).attend_many,
        (programs, 1, batch) if cut.hopper else (heads.heads, -(-steps // cut.rows), batch),
        ("q", "key", "value", "last", "out", "steps", "slots"),
        constants,
        cut.warps,
        cut.stages,
    )
