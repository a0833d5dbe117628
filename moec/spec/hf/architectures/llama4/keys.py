"""The keys of a Llama 4 checkpoint.

Our tensors have the shapes of the checkpoint's (linear weights [out, in], stacked experts [expert,
in, out]), so that they can be read in place.
"""

from moec.spec import names

_SWIGLU = ("gate", "up", "down")
_BIASED = ("weight", "bias")
_LAYER, _TOWER = "model.layers.{i}", "vision_model.model.layers.{i}"

TEXT = {
    names.EMBED_WEIGHT: "model.embed_tokens.weight",
    names.NORM_WEIGHT: "model.norm.weight",
    names.HEAD_WEIGHT: "lm_head.weight",
    names.attention("{i}", "norm", "weight"): f"{_LAYER}.input_layernorm.weight",
    **{
        names.attention("{i}", x, kind): f"{_LAYER}.self_attn.{x}_proj.{kind}"
        for x in "qkvo"
        for kind in _BIASED
    },
    names.dense("{i}", "norm", "weight"): f"{_LAYER}.post_attention_layernorm.weight",
    **{names.dense("{i}", x, "weight"): f"{_LAYER}.feed_forward.{x}_proj.weight" for x in _SWIGLU},
    names.moe("{i}", "router", "weight"): f"{_LAYER}.feed_forward.router.weight",
    names.moe("{i}", "gate_up"): f"{_LAYER}.feed_forward.experts.gate_up_proj",
    names.moe("{i}", "down"): f"{_LAYER}.feed_forward.experts.down_proj",
    **{
        names.shared("{i}", x, "weight"): f"{_LAYER}.feed_forward.shared_expert.{x}_proj.weight"
        for x in _SWIGLU
    },
}

VISION = {
    names.PROJECTOR_WEIGHT: "multi_modal_projector.linear_1.weight",
    names.PATCH_WEIGHT: "vision_model.patch_embedding.linear.weight",
    names.CLASS_TOKEN: "vision_model.class_embedding",
    names.POSITIONS: "vision_model.positional_embedding_vlm",
    **{
        names.vision(x, kind): f"vision_model.layernorm_{x}.{kind}"
        for x in ("pre", "post")
        for kind in _BIASED
    },
    **{
        names.vision_layer("{i}", "attn", x, kind): f"{_TOWER}.self_attn.{x}_proj.{kind}"
        for x in "qkvo"
        for kind in _BIASED
    },
    **{
        names.vision_layer("{i}", *ours, kind): f"{_TOWER}.{theirs}.{kind}"
        for ours, theirs in (
            (("attn", "norm"), "input_layernorm"),
            (("mlp", "norm"), "post_attention_layernorm"),
            (("mlp", "fc1"), "mlp.fc1"),
            (("mlp", "fc2"), "mlp.fc2"),
        )
        for kind in _BIASED
    },
    **{
        names.vision("adapter", x, "weight"): f"vision_model.vision_adapter.mlp.{x}.weight"
        for x in ("fc1", "fc2")
    },
}

_SEPARATE = {
    names.moe("{i}", "experts", "{e}", x, "weight"): (
        f"{_LAYER}.feed_forward.experts.{{e}}.{x}_proj.weight"
    )
    for x in _SWIGLU
}
KEYS = TEXT | VISION | _SEPARATE
