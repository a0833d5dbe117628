"""Write a Llama 4 `config.json`, in the released style (transformers 4.51)."""

from typing import Any

from moec.spec.errors import refuse
from moec.spec.hf.architectures.common import DTYPES, written_scaling
from moec.spec.model import ModelSpec
from moec.spec.parts.rope import Yarn
from moec.spec.parts.routing import Routing


def write(spec: ModelSpec) -> dict[str, Any]:
    """The released-style `config.json` of `spec`, without its scheme; `read` reads it back.

    Raises:
        MoecError: the spec has layer patterns that a Llama 4 config cannot express.
    """
    text, layers, experts = spec.text, spec.text.all_layers, spec.text.experts
    # A config has one switch for all layers. QK-norm then applies to layers with RoPE, temperature
    # to those without.
    qk_norm = any(layer.qk_norm for layer in layers)
    temperature = any(layer.temperature for layer in layers)
    if (
        any(bool(layer.qk_norm) != (layer.rope and qk_norm) for layer in layers)
        or any(layer.temperature != (temperature and not layer.rope) for layer in layers)
        or (experts and experts.hidden != experts.shared_hidden)
        or (experts and experts.routing != Routing())
        or isinstance(text.rope_scaling, Yarn)
    ):
        refuse(
            f"spec {spec.name}",
            "QK-norm without RoPE, temperature with RoPE, experts of two widths, YaRN, a router",
            "a model that a Llama 4 config.json can express",
            "keep the model as a spec file (moec spec show)",
        )
    dtype = {short: long for long, short in DTYPES.items()}[spec.dtype]
    text_config = {
        "model_type": "llama4_text",
        "attention_bias": text.attention_bias,
        # transformers makes a chunked mask even where no layer uses it, and needs a size for it.
        "attention_chunk_size": text.chunk or text.max_positions,
        "attn_scale": text.temperature_scale,
        "attn_temperature_tuning": temperature,
        "bos_token_id": spec.tokens.bos,
        "eos_token_id": list(spec.tokens.eos),
        "pad_token_id": spec.tokens.pad,
        "floor_scale": text.temperature_floor,
        "head_dim": text.head_dim,
        "hidden_act": "silu",
        "hidden_size": text.dim,
        "interleave_moe_layer_step": len(text.ffn)
        if text.ffn.strip("D") == "M"
        else int("M" in text.ffn),
        "intermediate_size": experts.hidden if experts else text.dense_hidden,
        "intermediate_size_mlp": text.dense_hidden,
        "layer_types": [
            "full_attention" if layer.chunk is None else "chunked_attention" for layer in layers
        ],
        "max_position_embeddings": text.max_positions,
        "moe_layers": [layer.index for layer in layers if layer.moe],
        "no_rope_layers": [int(layer.rope) for layer in layers],
        "num_attention_heads": text.heads,
        "num_experts_per_tok": experts.top_k if experts else 0,
        "num_hidden_layers": text.layers,
        "num_key_value_heads": text.kv_heads,
        "num_local_experts": experts.count if experts else 0,
        "rms_norm_eps": text.norm_eps,
        "rope_scaling": text.rope_scaling and written_scaling(text.rope_scaling),
        "rope_theta": text.rope_theta,
        "tie_word_embeddings": text.tie_embeddings,
        "torch_dtype": dtype,
        "use_qk_norm": qk_norm,
        "vocab_size": text.vocab,
    }
    if spec.vision is None:
        return {"architectures": ["Llama4ForCausalLM"], **text_config}
    vision = spec.vision
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
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


def generation(spec: ModelSpec) -> dict[str, Any]:
    """Whether attention has a temperature: vLLM does not look for it in config.json.

    Without this field vLLM decides by the longest context that it is started for.
    """
    return {"attn_temperature_tuning": any(each.temperature for each in spec.text.all_layers)}
