"""What text decoders have in common that name their tensors as Llama does: fields and keys."""

from collections.abc import Iterable, Mapping
from typing import Any

from moec.spec import names
from moec.spec.bounded import limits
from moec.spec.fields import Fields
from moec.spec.hf.architectures.common import (
    DTYPES,
    Read,
    dtype_of,
    inert,
    rope,
    tokens_of,
    written_scaling,
)
from moec.spec.model import ModelSpec, TextSpec
from moec.spec.parts.rope import Yarn
from moec.spec.parts.routing import Routing

SWIGLU = ("gate", "up", "down")
LAYER = "model.layers.{i}"
_TOKENS = {"bos_token_id", "eos_token_id", "pad_token_id"}
#: fields of old code that splits products, which changes no value
_INERT = {"pretraining_tp"}


def keys(
    block: str = "mlp",
    router: str = "gate",
    expert: Mapping[str, str] | None = None,
    shared: str | None = None,
) -> dict[str, str]:
    """Our names and a checkpoint's keys. Experts are `block`.experts.{e}, with parts `expert`.

    Args:
        block: what an MoE layer's tensors lie under.
        router: the router's name there.
        expert: the names of gate, up and down of an expert.
        shared: the name of the shared expert.
    """
    expert = expert or {part: f"{part}_proj" for part in SWIGLU}
    moe = f"{LAYER}.{block}"
    found = {
        names.EMBED_WEIGHT: "model.embed_tokens.weight",
        names.NORM_WEIGHT: "model.norm.weight",
        names.HEAD_WEIGHT: "lm_head.weight",
        names.attention("{i}", "norm", "weight"): f"{LAYER}.input_layernorm.weight",
        names.dense("{i}", "norm", "weight"): f"{LAYER}.post_attention_layernorm.weight",
        names.moe("{i}", "router", "weight"): f"{moe}.{router}.weight",
        names.moe("{i}", "gate_up"): f"{moe}.experts.gate_up_proj",
        names.moe("{i}", "down"): f"{moe}.experts.down_proj",
    }
    for part in "qkvo":
        for kind in ("weight", "bias"):
            key = f"{LAYER}.self_attn.{part}_proj.{kind}"
            found[names.attention("{i}", part, kind)] = key
    for part in "qk":
        key = f"{LAYER}.self_attn.{part}_norm.weight"
        found[names.attention("{i}", part, "norm", "weight")] = key
    for part in SWIGLU:
        found[names.dense("{i}", part, "weight")] = f"{LAYER}.mlp.{part}_proj.weight"
        own = names.moe("{i}", "experts", "{e}", part, "weight")
        found[own] = f"{moe}.experts.{{e}}.{expert[part]}.weight"
        if shared:
            found[names.shared("{i}", part, "weight")] = f"{moe}.{shared}.{part}_proj.weight"
    return found


def softmax_routing(normalise: bool) -> Routing:
    """The largest scores of a softmax over all experts choose them, and multiply their outputs."""
    return Routing(score="softmax", choice="scores", normalise=normalise, weighed="output")


def read_decoder(
    top: Fields,
    aside: Iterable[str] = (),
    scaling: tuple[str, ...] = ("default",),
    notes: tuple[str, ...] = (),
    scores_scaled: bool = False,
    **fields: Any,
) -> Read:
    """Read the fields that all decoders have; `fields` are those of the spec that differ.

    `aside` names fields without effect, `scaling` the kinds of RoPE that the architecture has.
    With `scores_scaled`, YaRN acts on attention scores too.
    """
    top.require("hidden_act", "silu")
    dim = top.size("hidden_size", limits.WIDTH)
    heads = top.size("num_attention_heads", limits.HEADS)
    raw = dict(top.left)
    kv_heads, head_dim = (
        top.size(key, most) if key in top else default
        for key, most, default in (
            ("num_key_value_heads", limits.HEADS, heads),
            ("head_dim", limits.HEAD_DIM, dim // heads),
        )
    )
    dtype = dtype_of(top, Fields(top.where, {}))
    theta, scaled = rope(top, *scaling)
    if isinstance(scaled, Yarn):
        scaled = scaled.model_copy(update={"scales_scores": scores_scaled})
    found: dict[str, Any] = {
        "layers": top.size("num_hidden_layers", limits.LAYERS),
        "dim": dim,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "vocab": top.size("vocab_size", limits.VOCAB),
        "max_positions": top.size("max_position_embeddings", limits.POSITIONS),
        "norm_eps": top.take("rms_norm_eps", float),
        "attention_bias": top.take("attention_bias", bool, default=False),
        "tie_embeddings": top.take("tie_word_embeddings", bool, default=False),
        "attention": "G",
        "rope": "R",
        "qk_norm": "-",
        "temperature": "-",
        "rope_pairs": "halves",
        "rope_theta": theta,
        "rope_scaling": scaled,
    }
    text = TextSpec(**(found | fields))
    tokens = tokens_of(Fields(top.where, {}), raw)
    top.finish(inert(top) | _TOKENS | _INERT | set(aside))
    return Read(text, tokens, dtype, notes=notes)


def write_decoder(spec: ModelSpec, kind: str, model: str, **fields: Any) -> dict[str, Any]:
    """The fields that all decoders have, and `fields`; `model` is the class in transformers."""
    text = spec.text
    return {
        "architectures": [model],
        "model_type": kind,
        "attention_bias": text.attention_bias,
        "bos_token_id": spec.tokens.bos,
        "eos_token_id": list(spec.tokens.eos),
        "pad_token_id": spec.tokens.pad,
        "head_dim": text.head_dim,
        "hidden_act": "silu",
        "hidden_size": text.dim,
        "max_position_embeddings": text.max_positions,
        "num_attention_heads": text.heads,
        "num_hidden_layers": text.layers,
        "num_key_value_heads": text.kv_heads,
        "rms_norm_eps": text.norm_eps,
        "rope_scaling": text.rope_scaling and written_scaling(text.rope_scaling),
        "rope_theta": text.rope_theta,
        "tie_word_embeddings": text.tie_embeddings,
        "torch_dtype": {short: long for long, short in DTYPES.items()}[spec.dtype],
        "vocab_size": text.vocab,
        **fields,
    }
