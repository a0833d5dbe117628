"""Attention and its parts in plain programs on CUDA: moec's kernels for bf16, else torch.

The eager meaning, shapes and rules of each op are in `moec.graph_builder.ops`.
"""

import torch
from torch import Tensor

from moec.graph_builder import ops
from moec.kernels.launches import heads as launches
from moec.kernels.sizes import Heads, is_head
from moec.kernels.torch.launch import buffers, run


def head_norm(x: Tensor, weight: Tensor | None, heads: int, eps: float) -> Tensor:
    if x.dtype != torch.bfloat16:
        return ops.head_norm.eager(x, weight, heads, eps)  # type: ignore[no-any-return]
    x, size = x.contiguous(), x.shape[2] // heads
    out, gain = torch.empty_like(x), x if weight is None else weight.to(x.dtype)
    launch = launches.head_norm(size, x.numel() // size, eps, weight is not None)
    run(launch, {"x": x, "gain": gain, "out": out})
    return out


def rope(x: Tensor, cos: Tensor, sin: Tensor, heads: int, pairs: str) -> Tensor:
    if x.dtype != torch.bfloat16:
        return ops.rope.eager(x, cos, sin, heads, pairs)  # type: ignore[no-any-return]
    x = x.contiguous()
    (batch, steps, width), out = x.shape, torch.empty_like(x)
    launch = launches.rope(width // heads, heads, batch * steps, pairs == "adjacent")
    run(launch, {"x": x, "cos": cos.contiguous(), "sin": sin.contiguous(), "out": out})
    return out


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float | None,
) -> Tensor:
    batch, steps, width = q.shape
    size, group = width // heads, heads // kv_heads
    if mask is None or k.shape != v.shape:
        return ops.attention.eager(q, k, v, mask, heads, kv_heads, scale)  # type: ignore[no-any-return]
    if steps == 1 and q.dtype == torch.bfloat16 and is_head(size) and size <= launches.LARGEST:
        of = Heads(heads, kv_heads, size)
        many, wanted = launches.attend_slots(of, batch, k.shape[1], scale or size**-0.5)
        values = buffers(wanted, q.device)
        given = {"q": q, "key": k, "value": v, "mask": mask}
        values |= {name: each.contiguous() for name, each in given.items()}
        for launch in many:
            run(launch, {**values, "slots": k.shape[1]})
        return values["out"][:, None]
    if steps > 1 and group > 1:
        # With a mask and grouped heads, torch's only kernel writes all scores to memory.
        k, v = (
            x.view(*x.shape[:2], kv_heads, 1, size).expand(-1, -1, -1, group, -1).flatten(2)
            for x in (k, v)
        )
        kv_heads = heads
    return ops.attention.eager(q, k, v, mask, heads, kv_heads, scale)  # type: ignore[no-any-return]
