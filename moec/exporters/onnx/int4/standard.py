"""4-bit integers in plain ONNX: DequantizeLinear on UINT4 weights, which are a checkpoint's bytes.

ONNX stores two integers in a byte, the first one in the low half, as compressed-tensors' words do.
So codes are read in place, and so are zero points. Those of eight outputs are side by side on disk:
a few operators turn them into ONNX's order, which costs little beside the weight itself.
"""

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from moec.exporters.onnx.experts.branches import branches
from moec.exporters.onnx.experts.loop import swiglu
from moec.exporters.onnx.lowering import DTYPES, UINT4, Emitter, type_of
from moec.graph_builder.ops.int4 import CENTRE
from moec.graph_builder.ops.operands import Int4Moe
from moec.graph_builder.types import TensorType
from moec.weights.view import TORCH_DTYPES

_FLOAT, _UINT8 = torch.float32, torch.uint8


def lower_int4_linear(
    e: Emitter,
    node: fx.Node,
    x: ir.Value,
    codes: ir.Value,
    scale: ir.Value,
    zero: ir.Value | None,
    bias: ir.Value | None,
    values: str,
) -> ir.Value:
    """A Gemm on the weight [out, in] of 4-bit integers."""
    out: TensorType = node.meta["type"]
    weight = _dequantize(e, codes, scale, zero, values, out.dtype, "weight")
    inputs = [x, weight] if bias is None else [x, weight, e.cast(bias, out.dtype, "bias")]
    return e.op("Gemm", inputs, out, transB=1)


def _dequantize(
    e: Emitter,
    codes: ir.Value,
    scale: ir.Value,
    zero: ir.Value | None,
    values: str,
    dtype: torch.dtype,
    label: str,
) -> ir.Value:
    """DequantizeLinear multiplies in float32; the casts after it round as `values` says."""
    stem = f"{label}." if label else ""
    codes = e.weights.as_uint4(codes)
    (rows, columns), groups = type_of(codes).shape, type_of(scale).shape[1]
    scale = e.cast(scale, _FLOAT, f"{stem}scale.float32")
    if zero is None:
        zero = e.constant(_centres(rows, groups))
    else:
        zero = _zero_points(e, zero, rows, groups, f"{stem}zero")
    types = [_FLOAT, TORCH_DTYPES[values], dtype]
    types = [kind for i, kind in enumerate(types) if not i or kind != types[i - 1]]
    last = len(types) - 1
    wide = e.op(
        "DequantizeLinear",
        [codes, scale, zero],
        TensorType((rows, columns), _FLOAT),
        f"{stem}float32" if last else label,
        axis=1,
        block_size=columns // groups,
    )
    for i, kind in enumerate(types[1:], 1):
        name = label if i == last else f"{stem}rounded"
        wide = e.op("Cast", [wide], TensorType((rows, columns), kind), name, to=DTYPES[kind].value)
    return wide


@cache
def _centres(rows: int, groups: int) -> np.ndarray[Any, Any]:
    """The zero points of symmetric integers, which all weights of a shape share."""
    return np.full((rows, groups), CENTRE, ml_dtypes.uint4)


def _zero_points(e: Emitter, zero: ir.Value, rows: int, groups: int, label: str) -> ir.Value:
    """Zero points [out/8, groups, 8] of a checkpoint as [out, groups]."""
    zero = e.weights.as_uint4(zero)
    words = type_of(zero).shape[0]
    deep = TensorType((words, groups, 8), _UINT8)
    turned = TensorType((words, 8, groups), _UINT8)
    wide = e.op("Cast", [zero], deep, f"{label}.bytes", to=ir.DataType.UINT8.value)
    wide = e.op("Transpose", [wide], turned, f"{label}.turned", perm=[0, 2, 1])
    flat = TensorType((8 * words, groups), _UINT8)
    wide = e.op("Reshape", [wide, e.constant([-1, groups])], flat, f"{label}.flat")
    if 8 * words != rows:
        ends = e.constant([0]), e.constant([rows]), e.constant([0])
        wide = e.op("Slice", [wide, *ends], TensorType((rows, groups), _UINT8), f"{label}.rows")
    kind = TensorType((rows, groups), UINT4)
    return e.op("Cast", [wide], kind, label, to=ir.DataType.UINT4.value)


def lower_int4_moe(e: Emitter, node: fx.Node, moe: Int4Moe[ir.Value]) -> ir.Value:
    """Each chosen expert on its own integers, in a branch of its own."""

    def ffn(e: Emitter, expert: int, rows: ir.Value) -> ir.Value:
        kind = type_of(rows)

        def product(x: ir.Value, of: str, index: int, name: str) -> ir.Value:
            codes, scales, zeros = moe.tensors(of)
            weight, label = codes[index], f"{name}.weight"
            if scales:
                zero = zeros[index] if zeros else None
                weight = _dequantize(e, weight, scales[index], zero, moe.values, kind.dtype, label)
            weight = e.cast(weight, kind.dtype, f"{label}.cast")
            out = kind.like(kind.shape[0], type_of(weight).shape[0])
            return e.op("Gemm", [x, weight], out, name, transB=1)

        act = swiglu(
            e,
            product(rows, "gate_up", 2 * expert, "gate"),
            product(rows, "gate_up", 2 * expert + 1, "up"),
        )
        return product(act, "down", expert, "down")

    return branches(e, node, moe, moe.count, ffn)
