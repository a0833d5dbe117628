"""DeepSeek-MoE in plain PyTorch, written from its paper: transformers has no class for it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu


def deepseek_moe_logits(folder: Path, rows: Sequence[Tensor]) -> list[Tensor]:
    """Logits of each row [S], in float64."""
    config = json.loads((folder / "config.json").read_text())
    weights = {k: v.double() for k, v in load_file(folder / "model.safetensors").items()}
    return [_logits(config, weights, row) for row in rows]


def _logits(c: dict[str, Any], w: dict[str, Tensor], row: Tensor) -> Tensor:
    dim, heads, size = c["hidden_size"], c["num_attention_heads"], c["head_dim"]
    x = w["model.embed_tokens.weight"][row]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        h = rms_norm(x, (dim,), w[f"{at}.input_layernorm.weight"], c["rms_norm_eps"])
        q, k, v = (
            (h @ w[f"{at}.self_attn.{part}_proj.weight"].T).unflatten(1, (-1, size)).transpose(0, 1)
            for part in "qkv"
        )
        q, k = (_rotated(each, c["rope_theta"]) for each in (q, k))
        k, v = (each.repeat_interleave(heads // len(each), 0) for each in (k, v))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + mixed.transpose(0, 1).flatten(1) @ w[f"{at}.self_attn.o_proj.weight"].T
        h = rms_norm(x, (dim,), w[f"{at}.post_attention_layernorm.weight"], c["rms_norm_eps"])
        dense = i < c["first_k_dense_replace"]
        x = x + (_swiglu(w, f"{at}.mlp", h) if dense else _experts(c, w, f"{at}.mlp", h))
    x = rms_norm(x, (dim,), w["model.norm.weight"], c["rms_norm_eps"])
    return (x @ w["lm_head.weight"].T).float()


def _rotated(x: Tensor, theta: float) -> Tensor:
    """x [heads, S, d], whose halves make pairs."""
    _, count, size = x.shape
    rates = theta ** (-torch.arange(0, size, 2).double() / size)
    angles = torch.arange(count).double()[:, None] * rates
    one, two = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)


def _swiglu(w: dict[str, Tensor], at: str, x: Tensor) -> Tensor:
    gate, up, down = (w[f"{at}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


def _experts(c: dict[str, Any], w: dict[str, Tensor], at: str, x: Tensor) -> Tensor:
    scores = (x @ w[f"{at}.gate.weight"].T).softmax(-1)
    out = _swiglu(w, f"{at}.shared_experts", x)
    for token, row in enumerate(scores):
        best = row.topk(c["num_experts_per_tok"])
        total = best.values.sum() if c["norm_topk_prob"] else 1
        for score, expert in zip(best.values, best.indices.tolist(), strict=True):
            out[token] += score / total * _swiglu(w, f"{at}.experts.{expert}", x[token])
    return out
