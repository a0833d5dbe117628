"""The record of one kernel launch, as data: no tensor, no torch.

The same record runs under torch, in Triton's interpreter, and compiles ahead of time.
"""

from dataclasses import dataclass, field
from typing import Any

#: compute capability that kernels are compiled for -> bytes of shared memory that a program may use
SHARED = {89: 101_376, 90: 232_448, 120: 101_376}
#: name of an argument -> what it points at, or its type, as Triton says it
TYPES = {
    **dict.fromkeys(("x", "router", "act", "out", "skip", "gain", "total", "normed"), "*bf16"),
    **dict.fromkeys(("hidden", "qkv", "q", "key", "value"), "*bf16"),
    **dict.fromkeys(("codes", "gate_up", "act_codes", "down", "weight"), "*fp8e4nv"),
    **dict.fromkeys(("logits", "scale", "gate_up_scale", "down_scale", "weight_scale"), "*fp32"),
    **dict.fromkeys(("parts", "most", "sums", "cos", "sin", "temperature"), "*fp32"),
    "rates": "*fp32",
    **dict.fromkeys(("largest", "last", "chosen", "place", "plan", "present", "counts"), "*i32"),
    **dict.fromkeys(("score", "row_scale", "act_scale", "bias"), "*fp32"),
    "rows": "*fp8e4nv",
    "products": "*bf16",
    "positions": "*i64",
    "mask": "*i1",
    **dict.fromkeys(("earlier", "totals"), "*i32"),
    **dict.fromkeys(("tokens", "steps", "slots", "blocks"), "i32"),
}
#: name of a buffer that launches write -> its shape and element type
Buffers = dict[str, tuple[tuple[int, ...], str]]


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch: `arguments` by name, in the kernel's order; `constants` by the kernel's names.

    `stages` is how many steps of a product Triton keeps under way at once. `types` are those of
    arguments that have others than in `TYPES`.
    """

    kernel: Any
    grid: tuple[int, int, int]
    arguments: tuple[str, ...]
    constants: dict[str, Any]
    warps: int
    stages: int = 3
    options: dict[str, Any] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.fn.__name__)


def shared_of(architecture: int) -> int:
    """Bytes of shared memory of a program; for an unknown `architecture` the smallest of all."""
    return SHARED.get(architecture, min(SHARED.values()))


def early(overlap: bool) -> dict[str, bool]:
    """Triton's options for a launch that may start before the previous one ends."""
    return {"launch_pdl": True} if overlap else {}


def fit(size: int, most: int) -> int:
    """The largest power of 2 that divides `size`, at most `most`."""
    return min(most, size & -size)


def power_of_2(size: int) -> int:
    """The smallest power of 2 that is at least `size`."""
    return 1 << (size - 1).bit_length()
