"""The launch of an FP8 linear layer for many tokens, as data."""

from typing import Any

from moec.kernels.hopper import many_linear as many_linear_hopper
from moec.kernels.launches.launch import Launch, fit
from moec.kernels.launches.prefill import HOPPER_ROWS, Product, chunk_of
from moec.kernels.sizes import PLAIN, SMALLEST
from moec.kernels.triton.prefill import many_linear as many_linear_any
from moec.spec.errors import refuse

#: the architecture that Hopper's kernel is for
HOPPER = 90
#: Hopper's tiles, of 256 and of 128 outputs; the tensor core adds up all inputs, as torch's does
WIDE, NARROW = Product(chunk=0), Product(columns=64, stages=6, chunk=0)
#: tiles of 128 outputs that compile for every GPU, within the smallest shared memory
PORTABLE = Product(columns=64, depth=64, stages=3)


def many_linear(
    width: int,
    dim: int,
    tokens: int,
    architecture: int,
    programs: int = 132,
    cut: Product | None = None,
) -> Launch:
    """Quantised x [tokens, dim] by weight [width, dim], for any number of tokens.

    There is one program per multiprocessor; any number of `programs` gives the same. On sm_90 the
    kernel is Hopper's if steps of 128 inputs divide `dim`. A `cut` must be for the kernel that
    `architecture` has.

    Raises:
        MoecError: a layer that no tiles divide.
    """
    for name, size in (("width", width), ("dim", dim)):
        if size < SMALLEST or size % SMALLEST:
            refuse(f"many_linear: {name}", size, f"a multiple of {SMALLEST}", PLAIN)
    hopper = architecture == HOPPER and dim % 128 == 0
    cut = cut or (cut_for(width, tokens, programs) if hopper else PORTABLE)
    depth = fit(dim, cut.depth)
    constants: dict[str, Any] = {
        "WIDTH": width,
        "DIM": dim,
        "TILE": HOPPER_ROWS,
        "COLUMNS": cut.columns if hopper else 2 * cut.columns,
        "DEPTH": depth,
        "GROUP": cut.group,
    }
    if hopper:
        constants |= {"STAGES": cut.stages, "CHUNK": chunk_of(dim, cut)}
    return Launch(
        (many_linear_hopper if hopper else many_linear_any).many_linear,
        (programs, 1, 1),
        ("codes", "scale", "weight", "weight_scale", "out", "tokens"),
        constants,
        4 if hopper else 8,
        cut.stages,
    )


def cut_for(width: int, tokens: int, programs: int) -> Product:
    """Hopper's tiles: narrow ones where wide ones would leave over a quarter of the time unused.

    Wide tiles read less. But each program computes a whole number of tiles, and the others wait
    for those that have one more.
    """
    tiles = -(-tokens // HOPPER_ROWS) * -(-width // (2 * WIDE.columns))
    rounds = -(-tiles // programs) if programs > 0 else 1
    return NARROW if programs > 0 and 4 * tiles < 3 * rounds * programs else WIDE
