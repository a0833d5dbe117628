"""Qwen3-MoE (https://arxiv.org/abs/2505.09388): QK-norm per head before RoPE, no shared expert."""

from typing import Any

from moec.spec.bounded import limits
from moec.spec.fields import Fields, shown
from moec.spec.hf.architectures.common import Architecture, Read
from moec.spec.hf.architectures.decoder import keys, read_decoder, softmax_routing, write_decoder
from moec.spec.model import ModelSpec
from moec.spec.parts.routing import Experts

_KEYS = keys()


def _read(top: Fields, kind: str) -> Read:
    count = "num_experts" if "num_experts" in top else "num_local_experts"
    experts = Experts(
        count=top.size(count, limits.EXPERTS),
        top_k=top.size("num_experts_per_tok", limits.EXPERTS),
        hidden=top.size("moe_intermediate_size", limits.WIDTH),
        routing=softmax_routing(top.take("norm_topk_prob", bool)),
    )
    sliding = top.take("use_sliding_window", bool, default=False)
    # null means that no layer has a window; without the field transformers has one of 4,096
    null = top.left.get("sliding_window", 0) is None
    window = top.take("sliding_window", int, default=4096) if sliding and not null else None
    return read_decoder(
        top,
        {"max_window_layers", "sliding_window", "num_experts", "num_local_experts"},
        experts=experts,
        ffn=_ffn(top),
        dense_hidden=top.size("intermediate_size", limits.WIDTH),
        qk_norm="H",
        attention="S" if window else "G",
        window=window,
    )


def _ffn(top: Fields) -> str:
    """Which layers have experts: every `decoder_sparse_step`-th, but those of `mlp_only_layers`."""
    layers = top.left.get("num_hidden_layers")
    step = top.size("decoder_sparse_step")
    dense = top.take("mlp_only_layers", list, default=[])
    if type(layers) is not int or not 0 < layers <= limits.LAYERS:
        return "M"  # the reader of that field says what is wrong
    if any(type(index) is not int or not 0 <= index < layers for index in dense):
        raise top.error("mlp_only_layers", shown(dense), f"layer indices from 0 to {layers - 1}")
    return "".join(
        "M" if (index + 1) % step == 0 and index not in dense else "D" for index in range(layers)
    )


def _write(spec: ModelSpec) -> dict[str, Any]:
    text, experts = spec.text, spec.text.experts
    assert experts is not None
    return write_decoder(
        spec,
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        decoder_sparse_step=1,
        intermediate_size=text.dense_hidden or experts.hidden,
        mlp_only_layers=[layer.index for layer in text.all_layers if not layer.moe],
        moe_intermediate_size=experts.hidden,
        norm_topk_prob=experts.routing.normalise,
        num_experts=experts.count,
        num_experts_per_tok=experts.top_k,
        sliding_window=text.window,
        use_sliding_window=text.window is not None,
    )


QWEN3_MOE = Architecture(("qwen3_moe",), _read, _write, _KEYS)
