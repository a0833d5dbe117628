"""The sizes that the kernels take: of a layer, and asked of a whole model. No Triton, no torch."""

from dataclasses import dataclass

from moec.spec.errors import refuse
from moec.spec.model import ModelSpec

#: inputs or outputs that a step of a product takes at least
SMALLEST = 32
#: the smallest head; each is a power of 2
SMALLEST_HEAD = 16
#: what to do with a model that the kernels do not take
PLAIN = "use --device cpu, which takes any size"


@dataclass(frozen=True, slots=True)
class Sizes:
    """One MoE layer with a shared expert as wide as a routed one; top-1."""

    dim: int
    hidden: int
    experts: int


@dataclass(frozen=True, slots=True)
class Heads:
    """Heads of queries and of keys, and the size of one."""

    heads: int
    kv_heads: int
    size: int


def is_head(size: int) -> bool:
    """Whether attention takes heads of this size."""
    return size >= SMALLEST_HEAD and size & (size - 1) == 0


def check_sizes(spec: ModelSpec) -> None:
    """Refuse a model that some kernel would refuse, before anything is loaded for it.

    Raises:
        MoecError: names every size that is off (exit code 3).
    """
    text = spec.text
    feed = {layer.moe for layer in text.all_layers}
    widths = {
        "text.dim": text.dim,
        "text.heads * head_dim": text.q_width,
        "text.(heads + 2 * kv_heads) * head_dim": text.q_width + 2 * text.kv_width,
        **({"text.dense_hidden": text.dense_hidden} if False in feed else {}),
        **({"text.experts.hidden": text.experts.hidden} if True in feed else {}),
    }
    odd = [f"{name} {size}" for name, size in widths.items() if size % SMALLEST]
    if not is_head(text.head_dim):
        odd.append(f"text.head_dim {text.head_dim}")
    if odd:
        refuse(
            f"device cuda: {spec.name}",
            ", ".join(odd),
            f"multiples of {SMALLEST}; text.head_dim a power of 2, {SMALLEST_HEAD} or more",
            PLAIN,
            exit_code=3,
        )
