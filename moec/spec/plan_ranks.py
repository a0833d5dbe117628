"""What it takes that several GPUs share a model: who can, how many must, and what they send.

`moec.spec.sharding` says what each rank has. Rank 0 has the largest part of everything, so a plan
for several GPUs is that of rank 0: the plan of the spec with its sizes.
"""

import math
from collections.abc import Callable, Iterator

from moec.spec.errors import MoecError, refuse
from moec.spec.model import ModelSpec, TextSpec
from moec.spec.parameters import text_parameters
from moec.spec.sharding import OWNED_ROWS, Rank, check_ranks, cut_of, local

#: the numbers of GPUs among which `least_gpus` looks for the smallest
COUNTS = (1, 2, 4, 8)
#: sums over ranks in a layer: after attention, and after the dense layer or the experts
_SUMS_IN_LAYER = 2
#: bytes that are sent for a bf16 value of a sum: a word of 8 holds two, and the number of the call
_SUMMED = 4
#: bytes that are sent for a logit, in bf16
_GATHERED = 2


def largest(spec: ModelSpec, gpus: int) -> ModelSpec:
    """`spec` with the sizes of the rank that needs most."""
    return local(spec, Rank(0, gpus))


def check_shared(spec: ModelSpec, precision: str, gpus: int) -> None:
    """Refuse a number of GPUs that cannot share `spec` at `precision`.

    Raises:
        MoecError: fewer GPUs than one, a precision other than fp8, a size that cannot be divided
            among them, or a decoder whose weights the ranks have no parts of.
    """
    if gpus < 1:
        refuse("plan: gpus", gpus, "at least 1", "moec plan --help")
    if gpus == 1:
        return
    if precision != "fp8":
        refuse(
            "plan: gpus",
            f"{gpus}, at {precision}",
            "fp8, whose programs several GPUs can run",
            "add --precision fp8 if the weights are wide, or leave out --gpus",
        )
    check_ranks(spec, gpus)
    for name in _undivided(spec, gpus):
        refuse(
            f"{gpus} GPUs: {name}",
            "a weight that they cannot share",
            "a decoder that target torch has fused programs for",
            "leave out --gpus",
        )


def least_gpus(spec: ModelSpec, precision: str, fits: Callable[[ModelSpec], bool]) -> int | None:
    """The smallest of `COUNTS` whose largest part of `spec` fits one GPU; None: no number does."""
    able = (count for count in COUNTS if _can_share(spec, precision, count))
    return next((count for count in able if fits(largest(spec, count))), None)


def collectives(text: TextSpec, gpus: int) -> int:
    """How many sums and gathers over all GPUs a decode step has.

    They add up the rows of the embedding and the partial sums of each layer, and gather the logits.
    """
    return _sums(text) + 1 if gpus > 1 else 0


def collective_bytes(own: TextSpec, gpus: int, batch: int) -> int:
    """Bytes that a rank with the sizes `own` sends to each other rank in a decode step.

    With many rows on four GPUs, a quarter of a sum's rows goes to each rank, and as many return.
    """
    if gpus == 1:
        return 0
    summed = batch * _sums(own) * own.dim * _SUMMED
    if gpus == 4 and batch >= OWNED_ROWS:
        summed //= 2
    return summed + batch * own.vocab * _GATHERED


def _sums(text: TextSpec) -> int:
    return 1 + _SUMS_IN_LAYER * text.layers


def _can_share(spec: ModelSpec, precision: str, gpus: int) -> bool:
    try:
        check_shared(spec, precision, gpus)
    except MoecError:
        return False
    return True


def _undivided(spec: ModelSpec, gpus: int) -> Iterator[str]:
    """The parameters whose parts are not, together, as many copies as the ranks should have."""
    each = [text_parameters(local(spec, Rank(index, gpus))) for index in range(gpus)]
    for name, shape in text_parameters(spec).items():
        parts = sum(math.prod(own[name]) for own in each)
        if parts != _copies(spec.text, name, gpus) * math.prod(shape):
            yield name


def _copies(text: TextSpec, parameter: str, gpus: int) -> int:
    """How many copies of a parameter all ranks together have."""
    cut = cut_of(parameter)
    if cut is None:
        return gpus
    return max(1, gpus // text.kv_heads) if cut.divided == "kv_heads" else 1
