"""FP8 arithmetic (E4M3: 4 bits of exponent, 3 of fraction, no infinity, at most 448).

A value is code times scale. Rounding to a code is to the nearest, ties to even, and saturates. A
scale is a scalar, a vector along `axis`, or has all dimensions, each as long as the values' or that
length in blocks of `block`: ONNX's rules, with blocks along more than one dimension.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from moec.graph_builder.ops.linear import swiglu
from moec.graph_builder.ops.moe import need_routed, over_chosen
from moec.graph_builder.ops.operands import Fp8Moe
from moec.graph_builder.ops.registry import need, op
from moec.graph_builder.types import Dim, TensorType, widened
from moec.spec.scheme import INPUTS, LARGEST, STATIC
from moec.weights.view import TORCH_DTYPES

FP8 = torch.float8_e4m3fn
#: no dynamic scale is below: a token of zeros has one too
SMALLEST_SCALE = 1e-12


def _blocks(size: Dim, block: int) -> Dim:
    return size if isinstance(size, str) else -(-size // block)


def _need_scale(name: str, x: TensorType, scale: TensorType, axis: int, block: int) -> None:
    rank = len(scale.shape)
    if rank == 1:
        fits = 0 <= axis < len(x.shape) and scale.shape[0] == x.shape[axis]
    else:
        fits = rank in (0, len(x.shape)) and all(
            have in (size, _blocks(size, block) if block else size)
            for have, size in zip(scale.shape, x.shape, strict=False)
        )
    expected = f"one for {x.shape}, along axis {axis}, or in blocks of {block}"
    need(fits, name, "scale", scale.shape, expected)


def _quantize_rule(x: TensorType, scale: TensorType, axis: int, block: int) -> TensorType:
    _need_scale("quantize", x, scale, axis, block)
    return TensorType(x.shape, FP8)


@op("quantize(Tensor x, Tensor scale, int axis, int block) -> Tensor", _quantize_rule)
def quantize(x: Tensor, scale: Tensor, axis: int, block: int) -> Tensor:
    """x over scale, in float32, to E4M3 codes of the same shape."""
    # Of what is larger, versions of torch make 448 or NaN.
    return (widened(x) / spread(scale, x.shape, axis, block)).clamp(-LARGEST, LARGEST).to(FP8)


def _dequantize_rule(
    codes: TensorType, scale: TensorType, axis: int, block: int, dtype: str
) -> TensorType:
    need(codes.dtype == FP8, "dequantize", "codes", codes, "E4M3")
    _need_scale("dequantize", codes, scale, axis, block)
    return TensorType(codes.shape, TORCH_DTYPES[dtype])


@op(
    "dequantize(Tensor codes, Tensor scale, int axis, int block, str dtype) -> Tensor",
    _dequantize_rule,
)
def dequantize(codes: Tensor, scale: Tensor, axis: int, block: int, dtype: str) -> Tensor:
    """codes times scale, in float32, then in `dtype`."""
    return codes.float().mul_(spread(scale, codes.shape, axis, block)).to(TORCH_DTYPES[dtype])


def spread(scale: Tensor, shape: torch.Size, axis: int, block: int) -> Tensor:
    """`scale` in float32, so that it broadcasts over `shape`."""
    scale = scale.float()
    if scale.dim() == 1:
        return scale.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    for i, size in enumerate(shape[: scale.dim()]):
        if scale.shape[i] != size:
            scale = scale.repeat_interleave(block, i).narrow(i, 0, size)
    return scale


def _token_scale_rule(x: TensorType, group: int, bound: float | None) -> TensorType:
    need(group >= 0, "token_scale", "group", group, "0 or more")
    need(bound is None or bound > 0, "token_scale", "bound", bound, "above 0")
    rows, width = x.shape
    return TensorType((rows, _blocks(width, group)) if group else (rows,), torch.float32)


@op("token_scale(Tensor x, int group, float? bound) -> Tensor", _token_scale_rule)
def token_scale(x: Tensor, group: int, bound: float | None) -> Tensor:
    """The scale at which each token's largest element of x [T, D], or `bound`, is code 448.

    float32 [T]; with `group` one for each so many elements, [T, D / group].
    """
    wide = widened(x).abs()
    if group:
        wide = functional.pad(wide, (0, -x.shape[1] % group)).unflatten(1, (-1, group))
    largest = wide.amax(-1)
    if bound is not None:
        largest = largest.clamp(max=bound)
    return (largest / LARGEST).clamp(min=SMALLEST_SCALE)


def rounded(
    x: Tensor, scale: Tensor | None, inputs: str, block: int, bound: float | None
) -> Tensor:
    """x [T, D] on the grid that `inputs` of a scheme say, in x's dtype; `scale` is static."""
    if inputs == "none":
        return x
    if scale is None:
        scale = token_scale.eager(x, block if inputs == "group" else 0, bound)
    codes = quantize.eager(x, scale, 0, block)
    return dequantize.eager(codes, scale, 0, block, "fp32").to(x.dtype)


def _moe_rule(moe: Fp8Moe[TensorType]) -> TensorType:
    name = "fp8_moe"
    need_routed(name, moe)
    need(moe.inputs in INPUTS, name, "inputs", moe.inputs, " or ".join(INPUTS))
    given = moe.gate_up and moe.down
    need(bool(given), name, "weights", (moe.gate_up, moe.down), "at least one tensor each")
    fused, count = moe.fused, moe.count
    for statics, codes in ((moe.gate_up_input, moe.gate_up), (moe.down_input, moe.down)):
        expected = len(codes) if moe.inputs in STATIC else 0
        need(len(statics) == expected, name, "input scales", len(statics), f"{expected} tensors")
        for static in statics:
            fits = static.shape == () or (fused and static.shape == (count,))
            need(fits, name, "input scale", static, count if fused else "a scalar")
    dim, width = moe.x.shape[1], moe.down[0].shape[1]
    # Shapes of one expert's tensors, as they are stored.
    gate_up_shape, down_shape = (
        ((dim, 2 * width), (width, dim)) if fused else ((width, dim), (dim, width))
    )
    for label, codes, scales, shape, each_has in (
        ("gate_up", moe.gate_up, moe.gate_up_scale, gate_up_shape, 2),
        ("down", moe.down, moe.down_scale, down_shape, 1),
    ):
        expected = 1 if fused else each_has * count
        need(len(codes) == expected, name, label, len(codes), f"{expected} tensors")
        need(len(scales) == expected, name, f"{label}_scale", len(scales), f"{expected} tensors")
        for each, scale in zip(codes, scales, strict=True):
            need(each.dtype == FP8, name, label, each, "E4M3")
            whole = (count, *shape) if fused else shape
            need(each.shape == whole, name, label, each.shape, whole)
            if fused and scale.shape:
                need(scale.shape[0] == count, name, f"{label}_scale", scale.shape, count)
                scale = scale.like(*scale.shape[1:])
            _need_scale(name, each.like(*shape), scale, 1 if fused else 0, moe.block)
    return moe.x


@op(
    "fp8_moe(Tensor x, Tensor scores, Tensor experts, str weighed, Tensor[] gate_up, "
    "Tensor[] gate_up_scale, Tensor[] down, Tensor[] down_scale, Tensor[] gate_up_input, "
    "Tensor[] down_input, str inputs, int block, float? bound) -> Tensor",
    _moe_rule,
    Fp8Moe,
)
def fp8_moe(moe: Fp8Moe[Tensor]) -> Tensor:
    """`moe` on FP8 weights, whose products see inputs rounded as a scheme's `inputs` say.

    Both products' inputs are rounded: the tokens, times their scores where these multiply inputs,
    and what SwiGLU makes of them.
    """
    return over_chosen(moe, expert_ffn(moe))


def expert_ffn(
    moe: Fp8Moe[Tensor], seen: Callable[[str, int, Tensor, Tensor], None] | None = None
) -> Callable[[int, Tensor], Tensor]:
    """What an expert, by its number, makes of its rows [t, D].

    `seen` is called with the product ("gate_up" or "down"), the expert, and its input before and
    after it was rounded.
    """

    def product(
        label: str,
        expert: int,
        rows: Tensor,
        codes: list[Tensor],
        scales: list[Tensor],
        statics: list[Tensor],
    ) -> Tensor:
        weight = expert_weight(codes, scales, expert, moe.count, moe.block).to(moe.x.dtype)
        own, found = input_scales(statics, expert, moe.count), []
        for static, part in zip(own, weight.chunk(len(own), -1), strict=True):
            on_grid = rounded(rows, static, moe.inputs, moe.block, moe.bound)
            if seen:
                seen(label, expert, rows, on_grid)
            found.append(on_grid @ part)
        return torch.cat(found, -1)

    def ffn(expert: int, rows: Tensor) -> Tensor:
        first = moe.gate_up, moe.gate_up_scale, moe.gate_up_input
        gate, up = product("gate_up", expert, rows, *first).chunk(2, -1)
        last = moe.down, moe.down_scale, moe.down_input
        return product("down", expert, swiglu.eager(gate, up), *last)

    return ffn


def input_scales(statics: list[Tensor], expert: int, count: int) -> Sequence[Tensor | None]:
    """The static scales of one expert's inputs, as `fp8_moe` has them: of each of its tensors."""
    if not statics:
        return [None]
    if len(statics) == 1:
        (static,) = statics
        return [static[expert] if static.dim() else static]
    parts = len(statics) // count
    return statics[expert * parts : (expert + 1) * parts]


def expert_weight(
    codes: list[Tensor], scales: list[Tensor], expert: int, count: int, block: int
) -> Tensor:
    """The weight [in, out] of one of `count` experts, float32; as `fp8_moe` has them."""
    if codes[0].dim() == 3:
        scale = scales[0][expert] if scales[0].dim() else scales[0]
        return dequantize.eager(codes[0][expert], scale, 1, block, "fp32")
    parts = len(codes) // count
    mine = range(expert * parts, (expert + 1) * parts)
    return torch.cat([dequantize.eager(codes[i], scales[i], 0, block, "fp32") for i in mine]).t()
