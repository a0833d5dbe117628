"""Aria's decoder (https://arxiv.org/abs/2410.05993): experts in two tensors, two shared in one."""

from typing import Any

from moec.spec import names
from moec.spec.bounded import limits
from moec.spec.fields import Fields
from moec.spec.hf.architectures.common import Architecture, Read
from moec.spec.hf.architectures.decoder import LAYER, keys, read_decoder, write_decoder
from moec.spec.model import ModelSpec
from moec.spec.parts.routing import Experts, Routing

_KEYS = keys(router="router", shared="shared_experts") | {
    names.moe("{i}", "gate_up"): f"{LAYER}.mlp.experts.fc1.weight",
    names.moe("{i}", "down"): f"{LAYER}.mlp.experts.fc2.weight",
}


def _read(top: Fields, kind: str) -> Read:
    # Older revisions have another number in intermediate_size, which no layer uses.
    older = "moe_intermediate_size" in top
    hidden = top.size("moe_intermediate_size" if older else "intermediate_size", limits.WIDTH)
    experts = Experts(
        count=top.size("moe_num_experts", limits.EXPERTS),
        top_k=top.size("moe_topk", limits.EXPERTS),
        hidden=hidden,
        shared_hidden=hidden * top.size("moe_num_shared_experts", limits.EXPERTS),
        routing=Routing(score="softmax_of_chosen", weighed="output"),
    )
    top.require("mlp_bias", False, default=False)
    aside = {"moe_z_loss_coeff", "moe_aux_loss_coeff", "intermediate_size"}
    return read_decoder(top, aside, experts=experts)


def _write(spec: ModelSpec) -> dict[str, Any]:
    experts = spec.text.experts
    assert experts is not None
    return write_decoder(
        spec,
        "aria_text",
        "AriaTextForCausalLM",
        intermediate_size=experts.hidden,
        mlp_bias=False,
        moe_num_experts=experts.count,
        moe_num_shared_experts=(experts.shared_hidden or 0) // experts.hidden,
        moe_topk=experts.top_k,
    )


ARIA_TEXT = Architecture(
    ("aria_text",),
    _read,
    _write,
    _KEYS,
    separate_experts=False,
    reads_apart=False,
)
