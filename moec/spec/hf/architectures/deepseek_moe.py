"""DeepSeek-MoE (https://arxiv.org/abs/2401.06066): many small experts beside shared ones."""

from typing import Any

from moec.spec.bounded import limits
from moec.spec.fields import Fields
from moec.spec.hf.architectures.common import Architecture, Read
from moec.spec.hf.architectures.decoder import keys, read_decoder, softmax_routing, write_decoder
from moec.spec.model import ModelSpec
from moec.spec.parts.routing import Experts, Routing

_KEYS = keys(shared="shared_experts")


def experts_of(top: Fields, routing: Routing) -> Experts:
    """The experts, in the fields that all models of DeepSeek have."""
    hidden = top.size("moe_intermediate_size", limits.WIDTH)
    shared = top.take("n_shared_experts", int, default=None)
    return Experts(
        count=top.size("n_routed_experts", limits.EXPERTS),
        top_k=top.size("num_experts_per_tok", limits.EXPERTS),
        hidden=hidden,
        shared_hidden=hidden * shared if shared else None,
        routing=routing,
    )


def ffn_of(top: Fields) -> str:
    """Which layers have experts: from `first_k_dense_replace` on, every `moe_layer_freq`-th."""
    layers = top.left.get("num_hidden_layers")
    first = top.take("first_k_dense_replace", int)
    every = top.take("moe_layer_freq", int, default=1)
    if every < 1:
        raise top.error("moe_layer_freq", str(every), "at least 1")
    if type(layers) is not int or not 0 < layers <= limits.LAYERS:
        return "M"  # the reader of that field says what is wrong
    return "".join("M" if index >= first and index % every == 0 else "D" for index in range(layers))


def _read(top: Fields, kind: str) -> Read:
    top.require("scoring_func", "softmax", default="softmax")
    # The published code normalises the scores of several experts, and leaves that of one alone.
    several = top.left.get("num_experts_per_tok") != 1
    routing = softmax_routing(top.take("norm_topk_prob", bool) and several)
    return read_decoder(
        top,
        {"aux_loss_alpha", "seq_aux"},
        experts=experts_of(top, routing),
        ffn=ffn_of(top),
        dense_hidden=top.size("intermediate_size", limits.WIDTH),
    )


def written(spec: ModelSpec) -> dict[str, Any]:
    """The fields of experts that all models of DeepSeek have."""
    text, experts = spec.text, spec.text.experts
    assert experts is not None
    dense = next((layer.index for layer in text.all_layers if layer.moe), text.layers)
    return {
        "first_k_dense_replace": dense,
        "intermediate_size": text.dense_hidden or experts.hidden,
        "moe_intermediate_size": experts.hidden,
        "moe_layer_freq": 1,
        "n_routed_experts": experts.count,
        "n_shared_experts": experts.shared_hidden and experts.shared_hidden // experts.hidden,
        "norm_topk_prob": experts.routing.normalise,
        "num_experts_per_tok": experts.top_k,
    }


def _write(spec: ModelSpec) -> dict[str, Any]:
    more = written(spec) | {"scoring_func": "softmax"}
    return write_decoder(spec, "deepseek", "DeepseekForCausalLM", **more)


DEEPSEEK_MOE = Architecture(("deepseek",), _read, _write, _KEYS)
