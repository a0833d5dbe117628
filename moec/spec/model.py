"""The description of a model, as frozen data.

A value that follows from other fields is a property, never a field.

The parts with fields of their own are in `moec.spec.parts`.

A layer pattern is a short string, one character for each layer, repeated until every layer has
one. RoPE, mask, QK-norm, temperature and MoE each have their own pattern because they vary
independently. "iRoPE" (three chunked RoPE layers, then one global layer without positions) is a
pattern of attention. It has nothing to do with the alternation of dense and MoE layers, although
the two are often confused.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

from pydantic import Field, model_validator

from moec.spec import names
from moec.spec.bounded import limits
from moec.spec.data import DType, Frozen
from moec.spec.parts.attention import CacheSpec, Latent
from moec.spec.parts.rope import Scaling
from moec.spec.parts.routing import Experts
from moec.spec.parts.sizes import (
    Base,
    Depth,
    Epsilon,
    Factor,
    HeadDim,
    Heads,
    Name,
    Positions,
    TokenId,
    Width,
)
from moec.spec.parts.vision import VisionSpec
from moec.spec.scheme import Scheme

#: the characters that each pattern field may hold, and what they mean
ALPHABETS = {
    "attention": {
        "L": "local: chunked causal mask",
        "S": "sliding: causal mask over the last `window` tokens",
        "G": "global: full causal mask",
    },
    "rope": {"R": "rotary positions", "N": "no positions (NoPE)"},
    "qk_norm": {
        "Q": "RMS norm of q and k per head, after RoPE, without weight",
        "H": "RMS norm of q and k per head, before RoPE, with a weight",
        "W": "RMS norm of all of q and of all of k, before RoPE, with a weight",
        "-": "none",
    },
    "temperature": {"T": "queries scaled by position", "-": "none"},
    "ffn": {"M": "mixture of experts", "D": "dense SwiGLU"},
}


class QkNorm(NamedTuple):
    """How queries and keys are normalised."""

    whole: bool  # all heads together, and not each for itself
    weighted: bool
    before_rope: bool


#: what the letters of `qk_norm` mean
QK_NORMS = {
    "Q": QkNorm(whole=False, weighted=False, before_rope=False),
    "H": QkNorm(whole=False, weighted=True, before_rope=True),
    "W": QkNorm(whole=True, weighted=True, before_rope=True),
}


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What the patterns say about one decoder layer.

    `chunk` and `window` are in tokens; with neither, the mask is causal alone. `experts` is None
    for a dense layer.
    """

    index: int
    rope: bool
    chunk: int | None
    window: int | None
    qk_norm: QkNorm | None
    temperature: bool
    experts: Experts | None
    caches: tuple[CacheSpec, ...]

    @property
    def moe(self) -> bool:
        """Whether the layer has experts."""
        return self.experts is not None

    @property
    def ranked_by(self) -> str:
        """The name of the value [tokens, experts] that the layer chooses experts by."""
        by_scores = self.experts is not None and self.experts.routing.choice == "scores"
        return (names.ranks if by_scores else names.router)(self.index)

    @property
    def kept(self) -> int | None:
        """How many tokens the layer's cache keeps at most; None: all."""
        return self.chunk or self.window


class TextSpec(Frozen):
    """The decoder. Widths are in elements; `chunk` and positions are in tokens."""

    layers: Depth
    dim: Width
    heads: Heads
    kv_heads: Heads
    head_dim: HeadDim
    vocab: int = Field(gt=0, le=limits.VOCAB)
    max_positions: Positions
    norm_eps: Epsilon
    attention_bias: bool = False
    tie_embeddings: bool = False
    rope_pairs: Literal["adjacent", "halves"] = Field(
        default="adjacent",
        description="what RoPE rotates: elements 2i and 2i + 1 of a head, or i and i + half",
    )
    clip_qkv: Factor | None = Field(
        default=None, description="the largest magnitude of queries, keys and values before RoPE"
    )

    attention: str = "LLLG"
    rope: str = "RRRN"
    qk_norm: str = "QQQ-"
    temperature: str = "---T"
    ffn: str = "M"

    latent: Latent | None = Field(
        default=None, description="multi-head latent attention; head_dim is nope + rope there"
    )
    chunk: Positions | None = Field(
        default=None,
        description="the most tokens that a local layer attends to; null where no layer is local",
    )
    window: Positions | None = Field(
        default=None,
        description="the tokens that a sliding layer attends to; null where no layer is sliding",
    )
    rope_theta: Base
    rope_scaling: Scaling | None
    temperature_floor: Positions = Field(
        default=1, description="tokens for which the attention temperature stays the same"
    )
    temperature_scale: float = Field(default=0.0, ge=-1e6, le=1e6)
    dense_hidden: Width | None = Field(
        default=None, description="width of a dense layer's SwiGLU; null where no layer is dense"
    )
    experts: Experts | None = Field(
        default=None, description="the experts of each MoE layer; null where all layers are dense"
    )
    mtp: Literal["none", "aside", "built"] = Field(
        default="none",
        description="whether a layer of multi-token prediction follows, and a build has it",
    )

    @model_validator(mode="before")
    @classmethod
    def _equal_models_are_equal_specs(cls, values: object) -> object:
        """Store each pattern in its shortest form, and leave out what no layer uses."""
        if not isinstance(values, dict) or not isinstance(values.get("layers"), int):
            return values
        tiled = {
            name: shortest_tile(values[name], values["layers"])
            for name in ALPHABETS
            if isinstance(values.get(name), str)
        }
        used_by = {
            "chunk": ("attention", "L"),
            "window": ("attention", "S"),
            "experts": ("ffn", "M"),
        }
        unused = [
            name
            for name, (pattern, letter) in used_by.items()
            if letter not in tiled.get(pattern, letter)
        ]
        return {**values, **tiled, **dict.fromkeys(unused)}

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, letters in ALPHABETS.items():
            pattern = getattr(self, name)
            if not 0 < len(pattern) <= self.layers or set(pattern) - set(letters):
                raise ValueError(
                    f"{name} pattern {pattern[:80]!r}: 1 to {self.layers} characters from "
                    f"{''.join(letters)!r} are expected"
                )
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is no multiple of kv_heads {self.kv_heads}")
        if self.rope_theta == 1 and self.rope_scaling and self.rope_scaling.kind == "yarn":
            raise ValueError("rope_theta is 1, and YaRN divides by its logarithm")
        if self.rope_dim % 2:
            raise ValueError(f"RoPE rotates pairs, and a head has {self.rope_dim} elements for it")
        if self.latent and self.head_dim != self.latent.nope + self.latent.rope:
            raise ValueError(f"head_dim {self.head_dim} is not nope + rope of latent attention")
        if self.latent and (self.qk_norm != "-" or self.clip_qkv or self.temperature != "-"):
            raise ValueError("latent attention has no QK-norm, clip_qkv or temperature")
        if self.latent and self.rope != "R":
            raise ValueError("latent attention rotates keys in every layer")
        if "L" in self.attention and self.chunk is None:
            raise ValueError("local layers need a chunk size")
        if "S" in self.attention and self.window is None:
            raise ValueError("sliding layers need a window")
        if self.chunk and self.window:
            raise ValueError("local and sliding layers in one model: their caches would differ")
        if "D" in self.ffn and self.dense_hidden is None:
            raise ValueError("dense layers need dense_hidden")
        if "M" in self.ffn and self.experts is None:
            raise ValueError("MoE layers need experts")
        if self.mtp != "none" and (self.experts is None or self.latent is None or self.kept):
            raise ValueError("multi-token prediction needs experts and latent attention to all")
        experts = self.expert_count * sum(layer.moe for layer in self.all_layers)
        if experts > limits.ALL_EXPERTS:
            raise ValueError(
                f"{experts} experts in all layers: at most {limits.ALL_EXPERTS} are expected, "
                "which is far above any known model"
            )
        return self

    def layer(self, index: int) -> LayerSpec:
        """Layer `index`, counted from 0."""

        def at(pattern: str) -> str:
            return pattern[index % len(pattern)]

        chunk = self.chunk if at(self.attention) == "L" else None
        window = self.window if at(self.attention) == "S" else None
        return LayerSpec(
            index=index,
            rope=at(self.rope) == "R",
            chunk=chunk,
            window=window,
            qk_norm=QK_NORMS.get(at(self.qk_norm)),
            temperature=at(self.temperature) == "T",
            experts=self.experts if at(self.ffn) == "M" else None,
            caches=self._caches(chunk or window),
        )

    def _caches(self, kept: int | None) -> tuple[CacheSpec, ...]:
        if self.latent:
            return (CacheSpec(names.LATENT, 1, self.latent.kv_rank + self.latent.rope, kept),)
        return tuple(CacheSpec(kind, self.kv_heads, self.head_dim, kept) for kind in names.CACHED)

    @property
    def all_layers(self) -> tuple[LayerSpec, ...]:
        """Every layer, first to last."""
        return tuple(self.layer(i) for i in range(self.layers))

    @property
    def expert_count(self) -> int:
        """The routed experts of one MoE layer; 0 for a model without any."""
        return self.experts.count if self.experts else 0

    @property
    def kept(self) -> int | None:
        """How many tokens the caches of layers that do not see all tokens keep; None: all do."""
        return self.chunk or self.window

    @property
    def rope_dim(self) -> int:
        """How many elements of a head RoPE rotates."""
        return self.latent.rope if self.latent else self.head_dim

    @property
    def score_scale(self) -> float:
        """What a query's product with a key is multiplied by."""
        factor = self.rope_scaling.score_factor if self.rope_scaling else 1.0
        return float(self.head_dim**-0.5) * factor

    @property
    def mixed_width(self) -> int:
        """Width of what attention gives, all heads together."""
        return self.heads * (self.latent.value if self.latent else self.head_dim)

    @property
    def pair_flops(self) -> int:
        """FLOPs of attention for one query and one key that it sees, all heads together."""
        if self.latent:  # products with latent vectors, as keys and as values
            return 2 * self.heads * (2 * self.latent.kv_rank + self.latent.rope)
        return 4 * self.q_width

    @property
    def q_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads together, and of all value heads together."""
        return self.kv_heads * self.head_dim


class Tokens(Frozen):
    """The ids of special tokens; None where a checkpoint does not name the token."""

    bos: TokenId | None = None
    eos: tuple[TokenId, ...] = Field(default=(), max_length=1024)
    pad: TokenId | None = None
    image: TokenId | None = None
    image_start: TokenId | None = None
    image_end: TokenId | None = None

    @property
    def padding(self) -> int:
        """The id that fills up short sequences: pad, or else the first eos, or else 0."""
        return next((t for t in (self.pad, *self.eos) if t is not None), 0)


class Sampling(Frozen):
    """How a checkpoint wants its tokens sampled, as `Session.generate` takes it."""

    temperature: float = Field(default=1.0, gt=0, le=1e6)
    top_k: int | None = Field(default=None, ge=1, le=limits.VOCAB)
    top_p: float | None = Field(default=None, gt=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)


class ModelSpec(Frozen):
    """A whole model.

    `provenance` says how far to trust the sizes. "released" ones come from a published config.json,
    "estimated" ones are a guess of ours, "custom" ones come from the user. With a `scheme` some
    weights are stored as FP8 or as 4-bit integers; `dtype` is the type of the others, but for those
    in `dtypes`: by the name of a parameter, or of a family such as "layers.*.attn.norm.weight".
    With `separate_experts` each routed expert has tensors of its own on disk, [out, in], where the
    scheme leaves it alone. `architecture` names the row of `moec.spec.hf.architectures` whose
    config.json and tensor names a checkpoint of this model has. `sampling` is what generation does
    by default; None: it takes the likeliest token. Before either, `repetition_penalty` makes tokens
    less likely that a sequence has already.
    """

    name: Name
    provenance: Literal["released", "estimated", "custom"]
    notes: tuple[str, ...] = ()
    dtype: DType = Field(description="type of the weights on disk that the scheme leaves alone")
    dtypes: dict[Name, DType] = Field(default={}, max_length=limits.LISTED)
    separate_experts: bool = False
    architecture: Name = "llama4"
    scheme: Scheme | None = None
    text: TextSpec
    vision: VisionSpec | None = None
    tokens: Tokens = Tokens()
    sampling: Sampling | None = None
    repetition_penalty: Factor = 1.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        image = self.tokens.image
        if self.vision and (image is None or not 0 <= image < self.text.vocab):
            raise ValueError(
                f"tokens.image is {image}; a vision tower needs the id of the image token, "
                f"0 to {self.text.vocab - 1}"
            )
        return self

    @property
    def fp8(self) -> Scheme | None:
        """The scheme, if weights are FP8, which makes noise wherever inputs are rounded too."""
        return None if self.scheme is None or self.scheme.int4 else self.scheme

    def stored(self, parameter: str) -> DType:
        """The type of a parameter on disk, where the scheme leaves it alone."""
        if not self.dtypes:
            return self.dtype
        known = (self.dtypes.get(each) for each in (parameter, names.family(parameter)))
        return next((each for each in known if each), self.dtype)


def shortest_tile(pattern: str, layers: int) -> str:
    """The shortest string that, repeated over `layers`, gives the same layers as `pattern`."""
    if not pattern or not len(pattern) <= layers <= limits.LAYERS:
        return pattern
    full = (pattern * math.ceil(layers / len(pattern)))[:layers]
    for size in range(1, len(pattern)):
        if (full[:size] * math.ceil(layers / size))[:layers] == full:
            return full[:size]
    return pattern
