"""Our tensor names and the keys of a Hugging Face checkpoint: one table, used in both directions.

`{i}` stands for the index of a layer and `{e}` for that of an expert. Our tensors have the shapes
of the checkpoint's (linear weights [out, in], stacked experts [expert, in, out]), so that they can
be read in place. A quantised weight has the key of the plain weight. The keys of its scales depend
on the scheme's layout.
"""

import re

from moec.spec.model import ModelSpec
from moec.spec.scheme import Layout
from moec.spec.tensors import tensors

_SWIGLU = ("gate", "up", "down")

TEXT = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "layers.{i}.attn.norm.weight": "model.layers.{i}.input_layernorm.weight",
    **{
        f"layers.{{i}}.attn.{x}.{kind}": f"model.layers.{{i}}.self_attn.{x}_proj.{kind}"
        for x in "qkvo"
        for kind in ("weight", "bias")
    },
    "layers.{i}.ffn.norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    **{
        f"layers.{{i}}.ffn.{x}.weight": f"model.layers.{{i}}.feed_forward.{x}_proj.weight"
        for x in _SWIGLU
    },
    "layers.{i}.moe.router.weight": "model.layers.{i}.feed_forward.router.weight",
    "layers.{i}.moe.gate_up": "model.layers.{i}.feed_forward.experts.gate_up_proj",
    "layers.{i}.moe.down": "model.layers.{i}.feed_forward.experts.down_proj",
    **{
        f"layers.{{i}}.moe.shared.{x}.weight": (
            f"model.layers.{{i}}.feed_forward.shared_expert.{x}_proj.weight"
        )
        for x in _SWIGLU
    },
}

_BIASED = ("weight", "bias")
VISION = {
    "projector.weight": "multi_modal_projector.linear_1.weight",
    "vision.patch.weight": "vision_model.patch_embedding.linear.weight",
    "vision.class_token": "vision_model.class_embedding",
    "vision.positions": "vision_model.positional_embedding_vlm",
    **{
        f"vision.{x}.{k}": f"vision_model.layernorm_{x}.{k}"
        for x in ("pre", "post")
        for k in _BIASED
    },
    **{
        f"vision.layers.{{i}}.attn.{x}.{k}": (
            f"vision_model.model.layers.{{i}}.self_attn.{x}_proj.{k}"
        )
        for x in "qkvo"
        for k in _BIASED
    },
    **{
        f"vision.layers.{{i}}.{ours}.{k}": f"vision_model.model.layers.{{i}}.{theirs}.{k}"
        for ours, theirs in (
            ("attn.norm", "input_layernorm"),
            ("mlp.norm", "post_attention_layernorm"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
        )
        for k in _BIASED
    },
    "vision.adapter.fc1.weight": "vision_model.vision_adapter.mlp.fc1.weight",
    "vision.adapter.fc2.weight": "vision_model.vision_adapter.mlp.fc2.weight",
}

_SEPARATE = {
    f"layers.{{i}}.moe.experts.{{e}}.{x}.weight": (
        f"model.layers.{{i}}.feed_forward.experts.{{e}}.{x}_proj.weight"
    )
    for x in _SWIGLU
}
_KEYS = TEXT | VISION | _SEPARATE
_CACHE_SCALES: dict[Layout, str] = {
    "modelopt": "model.layers.{i}.self_attn.{x}_proj.{x}_scale",
    "compressed-tensors": "model.layers.{i}.self_attn.{x}_scale",
}


def keys(spec: ModelSpec) -> dict[str, str]:
    """The checkpoint key of every tensor of `spec`, by our name.

    A model with a vision tower has the prefix `language_model.` on the keys of its decoder.
    """
    prefix = "language_model." if spec.vision else ""
    layout = spec.scheme.layout if spec.scheme else "moec"
    return {name: prefixed(key_of(name, layout), prefix) for name in tensors(spec)}


def prefixed(key: str, prefix: str) -> str:
    """`key` with `prefix`, unless it belongs to the vision tower or the projector."""
    return key if key.startswith(("vision_model.", "multi_modal_projector.")) else prefix + key


def key_of(name: str, layout: Layout = "moec") -> str:
    """The checkpoint key of the tensor `name`, without prefix. `layout` matters for scales only."""
    fused = "_weight_scale" if layout == "modelopt" else "_scale"
    for ours, weight, theirs in (
        (".weight_scale", ".weight", "_scale"),
        ("_input_scale", "", "_input_scale"),
        ("_scale", "", fused),
    ):
        if name.endswith(ours) and not name.endswith(("k_scale", "v_scale", ".input_scale")):
            return key_of(name.removesuffix(ours) + weight) + theirs
    if name.endswith(".input_scale"):
        return key_of(name.replace("input_scale", "weight")).replace(".weight", ".input_scale")
    layer = re.sub(r"^(.*?layers)\.(\d+)", r"\1.{i}", name)
    template = re.sub(r"experts\.(\d+)", "experts.{e}", layer)
    numbers = dict(zip("ie", re.findall(r"(?:layers|experts)\.(\d+)", name), strict=False))
    return _key(template, layout).format_map(numbers)


def _key(template: str, layout: Layout) -> str:
    for part in "kv":
        if template == f"layers.{{i}}.attn.{part}_scale":
            return _CACHE_SCALES.get(layout, _CACHE_SCALES["modelopt"]).replace("{x}", part)
    return _KEYS[template]
