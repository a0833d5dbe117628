"""How the ranks of one host share a model: tensor parallelism, as data.

A rank is one of several processes, each with a GPU of its own. `PLAN` says what each has a part of:

    embedding, head           rows of the vocabulary
    q, k, v                   heads; each rank has the key/value heads of its query heads
    gate, up                  columns of the width of a dense layer, or of every expert
    o, down                   the inputs that are the rank's own part of the above

All else is on every rank: norms, routers, positions. A product with parts of its inputs gives a
partial sum, which the ranks add up (`moec.graph_builder.passes.fused.shard`). So every rank has the
same residual stream, to the bit, and its router chooses the same experts.

Parts are as equal as the sizes allow. If there are fewer key/value heads than ranks, some ranks
have the same ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from moec.spec import names
from moec.spec.errors import refuse
from moec.spec.model import ModelSpec, TextSpec

#: parts begin at multiples of this, if the size has enough of them: tiles of the kernels fit then
UNIT = 128

#: with so many rows or more, on four GPUs, a row of a sum has a rank that alone adds it up
OWNED_ROWS = 12

#: what is divided: a size of the text model
Divided = Literal["vocab", "heads", "kv_heads", "dense_hidden", "hidden"]


@dataclass(frozen=True, slots=True)
class Rank:
    """One of the processes that share a model: number `index` of `count`."""

    index: int
    count: int


#: a process that has the whole model
ALONE = Rank(0, 1)


class Cut(NamedTuple):
    """What a rank has of a matrix [..., out, in]: a part of an axis, whose size is `divided`.

    The axis may be `repeats` such parts after one another, such as gate and up.
    """

    axis: Literal[-2, -1]
    divided: Divided
    repeats: int = 1


_OUT: Final = -2
_IN: Final = -1
#: a part of a parameter's name -> what each rank has of it; parameters that are not here are whole
PLAN: dict[str, Cut] = {
    names.EMBED_WEIGHT: Cut(_OUT, "vocab"),
    names.HEAD_WEIGHT: Cut(_OUT, "vocab"),
    "attn.q.weight": Cut(_OUT, "heads"),
    "attn.k.weight": Cut(_OUT, "kv_heads"),
    "attn.v.weight": Cut(_OUT, "kv_heads"),
    "attn.o.weight": Cut(_IN, "heads"),
    "ffn.gate.weight": Cut(_OUT, "dense_hidden"),
    "ffn.up.weight": Cut(_OUT, "dense_hidden"),
    "ffn.down.weight": Cut(_IN, "dense_hidden"),
    "moe.shared.gate.weight": Cut(_OUT, "hidden"),
    "moe.shared.up.weight": Cut(_OUT, "hidden"),
    "moe.shared.down.weight": Cut(_IN, "hidden"),
    "moe.gate_up": Cut(_OUT, "hidden", repeats=2),
    "moe.down": Cut(_IN, "hidden"),
    "moe.experts.gate.weight": Cut(_OUT, "hidden"),
    "moe.experts.up.weight": Cut(_OUT, "hidden"),
    "moe.experts.down.weight": Cut(_IN, "hidden"),
}


def cut_of(stored: str) -> Cut | None:
    """What a rank has of a stored tensor, by our name for it; None: all of it.

    Scales of outputs are cut as the outputs are, and have no axis of inputs.
    """
    parameter = names.scaled(stored) if names.is_scale(stored) else stored
    text, _ = names.template(parameter)
    kind = text.removeprefix("layers.{i}.").replace(f"experts.{names.EACH}.", "experts.")
    cut = PLAN.get(kind)
    if cut is not None and names.is_scale(stored):
        return None if cut.axis == _IN else cut
    return cut


def span(text: TextSpec, divided: Divided, rank: Rank) -> tuple[int, int]:
    """Which elements a rank has, from the first up to the last, of an axis that is divided.

    Raises:
        MoecError: the size cannot be divided among so many ranks.
    """
    if divided in ("heads", "kv_heads"):
        start, stop = _heads(text, rank)[divided]
        return start * text.head_dim, stop * text.head_dim
    return _share(divided, _sizes(text)[divided], rank)


def local(spec: ModelSpec, rank: Rank) -> ModelSpec:
    """`spec` with the sizes that a rank has; nothing of it changes for a process alone.

    Raises:
        MoecError: a size cannot be divided among so many ranks.
    """
    if rank.count == 1:
        return spec
    text = spec.text
    heads: dict[Any, int] = {
        name: stop - start for name, (start, stop) in _heads(text, rank).items()
    }
    widths: dict[Any, int] = {
        name: length(_share(name, size, rank)) for name, size in _sizes(text).items()
    }
    experts = text.experts
    if experts:
        hidden = widths.pop("hidden")
        shared = None if experts.shared_hidden is None else hidden
        experts = experts.model_copy(update={"hidden": hidden, "shared_hidden": shared})
    text = text.model_copy(update={**heads, **widths, "experts": experts})
    return spec.model_copy(update={"text": text})


def check_ranks(spec: ModelSpec, count: int) -> None:
    """Refuse a number of ranks that cannot share `spec`.

    Raises:
        MoecError: says which size cannot be divided.
    """
    for index in range(count):
        local(spec, Rank(index, count))


def _sizes(text: TextSpec) -> dict[Divided, int]:
    """The sizes that are divided, other than heads, if the model has them."""
    found: dict[Divided, int] = {"vocab": text.vocab}
    if text.dense_hidden:
        found["dense_hidden"] = text.dense_hidden
    if text.experts:
        found["hidden"] = text.experts.hidden
    return found


def _heads(text: TextSpec, rank: Rank) -> dict[Divided, tuple[int, int]]:
    """The query heads of a rank, and their key/value heads.

    With fewer key/value heads than ranks, as many ranks share each of them.
    """
    group = text.heads // text.kv_heads
    if text.kv_heads >= rank.count:
        start, stop = _share("kv_heads", text.kv_heads, rank, unit=1)
        return {"heads": (start * group, stop * group), "kv_heads": (start, stop)}
    sharing, rest = divmod(rank.count, text.kv_heads)
    if rest or group % sharing:
        _refuse(rank, "heads", f"{text.heads} query heads, {text.kv_heads} of keys and values")
    head, each = rank.index // sharing, group // sharing
    start = rank.index * each
    return {"heads": (start, start + each), "kv_heads": (head, head + 1)}


def _share(divided: Divided, size: int, rank: Rank, unit: int = UNIT) -> tuple[int, int]:
    """A rank's part of `size`: as much as all others have, or else some units more.

    Units are as large as they can be, up to `unit`.
    """
    if size < rank.count:
        _refuse(rank, divided, size)
    units = [each for each in _units(size, unit) if size // each >= rank.count]
    unit = next((each for each in units if size // each % rank.count == 0), units[0])
    whole, more = divmod(size // unit, rank.count)
    start = rank.index * whole + min(rank.index, more)
    return start * unit, (start + whole + (rank.index < more)) * unit


def _units(size: int, most: int) -> Iterator[int]:
    """The powers of 2 that divide `size`, up to `most`, the largest first; 1 is the last."""
    unit = min(most, size & -size)
    while unit:
        yield unit
        unit //= 2


def length(part: tuple[int, int]) -> int:
    """How many elements a part has."""
    return part[1] - part[0]


def _refuse(rank: Rank, divided: str, found: object) -> None:
    refuse(
        f"{rank.count} ranks: text.{divided}",
        found,
        "a size that so many ranks can share",
        "use fewer GPUs; without --gpus, one has the whole model",
    )
