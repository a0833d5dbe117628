"""Parameter names to checkpoint keys: one table, used in both directions.

`{i}` stands for a layer. Keys are those of the Hugging Face layout; every row is a view, so that no
byte is copied: our linear weights are [out, in] and our fused experts [expert, in, out], as theirs.
"""

import re
from dataclasses import dataclass

from moec.spec.errors import MoecError
from moec.spec.model import ModelSpec
from moec.spec.parameters import parameters
from moec.weights.checkpoint import Checkpoint
from moec.weights.shard import TensorEntry

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


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor of a checkpoint: our parameter, its key there, the shape both must have."""

    parameter: str
    key: str
    shape: tuple[int, ...]


def rows(spec: ModelSpec) -> list[Row]:
    """The whole checkpoint of `spec`: multimodal (`language_model.` prefix) or text only."""
    prefix = "language_model." if spec.vision else ""
    return [Row(name, _key(name, prefix), shape) for name, shape in parameters(spec).items()]


def _key(parameter: str, prefix: str) -> str:
    match = re.search(r"(?<=layers\.)\d+", parameter)
    index = match.group() if match else ""
    template = re.sub(r"layers\.\d+", "layers.{i}", parameter)
    key = prefix + TEXT[template] if template in TEXT else VISION[template]
    return key.replace("{i}", index)


def match(spec: ModelSpec, checkpoint: Checkpoint) -> dict[str, TensorEntry]:
    """The bytes of every parameter of `spec`. Each key is used once, each parameter filled once.

    Raises:
        MoecError: a tensor is missing, unexpected, or has another shape or dtype than the spec.
    """
    found, expected = dict(checkpoint.tensors), rows(spec)
    entries = {}
    for row in expected:
        entry = found.pop(row.key, None)
        if entry is None:
            raise MoecError(
                f"{checkpoint.folder}: {row.key}",
                "no such tensor",
                f"{spec.dtype} {list(row.shape)}",
                "fetch the missing shard, or compare config.json with the weights",
            )
        if (entry.dtype, entry.shape) != (spec.dtype, row.shape):
            raise MoecError(
                f"{entry.file}: {row.key}",
                f"{entry.dtype} {list(entry.shape)}",
                f"{spec.dtype} {list(row.shape)}, from config.json",
                "compare config.json with the weights: they are not of one model",
            )
        entries[row.parameter] = entry
    if found:
        name = min(found)
        raise MoecError(
            f"{found[name].file}: {name}",
            f"unexpected tensor ({len(found)} in all)",
            f"the {len(expected)} tensors of this config",
            "compare config.json with the weights: they are not of one model",
        )
    return entries
