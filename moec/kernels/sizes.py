"""The sizes that the kernels take, for one layer and for a whole model. No Triton, no torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from moec.spec.errors import refuse
from moec.spec.model import ModelSpec
from moec.spec.parts.routing import Experts, Routing

#: the fewest inputs or outputs that one step of a product takes
SMALLEST = 32
#: the most tokens that the kernels for few tokens take
MOST_TOKENS = 64
#: the most sequences of a decode step whose kernels are compiled ahead of time
MOST_BATCH = 1024
#: the smallest and the largest head size; each is a power of 2
SMALLEST_HEAD, LARGEST_HEAD = 16, 256
#: the largest sizes of a model. Those of a stranger's could keep a compiler busy for hours.
LARGEST = {
    "text.dim": 1 << 15,
    "text.heads / kv_heads": 1 << 7,
    "text.dense_hidden": 1 << 17,
    "text.experts.hidden": 1 << 17,
    "text.experts.count": 1 << 10,
}
#: what to do with a model that the kernels do not take
PLAIN = "use --device cpu, which takes any size"


@dataclass(frozen=True, slots=True)
class Sizes:
    """One top-1 MoE layer whose shared expert is as wide as a routed one."""

    dim: int
    hidden: int
    experts: int


@dataclass(frozen=True, slots=True)
class RoutedSizes:
    """One MoE layer of any routing whose scores weigh the experts' outputs.

    `shared` counts the shared experts of the width `hidden`. `block` is the side of the blocks of
    weights that have a scale each; 0: each output of a weight has one.
    """

    dim: int
    hidden: int
    experts: int
    top_k: int
    shared: int
    routing: Routing
    block: int = 0

    @property
    def slots(self) -> int:
        """The experts that a token goes through."""
        return self.top_k + self.shared

    @classmethod
    def of(cls, dim: int, experts: Experts, block: int = 0) -> "RoutedSizes":
        """The sizes of a layer of a model that is `dim` wide."""
        shared = (experts.shared_hidden or 0) // experts.hidden
        each = experts.hidden, experts.count, experts.top_k
        return cls(dim, *each, shared, experts.routing, block)


@dataclass(frozen=True, slots=True)
class Heads:
    """The numbers of query heads and of key/value heads, and the size of one."""

    heads: int
    kv_heads: int
    size: int


def constants_text(numbers: Mapping[str, int | float]) -> str:
    """The numbers of an op in one line, such as "eps=1e-05 heads=40".

    A node and the program that runs it have the same line.
    """
    return " ".join(f"{name}={each!r}" for name, each in numbers.items())


def is_head(size: int) -> bool:
    """Whether the attention kernels take heads of this size."""
    return size >= SMALLEST_HEAD and size & (size - 1) == 0


def check_sizes(spec: ModelSpec) -> None:
    """Refuse a model that a kernel would refuse, before anything is loaded for it.

    Raises:
        MoecError: names every size that does not fit (exit code 3).
    """
    text = spec.text
    feed = {layer.experts for layer in text.all_layers}
    experts = next((each for each in feed if each), None)
    widths = {
        "text.dim": text.dim,
        "text.heads * head_dim": text.q_width,
        "text.(heads + 2 * kv_heads) * head_dim": text.q_width + 2 * text.kv_width,
        **({"text.dense_hidden": text.dense_hidden} if None in feed else {}),
        **({"text.experts.hidden": experts.hidden} if experts else {}),
    }
    odd = [f"{name} {size}" for name, size in widths.items() if size % SMALLEST]
    if not is_head(text.head_dim) or text.head_dim > LARGEST_HEAD:
        odd.append(f"text.head_dim {text.head_dim}")
    if odd:
        heads = f"text.head_dim a power of 2, {SMALLEST_HEAD} to {LARGEST_HEAD}"
        where, expected = f"device cuda: {spec.name}", f"multiples of {SMALLEST}; {heads}"
        refuse(where, ", ".join(odd), expected, PLAIN, exit_code=3)
    found = widths | {"text.heads / kv_heads": text.heads // text.kv_heads}
    found |= {"text.experts.count": experts.count} if experts else {}
    for name, most in LARGEST.items():
        if found.get(name, 0) > most:
            where = f"device cuda: {spec.name}: {name}"
            refuse(where, found[name], f"at most {most}", PLAIN, exit_code=3)
