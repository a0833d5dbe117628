"""Weights of 4-bit integers, as compressed-tensors means them.

A value is (code - zero point) * scale, rounded once to `values`, the type of the scales on disk.
The zero point is 8 unless there are tensors of zero points. Codes are bytes of two, the first one
in the low half; `moec.spec.tensors` has the shapes.
"""

import torch
from torch import Tensor

from moec.graph_builder.ops.linear import linear, swiglu
from moec.graph_builder.ops.moe import need_routed, over_chosen
from moec.graph_builder.ops.operands import Int4Moe
from moec.graph_builder.ops.registry import need, op
from moec.graph_builder.types import TensorType, widened
from moec.weights.int4.codes import unpacked, zero_points
from moec.weights.view import TORCH_DTYPES

CODES = torch.uint8
#: the zero point of codes that have no tensor of zero points
CENTRE = 8


def _need_int4(
    name: str, codes: TensorType, scale: TensorType, zero: TensorType | None
) -> tuple[int, int]:
    """Check the tensors of one weight, and return its shape [out, in]."""
    need(codes.dtype == CODES and len(codes.shape) == 2, name, "codes", codes, "uint8 [out, in/2]")
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    fits = len(scale.shape) == 2 and scale.shape[0] == rows and columns % scale.shape[1] == 0
    need(fits, name, "scale", scale.shape, f"[{rows}, groups] for [{rows}, {columns}]")
    if zero is not None:
        shape = (-(-rows // 8), scale.shape[1], 4)
        need((zero.shape, zero.dtype) == (shape, CODES), name, "zero", zero, f"uint8 {shape}")
    return rows, columns


def _linear_rule(
    x: TensorType,
    codes: TensorType,
    scale: TensorType,
    zero: TensorType | None,
    bias: TensorType | None,
    values: str,
) -> TensorType:
    rows, columns = _need_int4("int4_linear", codes, scale, zero)
    need(x.shape[-1] == columns, "int4_linear", "codes", codes.shape, f"[out, {x.shape[-1]} / 2]")
    if bias is not None:
        need(bias.shape == (rows,), "int4_linear", "bias", bias.shape, (rows,))
    return x.like(*x.shape[:-1], rows)


@op(
    "int4_linear(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? bias, str values) "
    "-> Tensor",
    _linear_rule,
)
def int4_linear(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, values: str
) -> Tensor:
    """`linear` on a weight of 4-bit integers."""
    return linear.eager(x, dequantize_int4(codes, scale, zero, values), bias)


def dequantize_int4(codes: Tensor, scale: Tensor, zero: Tensor | None, values: str) -> Tensor:
    """The weight [out, in] of codes [out, in/2], scale [out, groups] and zero [out/8, groups, 4].

    It has the type `values`.
    """
    rows, groups = scale.shape
    wide = unpacked(codes).view(rows, groups, -1).float()
    wide -= CENTRE if zero is None else zero_points(zero, rows)[..., None]
    wide = wide * widened(scale)[..., None]
    return wide.view(rows, -1).to(TORCH_DTYPES[values])


def _moe_rule(moe: Int4Moe[TensorType]) -> TensorType:
    name, dim = "int4_moe", moe.x.shape[1]
    need_routed(name, moe)
    need(moe.count > 0, name, "down", moe.down, "at least one tensor")
    width = moe.down[0].shape[-1] * (2 if moe.down_scale else 1)
    for label, each_has, shape in (("gate_up", 2, (width, dim)), ("down", 1, (dim, width))):
        codes, scales, zeros = moe.tensors(label)
        count = each_has * moe.count
        need(len(codes) == count, name, label, len(codes), f"{count} tensors")
        need(len(scales) in (0, count), name, f"{label}_scale", len(scales), f"0 or {count}")
        need(len(zeros) in (0, len(scales)), name, f"{label}_zero", len(zeros), f"0 or {count}")
        for i, each in enumerate(codes):
            found = each.shape
            if scales:
                found = _need_int4(name, each, scales[i], zeros[i] if zeros else None)
            need(found == shape, name, label, found, shape)
    return moe.x


@op(
    "int4_moe(Tensor x, Tensor scores, Tensor experts, str weighed, Tensor[] gate_up, "
    "Tensor[] gate_up_scale, Tensor[] gate_up_zero, Tensor[] down, Tensor[] down_scale, "
    "Tensor[] down_zero, str values) -> Tensor",
    _moe_rule,
    Int4Moe,
)
def int4_moe(moe: Int4Moe[Tensor]) -> Tensor:
    """`separate_moe` on weights of 4-bit integers."""

    def ffn(expert: int, rows: Tensor) -> Tensor:
        def product(rows: Tensor, label: str, index: int) -> Tensor:
            codes, scales, zeros = moe.tensors(label)
            weight = codes[index]
            if scales:
                zero = zeros[index] if zeros else None
                weight = dequantize_int4(weight, scales[index], zero, moe.values)
            return rows @ weight.to(rows.dtype).t()

        gate, up = (product(rows, "gate_up", 2 * expert + part) for part in (0, 1))
        return product(swiglu.eager(gate, up), "down", expert)

    return over_chosen(moe, ffn)
