"""DeepSeek-V3 (https://arxiv.org/abs/2412.19437): latent attention, groups of experts, YaRN."""

from typing import Any

from moec.spec import names
from moec.spec.bounded import limits
from moec.spec.errors import refuse
from moec.spec.fields import Fields
from moec.spec.hf.architectures.common import Architecture, Read
from moec.spec.hf.architectures.decoder import LAYER, keys, read_decoder, write_decoder
from moec.spec.hf.architectures.deepseek_moe import experts_of, ffn_of, written
from moec.spec.model import ModelSpec, TextSpec
from moec.spec.parts.attention import Latent
from moec.spec.parts.routing import Routing

_ATTENTION = {
    "q_down": "q_a_proj",
    "q_up": "q_b_proj",
    "kv_down": "kv_a_proj_with_mqa",
    "kv_up": "kv_b_proj",
}
#: of the norms of latent vectors: no field of a config says it, `rms_norm_eps` is for the others
_LATENT_EPS = 1e-6
_NORMS = {"q_down": "q_a_layernorm", "kv_down": "kv_a_layernorm"}
#: the most layers of multi-token prediction that are left aside
_MOST_MTP = 8
_MTP = {
    "embed.norm": "enorm",
    "hidden.norm": "hnorm",
    "join": "eh_proj",
    "norm": "shared_head.norm",
}
_KEYS = (
    keys(shared="shared_experts")
    | {names.moe("{i}", "router", "bias"): f"{LAYER}.mlp.gate.e_score_correction_bias"}
    | {
        names.attention("{i}", ours, kind): f"{LAYER}.self_attn.{theirs}.{kind}"
        for ours, theirs in _ATTENTION.items()
        for kind in ("weight", "bias")
    }
    | {
        names.attention("{i}", ours, "norm", "weight"): f"{LAYER}.self_attn.{theirs}.weight"
        for ours, theirs in _NORMS.items()
    }
    | {
        names.mtp("{i}", ours, "weight"): f"{LAYER}.{theirs}.weight"
        for ours, theirs in _MTP.items()
    }
)


def _read(top: Fields, kind: str) -> Read:
    top.require("scoring_func", "sigmoid", default="sigmoid")
    top.require("topk_method", "noaux_tc", default="noaux_tc")
    groups = top.take("n_group", int, default=8)  # the defaults are those of transformers
    routing = Routing(
        choice="scores",
        bias=True,
        groups=groups,
        kept_groups=top.take("topk_group", int, default=4),
        normalise=top.take("norm_topk_prob", bool),
        factor=top.take("routed_scaling_factor", float),
        weighed="output",
    )
    rank = top.take("q_lora_rank", int, default=None)
    latent = Latent(
        q_rank=rank,
        kv_rank=top.size("kv_lora_rank", limits.WIDTH),
        nope=top.size("qk_nope_head_dim", limits.HEAD_DIM),
        rope=top.size("qk_rope_head_dim", limits.HEAD_DIM),
        value=top.size("v_head_dim", limits.HEAD_DIM),
        norm_eps=_LATENT_EPS,
    )
    if top.left.get("rope_interleave", True) is None:  # transformers takes null for false
        raise top.error("rope_interleave", "null", "true or false")
    pairs = "adjacent" if top.take("rope_interleave", bool, default=True) else "halves"
    more = top.take("num_nextn_predict_layers", int, default=1)  # as in transformers
    if more < 0:
        raise top.error("num_nextn_predict_layers", str(more), "0 or more")
    ffn = ffn_of(top)
    layers = top.left.get("num_hidden_layers")
    notes = (f"Left aside: {more} layers that predict further tokens, from {layers}.",)
    aside = {"aux_loss_alpha", "seq_aux", "ep_size", "head_dim", "qk_head_dim"}
    top.left["head_dim"] = latent.nope + latent.rope
    top.left["num_key_value_heads"] = top.left.get("num_attention_heads")
    return read_decoder(
        top,
        aside,
        ("default", "yarn"),
        notes if more > 1 else (),
        scores_scaled=True,
        mtp="aside" if more == 1 and "M" in ffn else "none",
        latent=latent,
        rope_pairs=pairs,
        experts=experts_of(top, routing),
        ffn=ffn,
        dense_hidden=top.size("intermediate_size", limits.WIDTH),
    )


def _write(spec: ModelSpec) -> dict[str, Any]:
    text, latent, experts = spec.text, spec.text.latent, spec.text.experts
    assert latent is not None and experts is not None
    if latent.norm_eps != _LATENT_EPS:
        refuse(
            f"spec {spec.name}",
            f"latent.norm_eps {latent.norm_eps}",
            f"{_LATENT_EPS}, as every DeepSeek-V3 has it",
            "keep the model as a spec file (moec spec show)",
        )
    routing = experts.routing
    more = {
        "head_dim": latent.rope,
        "kv_lora_rank": latent.kv_rank,
        "n_group": routing.groups,
        "num_nextn_predict_layers": int(text.mtp != "none"),
        "q_lora_rank": latent.q_rank,
        "qk_nope_head_dim": latent.nope,
        "qk_rope_head_dim": latent.rope,
        "rope_interleave": text.rope_pairs == "adjacent",
        "routed_scaling_factor": routing.factor,
        "scoring_func": "sigmoid",
        "topk_group": routing.kept_groups,
        "topk_method": "noaux_tc",
        "v_head_dim": latent.value,
    }
    return write_decoder(spec, "deepseek_v3", "DeepseekV3ForCausalLM", **written(spec), **more)


def _aside(text: TextSpec) -> str:
    """The layers of multi-token prediction; if it is built, the copies of embedding and head."""
    if text.mtp == "built":
        return rf"model\.layers\.{text.layers}\.(embed_tokens|shared_head\.head)\.weight$"
    after = "|".join(str(text.layers + each) for each in range(_MOST_MTP))
    return rf"model\.layers\.({after})\."


DEEPSEEK_V3 = Architecture(
    ("deepseek_v3",),
    _read,
    _write,
    _KEYS,
    aside=_aside,
    left_out={"num_nextn_predict_layers": 0},
)
