"""OLMoE (https://arxiv.org/abs/2409.02060): QK-norm over all heads, no shared expert."""

from typing import Any

from moec.spec.bounded import limits
from moec.spec.fields import Fields
from moec.spec.hf.architectures.common import Architecture, Read
from moec.spec.hf.architectures.decoder import keys, read_decoder, softmax_routing, write_decoder
from moec.spec.model import ModelSpec
from moec.spec.parts.routing import Experts

_KEYS = keys()


def _read(top: Fields, kind: str) -> Read:
    experts = Experts(
        count=top.size("num_experts", limits.EXPERTS),
        top_k=top.size("num_experts_per_tok", limits.EXPERTS),
        hidden=top.size("intermediate_size", limits.WIDTH),
        routing=softmax_routing(top.take("norm_topk_prob", bool)),
    )
    clip = top.take("clip_qkv", float, default=None)
    return read_decoder(top, experts=experts, qk_norm="W", clip_qkv=clip)


def _write(spec: ModelSpec) -> dict[str, Any]:
    experts = spec.text.experts
    assert experts is not None
    return write_decoder(
        spec,
        "olmoe",
        "OlmoeForCausalLM",
        clip_qkv=spec.text.clip_qkv,
        intermediate_size=experts.hidden,
        norm_topk_prob=experts.routing.normalise,
        num_experts=experts.count,
        num_experts_per_tok=experts.top_k,
    )


OLMOE = Architecture(("olmoe",), _read, _write, _KEYS)
