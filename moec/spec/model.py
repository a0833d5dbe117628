"""The description of a model, as frozen data.

A value that follows from other fields is a property, never a field.

A layer pattern is a short string, one character for each layer, repeated until every layer has
one. RoPE, mask, QK-norm, temperature and MoE each have their own pattern because they vary
independently. "iRoPE" (three chunked RoPE layers, then one global layer without positions) is a
pattern of attention. It has nothing to do with the alternation of dense and MoE layers, although
the two are often confused.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from moec.spec.bounded import limits
from moec.spec.data import DType, Frozen
from moec.spec.names import family
from moec.spec.scheme import Scheme

#: the characters that each pattern field may hold, and what they mean
ALPHABETS = {
    "attention": {"L": "local: chunked causal mask", "G": "global: full causal mask"},
    "rope": {"R": "rotary positions", "N": "no positions (NoPE)"},
    "qk_norm": {"Q": "RMS norm of q and k per head, after RoPE", "-": "none"},
    "temperature": {"T": "queries scaled by position", "-": "none"},
    "ffn": {"M": "mixture of experts and a shared expert", "D": "dense SwiGLU"},
}


Width = Annotated[int, Field(gt=0, le=limits.WIDTH)]
Positions = Annotated[int, Field(gt=0, le=limits.POSITIONS)]
Depth = Annotated[int, Field(gt=0, le=limits.LAYERS)]
Heads = Annotated[int, Field(gt=0, le=limits.HEADS)]
HeadDim = Annotated[int, Field(gt=0, le=limits.HEAD_DIM)]
ExpertCount = Annotated[int, Field(gt=0, le=limits.EXPERTS)]
#: a base of RoPE
Base = Annotated[float, Field(gt=0, le=1e15)]
#: a factor of RoPE scaling or of the attention temperature
Factor = Annotated[float, Field(gt=0, le=1e6)]
TokenId = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Name = Annotated[str, Field(min_length=1, max_length=limits.NAME)]


class RopeScaling(Frozen):
    """The parameters of Llama 3's RoPE frequency scaling.

    `moec.graph_builder.ops.rope.inverse_frequencies` gives the formula. `low` and `high` are
    `low_freq_factor` and `high_freq_factor` of `config.json`; `original_positions` is in tokens.
    """

    factor: Factor
    low: Factor
    high: Factor
    original_positions: Positions


class Experts(Frozen):
    """The experts of one MoE layer.

    Each token goes through `top_k` of `count` routed SwiGLU experts, and through a shared expert.
    """

    count: ExpertCount
    top_k: ExpertCount
    hidden: Width = Field(description="width of each routed expert")
    shared_hidden: Width = Field(description="width of the shared expert")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_k > self.count:
            raise ValueError(f"top_k {self.top_k} is more than the {self.count} experts")
        return self


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What the patterns say about one decoder layer.

    `chunk` is in tokens; None stands for a full causal mask. `experts` is None for a dense layer.
    """

    index: int
    rope: bool
    chunk: int | None
    qk_norm: bool
    temperature: bool
    experts: Experts | None

    @property
    def moe(self) -> bool:
        """Whether the layer has experts."""
        return self.experts is not None


class TextSpec(Frozen):
    """The decoder. Widths are in elements; `chunk` and positions are in tokens."""

    layers: Depth
    dim: Width
    heads: Heads
    kv_heads: Heads
    head_dim: HeadDim
    vocab: int = Field(gt=0, le=limits.VOCAB)
    max_positions: Positions
    norm_eps: float = Field(ge=1e-30, le=1)
    attention_bias: bool = False
    tie_embeddings: bool = False

    attention: str = "LLLG"
    rope: str = "RRRN"
    qk_norm: str = "QQQ-"
    temperature: str = "---T"
    ffn: str = "M"

    chunk: Positions | None = Field(
        description="the most tokens that a local layer attends to; null where no layer is local"
    )
    rope_theta: Base
    rope_scaling: RopeScaling | None
    temperature_floor: Positions = Field(
        description="tokens for which the attention temperature stays the same"
    )
    temperature_scale: float = Field(ge=-1e6, le=1e6)
    dense_hidden: Width = Field(description="width of a dense layer's SwiGLU")
    experts: Experts | None = Field(
        default=None, description="the experts of each MoE layer; null where all layers are dense"
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
        used_by = {"chunk": ("attention", "L"), "experts": ("ffn", "M")}
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
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; RoPE rotates pairs")
        if "L" in self.attention and self.chunk is None:
            raise ValueError("local layers need a chunk size")
        if "M" in self.ffn and self.experts is None:
            raise ValueError("MoE layers need experts")
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

        return LayerSpec(
            index=index,
            rope=at(self.rope) == "R",
            chunk=self.chunk if at(self.attention) == "L" else None,
            qk_norm=at(self.qk_norm) == "Q",
            temperature=at(self.temperature) == "T",
            experts=self.experts if at(self.ffn) == "M" else None,
        )

    @property
    def all_layers(self) -> tuple[LayerSpec, ...]:
        """Every layer, first to last."""
        return tuple(self.layer(i) for i in range(self.layers))

    @property
    def expert_count(self) -> int:
        """The routed experts of one MoE layer; 0 for a model without any."""
        return self.experts.count if self.experts else 0

    @property
    def q_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads together, and of all value heads together."""
        return self.kv_heads * self.head_dim


class VisionSpec(Frozen):
    """The vision tower, its adapter and the projector into the decoder's width."""

    layers: Depth
    dim: Width
    heads: Heads
    hidden: Width = Field(description="width of each layer's GELU MLP")
    image: int = Field(gt=0, le=limits.TILE, description="pixels along one side of a tile")
    patch: int = Field(gt=0, le=limits.TILE, description="pixels along one side of a patch")
    channels: int = Field(gt=0, le=limits.CHANNELS)
    shuffle: int = Field(
        gt=0, le=limits.PATCHES, description="the pixel shuffle joins shuffle x shuffle patches"
    )
    adapter_hidden: Width
    adapter_out: Width
    rope_theta: Base

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.image % self.patch or self.side % self.shuffle:
            raise ValueError(
                f"image {self.image} must be a multiple of patch {self.patch}, and the patches "
                f"along a side a multiple of shuffle {self.shuffle}"
            )
        if self.side > limits.PATCHES:
            raise ValueError(
                f"{self.side} patches along a side: at most {limits.PATCHES} are expected, which "
                "is far above any known model"
            )
        if self.side**2 * self.head_dim > limits.ROTATIONS:
            raise ValueError(
                f"{self.side**2} patches of heads of width {self.head_dim}: at most "
                f"{limits.ROTATIONS} products are expected, which is far above any known model"
            )
        if self.dim % self.heads or self.head_dim % 4:
            raise ValueError(
                f"dim {self.dim} over {self.heads} heads: 2D RoPE needs heads whose width is a "
                "multiple of 4"
            )
        return self

    @property
    def side(self) -> int:
        """Patches along one side of an image tile."""
        return self.image // self.patch

    @property
    def tokens(self) -> int:
        """Image tokens of one image tile, after the pixel shuffle."""
        return (self.side // self.shuffle) ** 2

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.heads

    @property
    def patch_width(self) -> int:
        """Values in one patch: its pixels in all channels."""
        return self.channels * self.patch**2

    @property
    def shuffled_dim(self) -> int:
        """Width of one image token after the pixel shuffle."""
        return self.dim * self.shuffle**2


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


class ModelSpec(Frozen):
    """A whole model.

    `provenance` says how far to trust the sizes. "released" ones come from a published config.json,
    "estimated" ones are a guess of ours, "custom" ones come from the user. With a `scheme` some
    weights are stored as FP8 or as 4-bit integers; `dtype` is the type of the others, but for those
    in `dtypes`: by the name of a parameter, or of a family such as "layers.*.attn.norm.weight".
    With `separate_experts` each routed expert has tensors of its own on disk, [out, in], where the
    scheme leaves it alone. `sampling` is what generation does by default; None: it takes the
    likeliest token.
    """

    name: Name
    provenance: Literal["released", "estimated", "custom"]
    notes: tuple[str, ...] = ()
    dtype: DType = Field(description="type of the weights on disk that the scheme leaves alone")
    dtypes: dict[Name, DType] = Field(default={}, max_length=limits.LISTED)
    separate_experts: bool = False
    scheme: Scheme | None = None
    text: TextSpec
    vision: VisionSpec | None = None
    tokens: Tokens = Tokens()
    sampling: Sampling | None = None

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
        known = (self.dtypes.get(each) for each in (parameter, family(parameter)))
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
