"""Every fused op: kernels against eager meaning on random operands; on a GPU, or interpreted."""

from collections.abc import Iterator

import torch
from torch import Tensor

from moec.graph_builder import ops
from moec.kernels.torch import ops as torch_ops

FP8 = torch.float8_e4m3fn


def narrow(*shape: int, device: str) -> tuple[Tensor, Tensor]:
    """Random codes, and a scale for each row."""
    wide = torch.randn(*shape, device=device) / shape[-1] ** 0.5
    scale = wide.abs().amax(-1) / 448
    return (wide / scale[..., None]).to(FP8), scale


def meaning(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.float() * scale[:, None]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def limit(name: str) -> float:
    """The largest error: bf16 differs by a rounding here and there, codes by a step of theirs.

    Experts round what SwiGLU made: where sums of another order round a row's largest element the
    other way, its scale moves, and with that all its codes; few tokens have no others to even it.
    """
    if "again" in name:
        return 0.0
    if "attention" in name:
        return 3.5e-2
    if name in ("rope_table", "temperature"):
        return 1e-6
    return 2e-2 if name in ("moe", "norm and moe") else 5e-3


def steps(device: str, dim: int, tokens: int) -> Iterator[tuple[str, float]]:
    """(what, relative error) of what works on packed tokens."""
    x, y = (torch.randn(tokens, dim, device=device).bfloat16() for _ in range(2))
    gain = (1 + torch.randn(dim, device=device) / 10).bfloat16()
    pairs = {
        "norm_fp8": ((x, gain, 1e-5), ops.norm_fp8, torch_ops.norm_fp8),
        "skip_norm_fp8": ((x, y, gain, 1e-5), ops.skip_norm_fp8, torch_ops.skip_norm_fp8),
        "encode": ((x,), ops.encode, torch_ops.encode),
        "swiglu_fp8": ((x,), ops.swiglu_fp8, torch_ops.swiglu_fp8),
    }
    for name, (given, op, kernel) in pairs.items():
        expected, found = op.eager(*given), kernel(*given)  # type: ignore[operator]
        yield name, error(meaning(*found[:2]), meaning(*expected[:2]))
        if len(expected) == 3:
            yield f"{name}, sum", error(found[2], expected[2])
    expected, found = ops.skip_norm.eager(x, y, gain, 1e-5), torch_ops.skip_norm(x, y, gain, 1e-5)
    yield "skip_norm", max(map(error, found, expected))
    yield "rms_norm", error(torch_ops.rms_norm(x, gain, 1e-5), ops.rms_norm.eager(x, gain, 1e-5))
    codes, scale = ops.encode.eager(x)
    weight, weight_scale = narrow(2 * dim, dim, device=device)
    given = codes, scale, weight, weight_scale, "bf16"
    expected = ops.fp8_linear.eager(*given)
    found = torch_ops.fp8_linear(*given)
    yield "fp8_linear", error(found, expected)
    yield "fp8_linear, again", float((torch_ops.fp8_linear(*given) != found).sum())


def tables(device: str, size: int, batch: int, count: int) -> Iterator[tuple[str, float]]:
    """(what, relative error) of what a step makes of positions, far ones too; and of its end."""
    positions = torch.randint(0, 10_000_000, (batch, count), device=device)
    positions[0, 0] = 8191  # where a temperature's step begins
    for scaling, numbers in (("none", []), ("bands", [16.0, 1.0, 1.0, 8192.0])):
        given = positions, size, 5e5, scaling, numbers, 1.0
        found, expected = torch_ops.rope_table(*given), ops.rope_table.eager(*given)
        yield "rope_table", max(map(error, found, expected))
    given = positions, 8192, 0.1
    yield "temperature", error(torch_ops.temperature(*given), ops.temperature.eager(*given))
    past = torch.randint(0, 5000, (batch,), device=device)
    found, expected = torch_ops.positions(positions, past), ops.positions.eager(positions, past)
    yield "positions, again", float((found != expected).sum())
    x = torch.randn(batch, count, 64, device=device).bfloat16()
    index = torch.randint(0, count, (batch, 1), device=device)
    found, expected = torch_ops.select(x, index), ops.select.eager(x, index)
    yield "select, again", float((found != expected).sum())


def experts(
    device: str, dim: int, hidden: int, count: int, tokens: int
) -> Iterator[tuple[str, float]]:
    """(what, relative error) of an MoE layer, with and without the norm before it."""
    x, y = (torch.randn(tokens, dim, device=device).bfloat16() for _ in range(2))
    gain = (1 + torch.randn(dim, device=device) / 10).bfloat16()
    router = (2 * torch.randn(count, dim, device=device) / dim**0.5).bfloat16()
    layer = (
        router, *narrow(count + 1, 2 * hidden, dim, device=device),
        *narrow(count + 1, dim, hidden, device=device),
    )  # fmt: skip
    yield "moe", error(torch_ops.moe_layer(x, *layer), ops.moe_layer.eager(x, *layer))
    normed, total = ops.skip_norm.eager(x, y, gain, 1e-5)
    found = torch_ops.norm_moe(x, y, gain, 1e-5, *layer)
    yield "norm and moe", error(found[0], ops.moe_layer.eager(normed, *layer))
    yield "norm and moe, sum", error(found[1], total)
    three = torch_ops.norm_moe_norm_fp8(x, y, gain, 1e-5, *layer, gain)
    following = ops.skip_norm_fp8.eager(found[1], found[0], gain, 1e-5)
    yield "norm, moe and norm", error(meaning(*three[:2]), meaning(*following[:2]))
    yield "norm, moe and norm, sum", error(three[2], following[2])
    again = torch_ops.norm_moe(x, y, gain, 1e-5, *layer)
    yield "norm and moe, again", float((again[0] != found[0]).sum())


def attention(
    device: str, batch: int, heads: int, kv_heads: int, size: int, slots: int, count: int
) -> Iterator[tuple[str, float]]:
    """(what, relative error) of `count` tokens a row, at random places of buffers."""
    width = (heads + 2 * kv_heads) * size
    qkv = torch.randn(batch, count, width, device=device).bfloat16()
    last = torch.randint(count - 1, slots, (batch,), device=device, dtype=torch.int32)
    cos, sin = ops.rope_table.eager(
        last[:, None].long() + torch.arange(1 - count, 1, device=device), size, 5e5, "none", [], 1.0
    )
    factor = 1 + torch.rand(batch, count, 1, device=device)
    total = (last.max() + 1).int().cpu()
    for name, tables, eps in (
        ("rope and norm", (cos, sin, None), 1e-5), ("rope", (cos, sin, None), None),
        ("temperature", (None, None, factor), None),
    ):  # fmt: skip
        shape = batch, kv_heads, slots, size
        buffers = [torch.randn(shape, device=device).bfloat16() for _ in range(2)]
        mine = [each.clone() for each in buffers]
        q = ops.rope_append.eager(qkv, *tables, *buffers, last, heads, kv_heads, eps)
        expected = ops.attend.eager(q, *buffers, last, total, heads, kv_heads).flatten(0, 1)
        given = qkv.flatten(0, 1), *tables, *mine, last, total, heads, kv_heads, eps
        found = torch_ops.attention_fp8(*given)
        yield f"{name}: buffers", max(map(error, mine, buffers))
        yield f"{name}: attention", error(meaning(*found), meaning(*ops.encode.eager(expected)))
        again = torch_ops.attention_fp8(*given)
        yield f"{name}, again", float((meaning(*again) != meaning(*found)).sum())


def plain(
    device: str, batch: int, heads: int, kv_heads: int, size: int, slots: int
) -> Iterator[tuple[str, float]]:
    """(what, relative error) of the parts of attention in plain programs."""
    x = torch.randn(batch, 3, heads * size, device=device).bfloat16()
    for gain in (None, (1 + torch.randn(size, device=device) / 10).bfloat16()):
        given = x, gain, heads, 1e-6
        yield "head_norm", error(torch_ops.head_norm(*given), ops.head_norm.eager(*given))
    at = torch.randint(0, 5000, (batch, 3), device=device)
    tables = ops.rope_table.eager(at, size, 5e5, "none", [], 1.0)
    for pairs in ("adjacent", "halves"):
        given = x, *tables, heads, pairs
        yield f"rope, {pairs}", error(torch_ops.rope(*given), ops.rope.eager(*given))
    q = x[:, :1]
    key, value = (
        torch.randn(batch, slots, kv_heads * size, device=device).bfloat16() for _ in range(2)
    )
    mask = torch.rand(batch, 1, 1, slots, device=device) < 0.5
    mask[..., slots // 2 :] &= torch.arange(batch, device=device)[:, None, None, None] % 2 > 0
    mask[..., slots // 3] = True  # every token sees a slot
    for each in (key, value):
        each.masked_fill_(~mask[:, 0, 0, :, None], torch.nan)  # no other slot is read
    for scale in (None, 0.2):
        given = q, key, value, mask, heads, kv_heads, scale
        found = torch_ops.attention(*given)
        seen = [each.nan_to_num(0.0) for each in (key, value)]
        expected = ops.attention.eager(q.float(), *(x.float() for x in seen), mask, *given[4:])
        yield "plain step", error(found, expected)
        yield "plain step, again", float((torch_ops.attention(*given) != found).sum())
    many = torch.rand(batch, 1, 3, slots, device=device) < 0.5
    many[..., 0] = True
    given = x, *seen, many, heads, kv_heads, None
    yield "plain prefill", error(torch_ops.attention(*given), ops.attention.eager(*given))
