"""Mixtral (https://arxiv.org/abs/2401.04088): the scores are a softmax over the chosen experts."""

from typing import Any

from moec.spec.bounded import limits
from moec.spec.fields import Fields
from moec.spec.hf.architectures.common import Architecture, Read
from moec.spec.hf.architectures.decoder import keys, read_decoder, softmax_routing, write_decoder
from moec.spec.model import ModelSpec
from moec.spec.parts.routing import Experts

_KEYS = keys("block_sparse_moe", expert={"gate": "w1", "up": "w3", "down": "w2"})


def _read(top: Fields, kind: str) -> Read:
    experts = Experts(
        count=top.size("num_local_experts", limits.EXPERTS),
        top_k=top.size("num_experts_per_tok", limits.EXPERTS),
        hidden=top.size("intermediate_size", limits.WIDTH),
        routing=softmax_routing(normalise=True),
    )
    window = top.take("sliding_window", int, default=None)
    attention = "S" if window else "G"
    return read_decoder(top, experts=experts, attention=attention, window=window)


def _write(spec: ModelSpec) -> dict[str, Any]:
    experts = spec.text.experts
    assert experts is not None
    return write_decoder(
        spec,
        "mixtral",
        "MixtralForCausalLM",
        intermediate_size=experts.hidden,
        num_local_experts=experts.count,
        num_experts_per_tok=experts.top_k,
        sliding_window=spec.text.window,
    )


MIXTRAL = Architecture(("mixtral",), _read, _write, _KEYS)
