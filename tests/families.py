"""Small models of every architecture but Llama 4, which among them have every switch."""

from typing import Any

from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced

YARN = {"factor": 4.0, "original_positions": 16, "mscale": 0.7, "mscale_all_dim": 1.3}
YARN = {**YARN, "scales_scores": True}


def small(preset: str, routing: dict[str, Any] | None = None, **text: Any) -> ModelSpec:
    """Three narrow layers of a preset with eight experts, some fields changed."""
    spec = reduced(PRESETS[preset], 3)
    experts = spec.text.experts
    assert experts is not None
    top = min(experts.top_k, 3)
    how = experts.routing.model_dump()
    if how["groups"] > 1:
        how |= {"groups": 4, "kept_groups": 2}
    fewer = experts.model_dump() | {"count": 8, "top_k": top, "routing": how | (routing or {})}
    values = spec.model_dump()
    values["text"] |= {"experts": fewer, "ffn": "DMM" if "D" in spec.text.ffn else "M"}
    values["text"] |= {"mtp": "none", **text}  # checkpoints of random weights have no such layer
    return ModelSpec.model_validate(values)


CASES = {
    "olmoe": small("olmoe-1b-7b", head_dim=16),
    "olmoe clipped": small(
        "olmoe-1b-7b", {"normalise": True}, clip_qkv=0.6, head_dim=16, kv_heads=1
    ),
    "qwen3": small("qwen3-30b-a3b"),
    "qwen3 windows, dense layer": small(
        "qwen3-30b-a3b", {"normalise": False}, attention="S", window=7, ffn="MDM"
    ),
    "mixtral": small("mixtral-8x7b"),
    "mixtral window, tied": small("mixtral-8x7b", attention="S", window=5, tie_embeddings=True),
    "deepseek-moe": small("deepseek-moe-16b"),
    "deepseek-v3": small("deepseek-v3"),
    "deepseek-v3 straight": small(
        "deepseek-v3",
        {"normalise": False, "factor": 1.5},
        rope_pairs="halves",
        rope_scaling=YARN,
        norm_eps=0.01,  # but 1e-6 for the norms of latent vectors
        latent={"q_rank": None, "kv_rank": 16, "nope": 8, "rope": 8, "value": 12},
    ),
    "aria": small("aria"),
}


def with_layer(spec: ModelSpec) -> ModelSpec:
    """`spec` with a layer of multi-token prediction."""
    return spec.model_copy(update={"text": spec.text.model_copy(update={"mtp": "built"})})
