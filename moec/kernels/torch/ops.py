"""Ops of target torch's programs on CUDA: moec's kernels, and torch's own where as fast.

The eager meaning, shapes and rules of each op are in `moec.graph_builder.ops`.
"""

from dataclasses import fields
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from moec.graph_builder import ops
from moec.graph_builder.ops.operands import FusedAttention, MoeLayer, RoutedLayer
from moec.graph_builder.ops.registry import implement
from moec.graph_builder.ops.rope import rates_on
from moec.kernels.launches import step
from moec.kernels.launches.few_tokens import few_linear
from moec.kernels.launches.launch import Launch
from moec.kernels.launches.prefill import fits
from moec.kernels.launches.routed import most_tokens, unfit
from moec.kernels.launches.routed_prefill import fits as fits_routed
from moec.kernels.sizes import MOST_TOKENS, Heads, RoutedSizes, Sizes, is_head
from moec.kernels.torch.heads import attention, head_norm, rope
from moec.kernels.torch.launch import architecture, buffers, overlaps, run
from moec.kernels.torch.moe import DecodeMoe
from moec.kernels.torch.prefill import PrefillMoe
from moec.kernels.torch.routed import RoutedMoe
from moec.spec.parts.routing import Routing

FP8 = torch.float8_e4m3fn


@cache
def register() -> None:
    """Let these functions compute the ops of the same names for tensors on CUDA."""
    for function in (
        skip_norm,
        norm_fp8,
        skip_norm_fp8,
        encode,
        swiglu_fp8,
        fp8_linear,
        moe_layer,
        routed_layer,
        norm_moe,
        norm_moe_norm_fp8,
        attention_fp8,
        rope_table,
        temperature,
        rms_norm,
        positions,
        select,
        head_norm,
        rope,
        attention,
    ):
        implement(function.__name__, function, "CUDA")


def skip_norm(x: Tensor, skip: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if x.dtype != torch.bfloat16:
        return ops.skip_norm.eager(x, skip, weight, eps)  # type: ignore[no-any-return]
    values = _norm(x, skip, weight, eps, narrow=False)
    return values["normed"], values["total"]


def norm_fp8(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    values = _norm(x, None, weight, eps, narrow=True)
    return values["codes"], values["scale"]


def skip_norm_fp8(
    x: Tensor, y: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    values = _norm(x, y, weight, eps, narrow=True)
    return values["codes"], values["scale"], values["total"]


def _norm(
    x: Tensor, skip: Tensor | None, weight: Tensor, eps: float, narrow: bool
) -> dict[str, Tensor]:
    tokens, dim = x.shape
    launch = step.skip_norm(dim, tokens, eps, skip is not None, narrow, overlaps(x.device))
    values = {"x": x, "skip": x if skip is None else skip, "gain": weight, "total": x, "normed": x}
    values |= codes_like(tokens, dim, x.device) if narrow else {"codes": x, "scale": x}
    if skip is not None:
        values["total"] = torch.empty_like(x)
    if not narrow:
        values["normed"] = torch.empty_like(x)
    run(launch, {**values, "tokens": tokens})
    return values


def encode(x: Tensor) -> tuple[Tensor, Tensor]:
    return _encoded(step.encode(x.shape[1], len(x), overlaps(x.device)), "x", x, x.shape[1])


def swiglu_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    hidden = x.shape[1] // 2
    return _encoded(step.swiglu(hidden, len(x), overlaps(x.device)), "hidden", x, hidden)


def _encoded(launch: Launch, name: str, x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    values = codes_like(len(x), width, x.device)
    run(launch, {name: x, **values})
    return values["codes"], values["scale"]


def codes_like(tokens: int, width: int, device: torch.device) -> dict[str, Tensor]:
    """New tensors for quantised values and their per-token scales."""
    return {
        "codes": torch.empty(tokens, width, dtype=FP8, device=device),
        "scale": torch.empty(tokens, dtype=torch.float32, device=device),
    }


def fp8_linear(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: str
) -> Tensor:
    """The kernels always return bf16, the only dtype in which target torch computes."""
    tokens, (width, dim) = len(codes), weight.shape
    if tokens > MOST_TOKENS:
        return torch._scaled_mm(
            codes,
            weight.t(),
            scale[:, None],
            weight_scale[None],
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    out = torch.empty(tokens, width, dtype=torch.bfloat16, device=codes.device)
    values = {"codes": codes, "scale": scale, "weight": weight, "weight_scale": weight_scale}
    launch = few_linear(width, dim, tokens, architecture(codes.device))
    run(launch, {**values, "out": out, "tokens": tokens})
    return out


def moe_layer(*operands: Tensor) -> Tensor:
    layer = MoeLayer(*operands)
    sizes, weights = _sizes(layer), _weights(layer)
    if len(layer.x) > MOST_TOKENS and fits(sizes):
        return PrefillMoe(sizes, weights)(layer.x)
    moe = DecodeMoe(sizes, weights)
    rows = [moe(some) for some in torch.split(layer.x, MOST_TOKENS)]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def routed_layer(*operands: Any) -> Tensor:
    """FP8 layers that the kernels take; plain torch computes the others."""
    of = RoutedLayer[Any](*operands)
    how = {name: getattr(of, name) for name in Routing.model_fields}
    routing = Routing.model_validate(how | {"bias": of.bias is not None})
    count, dim, hidden = of.down.shape
    experts = len(of.router)
    sizes = RoutedSizes(dim, hidden, experts, of.top_k, count - experts, routing, of.block)
    if of.gate_up_scale is None or of.x.dtype != torch.bfloat16 or unfit(sizes):
        return ops.routed_layer.eager(*operands)  # type: ignore[no-any-return]
    names = ("router", "gate_up", "gate_up_scale", "down", "down_scale")
    weights = {name: getattr(of, name) for name in names}
    layer = RoutedMoe(sizes, weights | ({} if of.bias is None else {"bias": of.bias}))
    if fits_routed(sizes):
        return layer(of.x)
    rows = [layer(some) for some in torch.split(of.x, most_tokens(sizes))]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def norm_moe(
    x: Tensor, skip: Tensor, weight: Tensor, eps: float, *layer: Tensor
) -> tuple[Tensor, Tensor]:
    if len(x) > MOST_TOKENS:
        normed, total = skip_norm(x, skip, weight, eps)
        return moe_layer(normed, *layer), total
    values = _decode(MoeLayer(x, *layer), skip, weight, eps)
    return values["out"], values["total"]


def norm_moe_norm_fp8(
    x: Tensor, skip: Tensor, weight: Tensor, eps: float, *layer_and_after: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    *layer, after = layer_and_after
    if len(x) > MOST_TOKENS:
        y, total = norm_moe(x, skip, weight, eps, *layer)
        return skip_norm_fp8(total, y, after, eps)
    moe = _decode(MoeLayer(x, *layer), skip, weight, eps, combine=False)
    count, tokens, dim = moe["parts"].shape
    launch = step.skip_norm(dim, tokens, eps, True, True, overlaps(x.device), count)
    values = {"x": moe["total"], "parts": moe["parts"], "gain": after, "normed": x}
    values |= {"total": torch.empty_like(x), **codes_like(tokens, dim, x.device)}
    run(launch, {**values, "tokens": tokens})
    return values["codes"], values["scale"], values["total"]


def moe_parts(layer: MoeLayer[Tensor]) -> Tensor:
    """The partial sums of a layer for few tokens, float32 [n, tokens, D]."""
    moe = DecodeMoe(_sizes(layer), _weights(layer), combine=False)
    parts: Tensor = moe.run(moe.values(layer.x))["parts"]
    return parts


def _decode(
    layer: MoeLayer[Tensor], skip: Tensor, gain: Tensor, eps: float, combine: bool = True
) -> dict[str, Any]:
    """All values of a layer on the RMS norm of x + skip, times gain, for few tokens."""
    moe = DecodeMoe(_sizes(layer), _weights(layer), eps=eps, combine=combine)
    return moe.run(moe.values(layer.x, skip, gain))


def _sizes(layer: MoeLayer[Tensor]) -> Sizes:
    count, dim, hidden = layer.down.shape
    return Sizes(dim, hidden, count - 1)


def _weights(layer: MoeLayer[Tensor]) -> dict[str, Tensor]:
    return {each.name: getattr(layer, each.name) for each in fields(layer) if each.name != "x"}


def attention_fp8(*operands: Any) -> tuple[Tensor, Tensor]:
    of = FusedAttention(*operands)
    qkv, key, last = of.qkv, of.key, of.last
    batch, steps, slots = len(key), len(qkv) // len(key), key.shape[2]
    heads, overlap = Heads(of.heads, of.kv_heads, key.shape[3]), overlaps(qkv.device)
    kinds = of.cos is not None, of.eps, of.temperature is not None
    given = {"cos": of.cos, "sin": of.sin, "temperature": of.temperature}
    values = {name: qkv if each is None else each for name, each in given.items()}
    values |= {"qkv": qkv, "key": key, "value": of.value, "last": last}
    if steps == 1:
        launches, wanted = step.attend(heads, batch, slots, *kinds, overlap)
        values |= buffers(wanted, qkv.device)
        for launch in launches:
            run(launch, {**values, "slots": slots})
        return encode(values["out"])
    values["q"] = qkv.new_empty(batch, steps, of.heads * heads.size)
    launch = step.rope_append(heads, batch * steps, *kinds, overlap)
    run(launch, {**values, "steps": steps, "slots": slots})
    out = _attend_many(values["q"], key, of.value, last, of.total, of.heads)
    return encode(out.flatten(0, 1))


def _attend_many(
    q: Tensor, key: Tensor, value: Tensor, last: Tensor, total: Tensor, heads: int
) -> Tensor:
    """Attention over the slots filled so far, by torch's flash attention, which is fast enough."""
    batch, steps, _ = q.shape
    queries = q.view(batch, steps, heads, -1).transpose(1, 2)  # [B, heads, S, size]
    ends = [int(total)] if batch == 1 else (last + 1).tolist()
    rows = [
        functional.scaled_dot_product_attention(
            queries[i : i + 1],
            key[i : i + 1, :, :end],
            value[i : i + 1, :, :end],
            **(
                {"is_causal": True}
                if end == steps
                else {"attn_mask": causal_lower_right(steps, end)}
            ),
            enable_gqa=True,
        )
        for i, end in enumerate(ends)
    ]
    out = rows[0] if len(rows) == 1 else torch.cat(rows)
    return out.transpose(1, 2).flatten(2)


def rope_table(
    positions: Tensor,
    dim: int,
    theta: float,
    scaling: str,
    numbers: list[float],
    magnitude: float,
) -> tuple[Tensor, Tensor]:
    if not is_head(dim) or magnitude != 1:
        how = (dim, theta, scaling, numbers, magnitude)
        return ops.rope_table.eager(positions, *how)  # type: ignore[no-any-return]
    shape, device = (*positions.shape, dim // 2), positions.device
    cos, sin = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
    rates = rates_on(device, dim, theta, scaling, tuple(numbers))
    values = {"positions": positions.contiguous(), "rates": rates, "cos": cos, "sin": sin}
    run(step.rope_table(dim, positions.numel()), values)
    return cos, sin


def temperature(positions: Tensor, floor: int, scale: float) -> Tensor:
    factor = torch.empty(*positions.shape, 1, dtype=torch.float32, device=positions.device)
    launch = step.temperature(floor, scale, positions.numel())
    run(launch, {"positions": positions.contiguous(), "temperature": factor})
    return factor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.dtype != torch.bfloat16 or len(x.shape) != 2:
        return ops.rms_norm.eager(x, weight, eps)  # type: ignore[no-any-return]
    return _norm(x.contiguous(), None, weight, eps, narrow=False)["normed"]


def positions(ids: Tensor, past: Tensor) -> Tensor:
    if ids.shape[1] == 1:
        return past[:, None].clone()
    return ops.positions.eager(ids, past)  # type: ignore[no-any-return]


def select(x: Tensor, index: Tensor) -> Tensor:
    if x.shape[1] == index.shape[1] == 1:
        return x[:, 0].clone()
    return ops.select.eager(x, index)  # type: ignore[no-any-return]
