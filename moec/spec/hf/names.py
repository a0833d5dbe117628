"""Our tensor names and the keys of a Hugging Face checkpoint: one table, used in both directions.

`{i}` stands for the index of a layer and `{e}` for that of an expert. Our tensors have the shapes
of the checkpoint's (linear weights [out, in], stacked experts [expert, in, out]), so that they can
be read in place. A weight in FP8 has the key of the plain weight, one of 4-bit integers its own.
The keys of scales depend on the scheme's layout.
"""

from functools import lru_cache

from moec.spec import names
from moec.spec.model import ModelSpec
from moec.spec.scheme import INT4, Layout
from moec.spec.tensors import tensors

#: what the keys of the decoder start with in a checkpoint with a vision tower
DECODER = "language_model."
#: what other keys of such a checkpoint start with
TOWER = ("vision_model.", "multi_modal_projector.")
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
_KEYS = TEXT | VISION | _SEPARATE
_CACHE_SCALES: dict[Layout, str] = {
    "modelopt": f"{_LAYER}.self_attn.{{x}}_proj.{{x}}_scale",
    "compressed-tensors": f"{_LAYER}.self_attn.{{x}}_scale",
}


def keys(spec: ModelSpec) -> dict[str, str]:
    """The checkpoint key of every tensor of `spec`, by our name.

    A model with a vision tower has the prefix `language_model.` on the keys of its decoder.
    """
    prefix = DECODER if spec.vision else ""
    layout = spec.scheme.layout if spec.scheme else "moec"
    found = tensors(spec)
    packed = {name for name in found if layout == INT4 and names.scale_of(name) in found}
    return {
        name: prefixed(key_of(name, layout), prefix) + ("_packed" if name in packed else "")
        for name in found
    }


def prefixed(key: str, prefix: str) -> str:
    """`key` with `prefix`, unless it belongs to the vision tower or the projector."""
    return key if key.startswith(TOWER) else prefix + key


@lru_cache(maxsize=1 << 16)  # a model of separate experts asks for tens of thousands, often
def key_of(name: str, layout: Layout = "moec") -> str:
    """The checkpoint key of the tensor `name`, without prefix. `layout` matters for scales only."""
    if names.is_cache_scale(name):
        template, numbers = names.template(name)
        key = _CACHE_SCALES.get(layout, _CACHE_SCALES["modelopt"])
        return key.format(x=names.scaled(template)[-1], **numbers)
    if names.is_input_scale(name):
        return names.input_scale_of(key_of(names.scaled(name)))
    if names.is_zero_point(name):
        return names.zero_point_of(key_of(name.removesuffix("_zero_point")))
    if names.is_scale(name):
        parameter = names.scaled(name)
        stacked = names.is_routed(parameter) and layout == "modelopt"
        return key_of(parameter) + ("_weight_scale" if stacked else "_scale")
    template, numbers = names.template(name)
    return _KEYS[template].format_map(numbers)
