"""Read a Llama 4 `config.json`, in the released style (transformers 4.51) or the 5.x style.

The reader guesses nothing. `PUBLISHED` holds the values of fields that released checkpoints leave
out. Any other missing field is an error that names it, and so is an unknown field.
"""

from typing import Any

from moec.spec.bounded import limits
from moec.spec.fields import Fields, shown
from moec.spec.hf.architectures.common import Read, dtype_of, inert, rope, tokens_of
from moec.spec.model import TextSpec
from moec.spec.parts.routing import Experts
from moec.spec.parts.vision import VisionSpec

#: The values of fields that released configs leave out (from transformers' Llama4TextConfig).
PUBLISHED = {
    "no_rope_layer_interval": 4,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "attn_scale": 0.1,
    "attention_bias": False,
}


#: Fields that say nothing of a model without experts.
_OF_EXPERTS = frozenset({"intermediate_size", "num_experts_per_tok", "num_local_experts"})


def read(top: Fields, kind: str) -> Read:
    """Read a config of type `llama4_text`, or `llama4`, which has parts for text and vision."""
    nothing = Fields(top.where, {})
    raw = dict(top.left)
    if kind == "llama4_text":
        dtype = dtype_of(top, nothing)
        text = _text(top)
        return Read(text, tokens_of(nothing, raw), dtype, notes=_notes(raw))
    inner = Fields(f"{top.where}: text_config", top.take("text_config", dict))
    tower = Fields(f"{top.where}: vision_config", top.take("vision_config", dict))
    raw = dict(inner.left)
    dtype = dtype_of(top, inner)
    vision, text = _vision(tower), _text(inner)
    tokens = tokens_of(top, raw, images=True)
    top.require("tie_word_embeddings", text.tie_embeddings, default=False)
    # Some writers repeat the text config's token ids at the top level.
    top.finish(inert(top) | {"bos_token_id", "eos_token_id", "pad_token_id", "vocab_size"})
    return Read(text, tokens, dtype, vision, _notes(raw))


def _text(at: Fields) -> TextSpec:
    at.left.pop("model_type", None)
    layers = at.size("num_hidden_layers", limits.LAYERS)
    at.require("hidden_act", "silu")
    theta, scaling = rope(at, "default", "llama3")
    rotated = _rope_layers(at, layers)
    mask = _local_layers(at, layers, rotated)
    qk_norm = at.take("use_qk_norm", bool)
    # Launch-week configs hold the int 4 here.
    temperature = bool(
        at.take("attn_temperature_tuning", bool, int, default=PUBLISHED["attn_temperature_tuning"])
    )
    moe = _moe_layers(at, layers)
    text = TextSpec(
        layers=layers,
        dim=at.size("hidden_size", limits.WIDTH),
        heads=at.size("num_attention_heads", limits.HEADS),
        kv_heads=at.size("num_key_value_heads", limits.HEADS),
        head_dim=at.size("head_dim", limits.HEAD_DIM),
        vocab=at.size("vocab_size", limits.VOCAB),
        max_positions=at.size("max_position_embeddings", limits.POSITIONS),
        norm_eps=at.take("rms_norm_eps", float),
        attention_bias=at.take("attention_bias", bool, default=PUBLISHED["attention_bias"]),
        tie_embeddings=at.take("tie_word_embeddings", bool, default=False),
        attention="".join("L" if local else "G" for local in mask),
        rope="".join("R" if on else "N" for on in rotated),
        qk_norm="".join("Q" if on and qk_norm else "-" for on in rotated),
        temperature="".join("T" if temperature and not on else "-" for on in rotated),
        ffn="".join("M" if each else "D" for each in moe),
        chunk=at.take("attention_chunk_size", int, default=None),
        rope_theta=theta,
        rope_scaling=scaling,
        temperature_floor=at.take("floor_scale", int, default=PUBLISHED["floor_scale"]),
        temperature_scale=at.take("attn_scale", float, default=PUBLISHED["attn_scale"]),
        dense_hidden=at.size("intermediate_size_mlp", limits.WIDTH),
        experts=_experts(at) if any(moe) else None,
    )
    left = _OF_EXPERTS if text.experts is None else frozenset()
    tokens = {"bos_token_id", "eos_token_id", "pad_token_id"}
    at.finish(inert(at) | left | tokens | {"torch_dtype", "dtype"})
    return text


def _experts(at: Fields) -> Experts:
    if at.left.get("num_local_experts") == 0:
        expected = "1 or more, or moe_layers: [] for a model without experts"
        raise at.error("num_local_experts", "0, although there are MoE layers", expected)
    hidden = at.size("intermediate_size", limits.WIDTH)
    return Experts(
        count=at.size("num_local_experts", limits.EXPERTS),
        top_k=at.size("num_experts_per_tok", limits.EXPERTS),
        hidden=hidden,
        shared_hidden=hidden,
    )


def _rope_layers(at: Fields, layers: int) -> list[bool]:
    """Which layers have RoPE. In `no_rope_layers`, despite its name, 1 means RoPE."""
    interval = at.take("no_rope_layer_interval", int, default=PUBLISHED["no_rope_layer_interval"])
    if interval < 1:
        raise at.error("no_rope_layer_interval", str(interval), "at least 1")
    listed = at.take("no_rope_layers", list, default=[])
    if not listed:  # released Scout has [], which stands for the default pattern
        return [bool((index + 1) % interval) for index in range(layers)]
    if len(listed) < layers or any(type(flag) is not int or flag not in (0, 1) for flag in listed):
        raise at.error("no_rope_layers", f"{len(listed)} values", f"{layers} values, each 0 or 1")
    return [bool(flag) for flag in listed[:layers]]


def _local_layers(at: Fields, layers: int, rope: list[bool]) -> list[bool]:
    """Which layers have a chunked mask: as `layer_types` says, or else those with RoPE.

    An `attention_chunk_size` of null is how Llama Guard 4 says that no layer is chunked.
    """
    types = at.take("layer_types", list, default=None)
    whole = at.left.get("attention_chunk_size", 0) is None
    if types is None:
        return [on and not whole for on in rope]
    kinds = {str(kind) for kind in types}
    if len(types) != layers or kinds - {"chunked_attention", "full_attention"}:
        raise at.error(
            "layer_types",
            f"{len(types)} values of {shown(sorted(kinds))}",
            f"{layers} values, each 'chunked_attention' or 'full_attention'",
        )
    if whole and "chunked_attention" in kinds:
        expected = "a number of tokens, or layer_types that are all 'full_attention'"
        raise at.error("attention_chunk_size", "null, for chunked layers", expected)
    return [kind == "chunked_attention" for kind in types]


def _moe_layers(at: Fields, layers: int) -> list[bool]:
    """Which layers are MoE: as `moe_layers` says, or else every `interleave_moe_layer_step`-th."""
    step = at.take("interleave_moe_layer_step", int)
    listed = at.take("moe_layers", list, default=None)
    if listed is None:
        if step < 1:
            expected = "at least 1, or moe_layers: [] for a model without experts"
            raise at.error("interleave_moe_layer_step", str(step), expected)
        return [(index + 1) % step == 0 for index in range(layers)]
    found = {index for index in listed if type(index) is int and 0 <= index < layers}
    if any(type(index) is not int or index not in found for index in listed):
        raise at.error("moe_layers", shown(listed), f"layer indices from 0 to {layers - 1}")
    return [index in found for index in range(layers)]


def _vision(at: Fields) -> VisionSpec:
    at.left.pop("model_type", None)
    at.require("hidden_act", "gelu")
    at.require("vision_feature_select_strategy", "default")
    at.require("vision_feature_layer", -1, default=-1)
    at.require("multi_modal_projector_bias", False, default=False)
    ratio = at.take("pixel_shuffle_ratio", float)
    if not 1e-3 < ratio <= 1 or round(1 / ratio) * ratio != 1:
        raise at.error("pixel_shuffle_ratio", str(ratio), "1/n for a whole number n, such as 0.5")
    theta, _ = rope(at, "default")
    out = at.size("projector_output_dim", limits.WIDTH)
    at.require("vision_output_dim", out)
    vision = VisionSpec(
        layers=at.size("num_hidden_layers", limits.LAYERS),
        dim=at.size("hidden_size", limits.WIDTH),
        heads=at.size("num_attention_heads", limits.HEADS),
        hidden=at.size("intermediate_size", limits.WIDTH),
        image=at.size("image_size", limits.TILE),
        patch=at.size("patch_size", limits.TILE),
        channels=at.size("num_channels", limits.CHANNELS),
        shuffle=round(1 / ratio),
        adapter_hidden=at.size("projector_input_dim", limits.WIDTH),
        adapter_out=out,
        rope_theta=theta,
    )
    at.finish(inert(at) | {"torch_dtype", "dtype"})
    return vision


def _notes(text: dict[str, Any]) -> tuple[str, ...]:
    notes = list[str]()
    if text.get("attention_chunk_size", 0) is None and text.get("layer_types") is None:
        notes.append("attention_chunk_size is null: every layer attends to all tokens before.")
    scaling = text.get("rope_scaling") or {}
    if isinstance(scaling, dict) and (scaling.get("factor"), scaling.get("high_freq_factor")) == (
        8,
        4,
    ):
        notes.append(
            "rope_scaling has factor 8 and high_freq_factor 4, the values of launch week; Meta "
            "corrected Scout to 16 and 1. They are used as they stand: check the model card."
        )
    return tuple(notes)
