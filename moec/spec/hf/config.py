"""`config.json` in the released (transformers 4.51) and the 5.x style, to a spec and back.

Nothing is guessed. Fields that released checkpoints leave out have their published meaning in
`PUBLISHED`; any other missing field is an error that names it, and so is a field nobody knows.
"""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moec.spec.errors import refuse
from moec.spec.fields import REQUIRED, Fields, read_json
from moec.spec.frozen import DType
from moec.spec.hf.quantization import read_scheme, write_scheme
from moec.spec.model import (
    Experts,
    ModelSpec,
    RopeScaling,
    TextSpec,
    Tokens,
    VisionSpec,
)

#: What a field means where a released config leaves it out (transformers' Llama4TextConfig).
PUBLISHED = {
    "no_rope_layer_interval": 4,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "attn_scale": 0.1,
    "attention_bias": False,
}

#: Training, bookkeeping and generation fields: no effect on what the model computes.
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

#: `torch_dtype` (4.x) or `dtype` (5.x) to ours.
_DTYPES: dict[str, DType] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def read_config(path: Path) -> ModelSpec:
    """The spec of a checkpoint's `config.json`: `llama4`, or the text-only `llama4_text`."""
    raw = read_json(path)
    top = Fields(str(path), raw)
    kind = top.take("model_type", str)
    quantization = top.left.pop("quantization_config", None)
    try:
        if kind == "llama4_text":
            spec = ModelSpec(
                name=path.parent.resolve().name,
                provenance="custom",
                notes=_notes(raw),
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
                name=path.parent.resolve().name,
                provenance="custom",
                notes=_notes(raw_text),
                dtype=_dtype(top, text),
                vision=_vision(vision),
                text=_text(text),
                tokens=_tokens(top, raw_text, image=REQUIRED),
            )
            top.require("tie_word_embeddings", spec.text.tie_embeddings, default=False)
            # Copies of the text config's ids that some writers put at the top level.
            top.finish(INERT | {"bos_token_id", "eos_token_id", "pad_token_id", "vocab_size"})
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


def _with_scheme(spec: ModelSpec, quantization: object, path: Path) -> ModelSpec:
    return spec.model_copy(update={"scheme": read_scheme(quantization, path, spec)})


def _text(at: Fields) -> TextSpec:
    at.left.pop("model_type", None)
    layers = at.size("num_hidden_layers", 4096)
    at.require("hidden_act", "silu")
    theta, scaling = _rope(at, "default", "llama3")
    rope = _layer_flags(at, layers)
    mask = _masks(at, layers, rope)
    qk_norm = at.take("use_qk_norm", bool)
    # Launch-week configs hold the int 4 here.
    temperature = bool(
        at.take("attn_temperature_tuning", bool, int, default=PUBLISHED["attn_temperature_tuning"])
    )
    hidden = at.size("intermediate_size")
    chunk = at.take("attention_chunk_size", int, default=None)
    text = TextSpec(
        layers=layers,
        dim=at.size("hidden_size"),
        heads=at.size("num_attention_heads"),
        kv_heads=at.size("num_key_value_heads"),
        head_dim=at.size("head_dim"),
        vocab=at.size("vocab_size"),
        max_positions=at.size("max_position_embeddings"),
        norm_eps=at.take("rms_norm_eps", float),
        attention_bias=at.take("attention_bias", bool, default=PUBLISHED["attention_bias"]),
        tie_embeddings=at.take("tie_word_embeddings", bool, default=False),
        attention="".join("L" if local else "G" for local in mask),
        rope="".join("R" if on else "N" for on in rope),
        qk_norm="".join("Q" if on and qk_norm else "-" for on in rope),
        temperature="".join("T" if temperature and not on else "-" for on in rope),
        ffn="".join("M" if moe else "D" for moe in _moe(at, layers)),
        chunk=chunk,
        rope_theta=theta,
        rope_scaling=scaling,
        temperature_floor=at.take("floor_scale", int, default=PUBLISHED["floor_scale"]),
        temperature_scale=at.take("attn_scale", float, default=PUBLISHED["attn_scale"]),
        dense_hidden=at.size("intermediate_size_mlp"),
        experts=Experts(
            count=at.size("num_local_experts"),
            top_k=at.size("num_experts_per_tok"),
            hidden=hidden,
            shared_hidden=hidden,
        ),
    )
    at.finish(INERT | {"bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype"})
    return text


def _layer_flags(at: Fields, layers: int) -> list[bool]:
    """Which layers rotate. `no_rope_layers` is named the wrong way round: 1 means RoPE."""
    interval = at.take("no_rope_layer_interval", int, default=PUBLISHED["no_rope_layer_interval"])
    if interval < 1:
        raise at.error("no_rope_layer_interval", str(interval), "at least 1")
    listed = at.take("no_rope_layers", list, default=[])
    if not listed:  # released Scout holds []: the default pattern
        return [bool((index + 1) % interval) for index in range(layers)]
    if len(listed) < layers or any(type(flag) is not int or flag not in (0, 1) for flag in listed):
        raise at.error("no_rope_layers", f"{len(listed)} values", f"{layers} values, each 0 or 1")
    return [bool(flag) for flag in listed[:layers]]


def _masks(at: Fields, layers: int, rope: list[bool]) -> list[bool]:
    types = at.take("layer_types", list, default=None)
    if types is None:
        return rope
    kinds = {str(kind) for kind in types}
    if len(types) != layers or kinds - {"chunked_attention", "full_attention"}:
        raise at.error(
            "layer_types",
            f"{len(types)} of {sorted(kinds)}",
            f"{layers} of 'chunked_attention' or 'full_attention'",
        )
    return [kind == "chunked_attention" for kind in types]


def _moe(at: Fields, layers: int) -> list[bool]:
    step = at.take("interleave_moe_layer_step", int)
    listed = at.take("moe_layers", list, default=None)
    if listed is None:
        if step < 1:
            raise at.error("interleave_moe_layer_step", str(step), "at least 1")
        return [(index + 1) % step == 0 for index in range(layers)]
    if any(type(index) is not int or not 0 <= index < layers for index in listed):
        raise at.error("moe_layers", str(listed), f"layer indices from 0 to {layers - 1}")
    return [index in listed for index in range(layers)]


def _rope(at: Fields, *kinds: str) -> tuple[float, RopeScaling | None]:
    """RoPE base and scaling: `rope_theta` + `rope_scaling`, or 5.x's `rope_parameters`."""
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
    kind = inner.take("rope_type", str)
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
        raise at.error("pixel_shuffle_ratio", str(ratio), "1/n for a whole n, such as 0.5")
    theta, _ = _rope(at, "default")
    out = at.size("projector_output_dim")
    at.require("vision_output_dim", out)
    vision = VisionSpec(
        layers=at.size("num_hidden_layers", 4096),
        dim=at.size("hidden_size"),
        heads=at.size("num_attention_heads"),
        hidden=at.size("intermediate_size"),
        image=at.size("image_size"),
        patch=at.size("patch_size"),
        channels=at.size("num_channels"),
        shuffle=round(1 / ratio),
        adapter_hidden=at.size("projector_input_dim"),
        adapter_out=out,
        rope_theta=theta,
    )
    at.finish(INERT | {"torch_dtype", "dtype"})
    return vision


def _dtype(top: Fields, text: Fields) -> DType:
    found = [
        value
        for fields in (top, text)
        for key in ("torch_dtype", "dtype")
        if (value := fields.take(key, str, default=None)) is not None
    ]
    if not found:
        raise top.error("torch_dtype", "no such field", " or ".join(_DTYPES))
    if len(set(found)) > 1 or found[0] not in _DTYPES:
        raise top.error("torch_dtype", str(found), f"one of {', '.join(_DTYPES)}")
    return _DTYPES[found[0]]


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
    scaling = text.get("rope_scaling") or {}
    if isinstance(scaling, dict) and (scaling.get("factor"), scaling.get("high_freq_factor")) == (
        8,
        4,
    ):
        return (
            "rope_scaling has factor 8 and high_freq_factor 4, the values of launch week; Meta "
            "corrected Scout to 16 and 1. They are used as they stand: check the model card.",
        )
    return ()


def write_config(spec: ModelSpec) -> dict[str, Any]:
    """The released-style `config.json` of `spec`; `read_config` gives the same spec back.

    Raises:
        MoecError: the spec has patterns that no Llama 4 config can say.
    """
    text, experts = spec.text, spec.text.experts
    layers = text.all_layers
    say = {
        "qk_norm": any(layer.qk_norm for layer in layers),
        "temperature": any(layer.temperature for layer in layers),
    }
    if (
        any(layer.qk_norm != (layer.rope and say["qk_norm"]) for layer in layers)
        or any(layer.temperature != (say["temperature"] and not layer.rope) for layer in layers)
        or experts.hidden != experts.shared_hidden
    ):
        refuse(
            f"spec {spec.name}",
            "QK-norm off a RoPE layer, temperature on one, or experts of two widths",
            "what a Llama 4 config.json can say",
            "keep the model as a spec file (moec spec show)",
        )
    dtype = {short: long for long, short in _DTYPES.items()}[spec.dtype]
    scaling = text.rope_scaling
    text_config = {
        "model_type": "llama4_text",
        "attention_bias": text.attention_bias,
        "attention_chunk_size": text.chunk,
        "attn_scale": text.temperature_scale,
        "attn_temperature_tuning": say["temperature"],
        "bos_token_id": spec.tokens.bos,
        "eos_token_id": list(spec.tokens.eos),
        "pad_token_id": spec.tokens.pad,
        "floor_scale": text.temperature_floor,
        "head_dim": text.head_dim,
        "hidden_act": "silu",
        "hidden_size": text.dim,
        "interleave_moe_layer_step": len(text.ffn) if text.ffn.strip("D") == "M" else 1,
        "intermediate_size": experts.hidden,
        "intermediate_size_mlp": text.dense_hidden,
        "layer_types": [
            "full_attention" if layer.chunk is None else "chunked_attention" for layer in layers
        ],
        "max_position_embeddings": text.max_positions,
        "moe_layers": [layer.index for layer in layers if layer.moe],
        "no_rope_layers": [int(layer.rope) for layer in layers],
        "num_attention_heads": text.heads,
        "num_experts_per_tok": experts.top_k,
        "num_hidden_layers": text.layers,
        "num_key_value_heads": text.kv_heads,
        "num_local_experts": experts.count,
        "rms_norm_eps": text.norm_eps,
        "rope_scaling": scaling
        and {
            "factor": scaling.factor,
            "high_freq_factor": scaling.high,
            "low_freq_factor": scaling.low,
            "original_max_position_embeddings": scaling.original_positions,
            "rope_type": "llama3",
        },
        "rope_theta": text.rope_theta,
        "tie_word_embeddings": text.tie_embeddings,
        "torch_dtype": dtype,
        "use_qk_norm": say["qk_norm"],
        "vocab_size": text.vocab,
    }
    scheme = {"quantization_config": write_scheme(spec)} if spec.scheme else {}
    if spec.vision is None:
        return {"architectures": ["Llama4ForCausalLM"], **text_config, **scheme}
    vision = spec.vision
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        **scheme,
        "boi_token_index": spec.tokens.image_start,
        "eoi_token_index": spec.tokens.image_end,
        "image_token_index": spec.tokens.image,
        "model_type": "llama4",
        "text_config": text_config,
        "tie_word_embeddings": text.tie_embeddings,
        "torch_dtype": dtype,
        "vision_config": {
            "model_type": "llama4_vision_model",
            "hidden_act": "gelu",
            "hidden_size": vision.dim,
            "image_size": vision.image,
            "intermediate_size": vision.hidden,
            "multi_modal_projector_bias": False,
            "num_attention_heads": vision.heads,
            "num_channels": vision.channels,
            "num_hidden_layers": vision.layers,
            "patch_size": vision.patch,
            "pixel_shuffle_ratio": 1 / vision.shuffle,
            "projector_input_dim": vision.adapter_hidden,
            "projector_output_dim": vision.adapter_out,
            "rope_theta": vision.rope_theta,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
            "vision_output_dim": vision.adapter_out,
        },
    }
