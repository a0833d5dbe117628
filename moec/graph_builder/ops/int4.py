"""Weights of 4-bit integers, as compressed-tensors means them.

A value is (code - zero point) * scale, rounded once to `values`, the type of the scales on disk.
The zero point is 8 unless there are tensors of zero points. Codes are bytes of two, the first one
in the low half; `moec.spec.tensors` has the shapes.
"""

import torch
from torch import Tensor

from moec.graph_builder.ops.linear import swiglu
from moec.graph_builder.ops.moe import need_routed, over_chosen
from moec.graph_builder.ops.operands import Int4Moe
from moec.graph_builder.ops.registry import need, op
from moec.graph_builder.types import TensorType, widened
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


def _dequantize_rule(
    codes: TensorType, scale: TensorType, zero: TensorType | None, values: str, dtype: str
) -> TensorType:
    return TensorType(_need_int4("dequantize_int4", codes, scale, zero), TORCH_DTYPES[dtype])


@op(
    "dequantize_int4(Tensor codes, Tensor scale, Tensor? zero, str values, str dtype) -> Tensor",
    _dequantize_rule,
)
def dequantize_int4(
    codes: Tensor, scale: Tensor, zero: Tensor | None, values: str, dtype: str
) -> Tensor:
    """The weight [out, in] of codes [out, in/2], scale [out, groups] and zero [out/8, groups, 4].

    It is rounded to the type `values`, and then stored in `dtype`.
    """
    rows, groups = scale.shape
    wide = _unpacked(codes).view(rows, groups, -1).float()
    wide -= CENTRE if zero is None else zero_points(zero, rows)[..., None]
    wide = wide * widened(scale)[..., None]
    return wide.view(rows, -1).to(TORCH_DTYPES[values]).to(TORCH_DTYPES[dtype])


def zero_points(zero: Tensor, rows: int) -> Tensor:
    """The zero points [out, groups] of a tensor [out/8, groups, 4]."""
    return _unpacked(zero).transpose(1, 2).flatten(0, 1)[:rows]


def _unpacked(codes: Tensor) -> Tensor:
    """uint8 [..., n] -> [..., 2n]: the low half of each byte, then the high one."""
    return torch.stack((codes & 15, codes >> 4), -1).flatten(-2)


def _moe_rule(moe: Int4Moe[TensorType]) -> TensorType:
    name, dim = "int4_moe", moe.x.shape[1]
    need_routed(name, moe)
    need(moe.count > 0, name, "down", moe.down, "at least one tensor")
    width = 2 * moe.down[0].shape[-1]
    for label, each_has, shape in (("gate_up", 2, (width, dim)), ("down", 1, (dim, width))):
        codes, scales, zeros = moe.tensors(label)
        count = each_has * moe.count
        need(len(codes) == len(scales) == count, name, label, len(codes), f"{count} tensors")
        need(len(zeros) in (0, count), name, f"{label}_zero", len(zeros), f"0 or {count} tensors")
        for i in range(count):
            found = _need_int4(name, codes[i], scales[i], zeros[i] if zeros else None)
            need(found == shape, name, label, found, shape)
    return moe.x


@op(
    "int4_moe(Tensor x, Tensor scores, Tensor experts, Tensor[] gate_up, Tensor[] gate_up_scale, "
    "Tensor[] gate_up_zero, Tensor[] down, Tensor[] down_scale, Tensor[] down_zero, str values) "
    "-> Tensor",
    _moe_rule,
    Int4Moe,
)
def int4_moe(moe: Int4Moe[Tensor]) -> Tensor:
    """`separate_moe` on weights of 4-bit integers."""

    def ffn(expert: int, rows: Tensor) -> Tensor:
        def product(rows: Tensor, label: str, index: int) -> Tensor:
            codes, scales, zeros = moe.tensors(label)
            zero = zeros[index] if zeros else None
            weight = dequantize_int4.eager(codes[index], scales[index], zero, moe.values, "fp32")
            return rows @ weight.to(rows.dtype).t()

        gate, up = (product(rows, "gate_up", 2 * expert + part) for part in (0, 1))
        return product(swiglu.eager(gate, up), "down", expert)

    return over_chosen(moe, ffn)
