"""The operands of ops that have many: each is named once, with its shape and meaning.

A record holds tensors in an eager run, types in a shape rule, ONNX values in a lowering, and nodes
in a pass. Its fields are the arguments of the op's schema, in order. A new argument of an op is a
new field here and in the schema; only what uses it changes too.
"""

from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ranks(Generic[T]):
    """Operands of `ranks`: a router's logits, and how experts are ranked where logits do not.

    logits  [T, E]
    bias    [E]: what is added to the scores; None: nothing

    The others are fields of `moec.spec.parts.routing.Routing`.
    """

    logits: T
    bias: T | None
    score: str
    groups: int
    kept_groups: int


@dataclass(frozen=True, slots=True)
class Route(Generic[T]):
    """Operands of `route`: a router's logits, and how the chosen experts are weighed.

    logits  [T, E]
    ranks   [T, E]: what experts are chosen by, the largest first; it may be the logits
    top_k   how many experts a token gets

    The others are fields of `moec.spec.parts.routing.Routing`.
    """

    logits: T
    ranks: T
    top_k: int
    score: str
    normalise: bool
    factor: float


@dataclass(frozen=True, slots=True)
class Routed(Generic[T]):
    """Tokens, and the experts that the router chose for them.

    x        [T, D]: the tokens
    scores   [T, k]: the weights of the chosen experts
    experts  [T, k], int64: the chosen experts
    weighed  what the scores multiply: "input" or "output" of the experts
    """

    x: T
    scores: T
    experts: T
    weighed: str


@dataclass(frozen=True, slots=True)
class Moe(Routed[T]):
    """Operands of `moe`: routed tokens and the weights of all experts.

    gate_up  [E, D, 2F]: gate, then up
    down     [E, F, D]
    """

    gate_up: T
    down: T


@dataclass(frozen=True, slots=True)
class SeparateMoe(Routed[T]):
    """Operands of `separate_moe`: routed tokens, and three weights [out, in] for each expert.

    gate_up  gate_0 [F, D], up_0 [F, D], gate_1, ...
    down     down_0 [D, F], down_1, ...
    """

    gate_up: list[T]
    down: list[T]

    @property
    def count(self) -> int:
        """The number of experts."""
        return len(self.down)


@dataclass(frozen=True, slots=True)
class Fp8Moe(Routed[T]):
    """Operands of `fp8_moe`: routed tokens, the FP8 weights of all experts, and their scheme.

    gate_up, down    E4M3: one fused tensor each, [E, in, out]; or a tensor for each expert,
                     [out, in]: gate_0, up_0, gate_1, ... and down_0, down_1, ...
    gate_up_scale,   the scale of each of these tensors: fused [], [E], [E, out] or in blocks;
    down_scale       otherwise [], [out] or in blocks
    gate_up_input,   the static scales of inputs: one tensor [] or [E] for fused weights, otherwise
    down_input       one [] for each tensor; no tensors: inputs have none
    inputs           how the scheme quantises inputs: one of `moec.spec.scheme.INPUTS`
    block            the length of a block, and of a group of inputs; 0: there are no blocks
    bound            the largest magnitude that dynamic scales take into account; None: any
    """

    gate_up: list[T]
    gate_up_scale: list[T]
    down: list[T]
    down_scale: list[T]
    gate_up_input: list[T]
    down_input: list[T]
    inputs: str
    block: int
    bound: float | None

    @property
    def fused(self) -> bool:
        """Whether one tensor holds the weights of all experts."""
        first: Any = self.down[0]
        return len(first.shape) == 3

    @property
    def count(self) -> int:
        """The number of experts."""
        first: Any = self.down[0]
        return int(first.shape[0]) if self.fused else len(self.down)


@dataclass(frozen=True, slots=True)
class Int4Moe(Routed[T]):
    """Operands of `int4_moe`: routed tokens, and the 4-bit integers of three weights an expert.

    gate_up, down    codes, two in a byte: gate_0 [F, D/2], up_0, gate_1, ... and down_0 [D, F/2],
                     down_1, ...
    gate_up_scale,   the scales of each, [out, groups]; no tensors: the weights are wide, [out, in]
    down_scale
    gate_up_zero,    the zero points of each, [out/8, groups, 4]; no tensors: all are 8
    down_zero
    values           the type that dequantised weights are rounded to
    """

    gate_up: list[T]
    gate_up_scale: list[T]
    gate_up_zero: list[T]
    down: list[T]
    down_scale: list[T]
    down_zero: list[T]
    values: str

    @property
    def count(self) -> int:
        """The number of experts."""
        return len(self.down)

    def tensors(self, label: str) -> tuple[list[T], list[T], list[T]]:
        """The codes, scales and zero points of "gate_up" or "down"."""
        if label == "down":
            return self.down, self.down_scale, self.down_zero
        return self.gate_up, self.gate_up_scale, self.gate_up_zero


@dataclass(frozen=True, slots=True)
class MoeLayer(Generic[T]):
    """Operands of `moe_layer`: a whole layer, router included, whose last expert is the shared one.

    x              [T, D]: the tokens
    router         [E, D]
    gate_up        E4M3 [E + 1, 2F, D]: gate, then up
    gate_up_scale  float32 [E + 1, 2F]
    down           E4M3 [E + 1, D, F]
    down_scale     float32 [E + 1, D]
    """

    x: T
    router: T
    gate_up: T
    gate_up_scale: T
    down: T
    down_scale: T


@dataclass(frozen=True, slots=True)
class RoutedLayer(Generic[T]):
    """Operands of `routed_layer`: a whole layer, router included, whose last n experts are shared.

    x              [T, D]: the tokens
    router         [E, D]
    bias           [E]: what is added to scores for the choice; None: nothing
    gate_up        [E + n, 2F, D]: gate, then up
    gate_up_scale  float32 [E + n, 2F] of E4M3 weights, or with blocks of B [E + n, 2F / B, D / B];
                   None: weights have the type of x
    down           [E + n, D, F]
    down_scale     float32 [E + n, D], or with blocks of B [E + n, D / B, F / B]; None as above
    top_k          how many routed experts a token gets
    block          B; 0: there are no blocks

    The others are fields of `moec.spec.parts.routing.Routing`.
    """

    x: T
    router: T
    bias: T | None
    gate_up: T
    gate_up_scale: T | None
    down: T
    down_scale: T | None
    top_k: int
    score: str
    choice: str
    groups: int
    kept_groups: int
    normalise: bool
    factor: float
    weighed: str
    block: int


@dataclass(frozen=True, slots=True)
class BufferedAttention(Generic[T]):
    """Operands of `buffered_attention`: a call's tokens, and the buffers that they are added to.

    q           [B, S, heads * d]
    k, v        [B, S, kv_heads * d]
    key, value  [B, kv_heads, N, d]: the buffers, of N slots
    last        [B], int32: the slot of each sequence's last token
    total       int32 scalar: more than any slot of `last`; slots from there on are not read
    mask        [B, 1, S, K], bool: which of the first K slots may be seen at most; None: all
    chunk       the slots of a chunked layer's buffer that are in use; None: every slot
    heads, kv_heads  how many heads there are of queries, and of keys and values
    """

    q: T
    k: T
    v: T
    key: T
    value: T
    last: T
    total: T
    mask: T | None
    chunk: int | None
    heads: int
    kv_heads: int


@dataclass(frozen=True, slots=True)
class RopeAppend(Generic[T]):
    """Operands of `rope_append`: a call's tokens, how they are treated, and where they go.

    qkv         [B, S, (heads + 2 * kv_heads) * d]: queries, keys and values side by side
    cos, sin    float32 [B, S, d / 2]: RoPE's tables; None: no RoPE
    temperature float32 [B, S, 1]: what queries are multiplied by; None: nothing
    key, value  [B, kv_heads, N, d]: the buffers, of N slots, which are written in place
    last        [B], int32: the slot of each sequence's last token
    heads, kv_heads  how many heads there are of queries, and of keys and values
    eps         of the norm of queries and keys; None: no norm
    """

    qkv: T
    cos: T | None
    sin: T | None
    temperature: T | None
    key: T
    value: T
    last: T
    heads: int
    kv_heads: int
    eps: float | None


@dataclass(frozen=True, slots=True)
class Attend(Generic[T]):
    """Operands of `attend` and `attend_fp8`: queries, and the buffers that they see.

    q           [B, S, heads * d]
    key, value  [B, kv_heads, N, d]: the buffers, of N slots
    last        [B], int32: the slot of each sequence's last token
    total       int32 scalar: more than any slot of `last`; slots from there on are not read
    heads, kv_heads  how many heads there are of queries, and of keys and values
    """

    q: T
    key: T
    value: T
    last: T
    total: T
    heads: int
    kv_heads: int


@dataclass(frozen=True, slots=True)
class FusedAttention(Generic[T]):
    """Operands of `attention_fp8`: those of `rope_append` and `attend`.

    qkv is packed here: [B * S, (heads + 2 * kv_heads) * d].
    """

    qkv: T
    cos: T | None
    sin: T | None
    temperature: T | None
    key: T
    value: T
    last: T
    total: T
    heads: int
    kv_heads: int
    eps: float | None


def arguments(operands: Any) -> tuple[Any, ...]:
    """The fields of a record, in the order of the op's schema."""
    return tuple(getattr(operands, field.name) for field in fields(operands))
