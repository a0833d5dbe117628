"""Read a Llama 4 `config.json`, in the released style (transformers 4.51) or the 5.x style.

The reader guesses nothing. `PUBLISHED` holds the values of fields that released checkpoints leave
out. Any other missing field is an error that names it, and so is an unknown field.
"""

import os
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from moec.spec.bounded import limits
from moec.spec.data import DType, dtypes
from moec.spec.errors import refuse
from moec.spec.fields import REQUIRED, Fields, read_own_json, shown
from moec.spec.hf.generation import with_generation
from moec.spec.hf.quantization import read_scheme
from moec.spec.model import (
    Experts,
    ModelSpec,
    RopeScaling,
    TextSpec,
    Tokens,
    VisionSpec,
)

#: The values of fields that released configs leave out (from transformers' Llama4TextConfig).
PUBLISHED = {
    "no_rope_layer_interval": 4,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "attn_scale": 0.1,
    "attention_bias": False,
}

#: Fields for training, bookkeeping and generation, which do not change what the model computes.
INERT = frozenset(
    """
    _attn_implementation_autoset _name_or_path add_cross_attention architectures attention_dropout
    attn_implementation auto_map bad_words_ids begin_suppress_tokens cache_implementation
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty
    do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
    finetuning_task for_llm_compressor forced_bos_token_id forced_eos_token_id id2label
    initializer_range is_decoder is_encoder_decoder label2id length_penalty max_length min_length
    no_repeat_ngram_size norm_eps num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_router_logits output_scores prefix problem_type
    projector_dropout pruned_heads remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate router_aux_loss_coef router_jitter_noise sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p
    torchscript transformers_version typical_p use_bfloat16 use_cache
    """.split()
)

#: Fields that say nothing of a model without experts.
_OF_EXPERTS = frozenset({"intermediate_size", "num_experts_per_tok", "num_local_experts"})

#: The values of `torch_dtype` (4.x) or `dtype` (5.x), and our names for them.
DTYPES: dict[str, DType] = {
    dtypes("name", "torch")[name]: name for name in reversed(get_args(DType))
}


def read_config(path: Path) -> ModelSpec:
    """Read the spec from a checkpoint's `config.json`, of type `llama4` or `llama4_text`.

    The folder's name becomes the spec's name.

    Raises:
        MoecError: the file cannot be read, is a link that leads out of its folder, or has a field
            that is missing, unknown or not supported.
    """
    raw = read_own_json(path)
    top = Fields(str(path), raw)
    folder = os.fsencode(path.parent.resolve().name).decode(errors="replace")
    kind = top.take("model_type", str)
    quantization = top.left.pop("quantization_config", None)
    try:
        if kind == "llama4_text":
            spec = ModelSpec(
                name=folder,
                provenance="custom",
                notes=(*_notes(raw), *_bookkeeping(raw)),
                dtype=_dtype(top, Fields(str(path), {})),
                text=_text(top),
                tokens=_tokens(Fields(str(path), {}), raw, image=None),
            )
            return _with_scheme(spec, quantization, path)
        if kind == "llama4":
            text = Fields(f"{path}: text_config", top.take("text_config", dict))
            vision = Fields(f"{path}: vision_config", top.take("vision_config", dict))
            raw_text = dict(text.left)
            spec = ModelSpec(
                name=folder,
                provenance="custom",
                notes=(*_notes(raw_text), *_bookkeeping(raw)),
                dtype=_dtype(top, text),
                vision=_vision(vision),
                text=_text(text),
                tokens=_tokens(top, raw_text, image=REQUIRED),
            )
            top.require("tie_word_embeddings", spec.text.tie_embeddings, default=False)
            # Some writers repeat the text config's token ids at the top level.
            top.finish(_inert(top) | {"bos_token_id", "eos_token_id", "pad_token_id", "vocab_size"})
            return _with_scheme(spec, quantization, path)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the values together"
        refuse(
            f"{path}: spec field {field}",
            first["msg"],
            "a consistent Llama 4 config",
            "correct config.json",
        )
    raise top.error("model_type", repr(kind), "'llama4' or 'llama4_text'")


def _inert(at: Fields) -> frozenset[str]:
    """`INERT`, and what fine-tuners write for themselves."""
    return INERT | {key for key in at.left if _is_bookkeeping(key)}


def _is_bookkeeping(key: str) -> bool:
    return key.startswith("unsloth_") or key == "model_name"


def _bookkeeping(raw: dict[str, Any]) -> tuple[str, ...]:
    """A note on the fields of fine-tuners, at the top and one level below."""
    inner = (each for each in raw.values() if isinstance(each, dict))
    keys = sorted({key for each in (raw, *inner) for key in each if _is_bookkeeping(key)})
    return (f"config.json: left aside {', '.join(keys)[:200]}.",) if keys else ()


def _with_scheme(spec: ModelSpec, quantization: object, path: Path) -> ModelSpec:
    spec = with_generation(spec, path.with_name("generation_config.json"))
    return spec.model_copy(update={"scheme": read_scheme(quantization, path, spec)})


def _text(at: Fields) -> TextSpec:
    at.left.pop("model_type", None)
    layers = at.size("num_hidden_layers", limits.LAYERS)
    at.require("hidden_act", "silu")
    theta, scaling = _rope(at, "default", "llama3")
    rope = _rope_layers(at, layers)
    mask = _local_layers(at, layers, rope)
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
        rope="".join("R" if on else "N" for on in rope),
        qk_norm="".join("Q" if on and qk_norm else "-" for on in rope),
        temperature="".join("T" if temperature and not on else "-" for on in rope),
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
    at.finish(_inert(at) | left | tokens | {"torch_dtype", "dtype"})
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


def _rope(at: Fields, *kinds: str) -> tuple[float, RopeScaling | None]:
    """Read RoPE's base and scaling.

    They are in `rope_theta` and `rope_scaling`, or in `rope_parameters` in the 5.x style.
    """
    if "rope_parameters" in at:
        inner = Fields(f"{at.where}.rope_parameters", at.take("rope_parameters", dict))
        theta = inner.take("rope_theta", float)
        at.left.pop("rope_theta", None)
        at.left.pop("rope_scaling", None)
    else:
        theta = at.take("rope_theta", float)
        at.left.pop("rope_parameters", None)
        scaling = at.take("rope_scaling", dict, default={"rope_type": "default"})
        inner = Fields(f"{at.where}.rope_scaling", scaling)
    kind = inner.take("rope_type", str, default=inner.left.get("type"))  # before 4.43: type
    if kind not in kinds:
        raise inner.error("rope_type", repr(kind), " or ".join(map(repr, kinds)))
    result = None
    if kind == "llama3":
        result = RopeScaling(
            factor=inner.take("factor", float),
            low=inner.take("low_freq_factor", float),
            high=inner.take("high_freq_factor", float),
            original_positions=inner.take("original_max_position_embeddings", int),
        )
    inner.finish({"type"})
    return float(theta), result


def _vision(at: Fields) -> VisionSpec:
    at.left.pop("model_type", None)
    at.require("hidden_act", "gelu")
    at.require("vision_feature_select_strategy", "default")
    at.require("vision_feature_layer", -1, default=-1)
    at.require("multi_modal_projector_bias", False, default=False)
    ratio = at.take("pixel_shuffle_ratio", float)
    if not 1e-3 < ratio <= 1 or round(1 / ratio) * ratio != 1:
        raise at.error("pixel_shuffle_ratio", str(ratio), "1/n for a whole number n, such as 0.5")
    theta, _ = _rope(at, "default")
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
    at.finish(_inert(at) | {"torch_dtype", "dtype"})
    return vision


def _dtype(top: Fields, text: Fields) -> DType:
    """The type that the config names, or bf16; the weights' own headers have the last word."""
    found = [
        value
        for fields in (top, text)
        for key in ("torch_dtype", "dtype")
        if (value := fields.take(key, str, default=None)) is not None
    ]
    if not found:
        return "bf16"
    if len(set(found)) > 1 or found[0] not in DTYPES:
        raise top.error("torch_dtype", shown(found), f"one of {', '.join(DTYPES)}")
    return DTYPES[found[0]]


def _tokens(top: Fields, text: dict[str, Any], image: Any) -> Tokens:
    eos = text.get("eos_token_id")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = text.get(key)
        for token in ids if isinstance(ids, list) else [ids]:
            if token is not None and type(token) is not int:
                raise top.error(key, repr(token), "a token id")
    return Tokens(
        bos=text.get("bos_token_id"),
        eos=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        pad=text.get("pad_token_id"),
        image=top.take("image_token_index", int, default=image),
        image_start=top.take("boi_token_index", int, default=None),
        image_end=top.take("eoi_token_index", int, default=None),
    )


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
