"""FP8 in plain ONNX: QuantizeLinear and DequantizeLinear, around products in float32.

ONNX knows one scale, scales along an axis, or blocks along one dimension. Scales of square blocks
are therefore repeated along the other dimension first. Runtimes can neither gather nor concatenate
FP8 tensors. So experts are branches, each on its own slice of the file.
"""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from moec.exporters.onnx.experts.branches import branches
from moec.exporters.onnx.experts.loop import swiglu
from moec.exporters.onnx.lowering import DTYPES, Emitter, type_of
from moec.graph_builder.ops.fp8 import FP8, SMALLEST_SCALE
from moec.graph_builder.ops.operands import Fp8Moe
from moec.graph_builder.types import Dim, TensorType
from moec.spec.scheme import LARGEST

_FLOAT, _INT64 = torch.float32, torch.int64


def lower_token_scale(
    e: Emitter, node: fx.Node, x: ir.Value, group: int, bound: float | None
) -> ir.Value:
    """The per-token scale of x [T, D]: [T], or [T, D / group]."""
    return _token_scale(e, x, group, bound, node.meta["type"], "")


def _token_scale(
    e: Emitter, x: ir.Value, group: int, bound: float | None, out: TensorType, label: str
) -> ir.Value:
    stem = f"{label}." if label else ""
    kind = type_of(x)
    size = e.op(
        "Abs", [e.cast(x, _FLOAT, f"{stem}wide")], TensorType(kind.shape, _FLOAT), f"{stem}abs"
    )
    if group:
        size = _in_groups(e, size, group, stem)
    most = e.op("ReduceMax", [size, e.constant([-1])], out, f"{stem}most", keepdims=0)
    if bound is not None:
        most = e.op("Min", [most, e.constant(np.float32(bound))], out, f"{stem}bounded")
    scale = e.op("Div", [most, e.constant(np.float32(LARGEST))], out, f"{stem}share")
    return e.op("Max", [scale, e.constant(np.float32(SMALLEST_SCALE))], out, label)


def _in_groups(e: Emitter, x: ir.Value, group: int, stem: str) -> ir.Value:
    """x [T, D] -> [T, groups, group], padded with zeros at the end."""
    rows, width = type_of(x).shape
    count = -(-width // group)
    if width % group:
        more = e.constant([0, 0, 0, count * group - width])
        x = e.op("Pad", [x, more], TensorType((rows, count * group), _FLOAT), f"{stem}padded")
    kind = TensorType((rows, count, group), _FLOAT)
    return e.op("Reshape", [x, e.constant([0, count, group])], kind, f"{stem}groups")


def lower_quantize(
    e: Emitter, node: fx.Node, x: ir.Value, scale: ir.Value, axis: int, block: int
) -> ir.Value:
    """x as quantised values of the same shape."""
    return _quantize(e, e.cast(x, _FLOAT, "wide"), scale, axis, block, "")


def _quantize(
    e: Emitter, x: ir.Value, scale: ir.Value, axis: int, block: int, label: str
) -> ir.Value:
    out = TensorType(type_of(x).shape, FP8)
    scale, how = _scale(e, out, scale, axis, block, label)
    fp8 = {"output_dtype": DTYPES[FP8].value, "saturate": 1}
    return e.op("QuantizeLinear", [x, scale], out, label, **how, **fp8)


def lower_dequantize(
    e: Emitter, node: fx.Node, codes: ir.Value, scale: ir.Value, axis: int, block: int, dtype: str
) -> ir.Value:
    """Quantised values as numbers of the same shape."""
    out: TensorType = node.meta["type"]
    return _dequantize(e, codes, scale, axis, block, out.dtype, "")


def _dequantize(
    e: Emitter,
    codes: ir.Value,
    scale: ir.Value,
    axis: int,
    block: int,
    dtype: torch.dtype,
    label: str,
) -> ir.Value:
    out = TensorType(type_of(codes).shape, _FLOAT)
    scale, how = _scale(e, out, scale, axis, block, label)
    if dtype == _FLOAT:
        return e.op("DequantizeLinear", [codes, scale], out, label, **how)
    wide = e.op("DequantizeLinear", [codes, scale], out, f"{label or 'codes'}.float32", **how)
    return e.op("Cast", [wide], TensorType(out.shape, dtype), label, to=DTYPES[dtype].value)


def _scale(
    e: Emitter, of: TensorType, scale: ir.Value, axis: int, block: int, label: str
) -> tuple[ir.Value, dict[str, int]]:
    """`scale` as ONNX takes it for values of shape `of`, and the attributes that go with it."""
    shown = f"{label}.scale" if label else "scale"
    scale = e.cast(scale, _FLOAT, f"{shown}.float32")
    shape = type_of(scale).shape
    if not shape:
        return scale, {}
    if len(shape) == 1:
        return scale, {"axis": axis}
    rows, columns = of.shape
    if shape[0] != rows:
        scale = _spread(e, scale, rows, block, shown)
    if shape[1] != columns:
        return scale, {"axis": 1, "block_size": block}
    raise AssertionError(f"{shown}: {shape} for {of.shape}")  # no scheme has blocks of one element


def _spread(e: Emitter, scale: ir.Value, rows: Dim, block: int, label: str) -> ir.Value:
    """Repeat each row of scale [n, m] `block` times: [rows, m]."""
    count, columns = type_of(scale).shape

    def kind(*shape: Dim) -> TensorType:
        return TensorType(shape, _FLOAT)

    deep = e.op("Unsqueeze", [scale, e.constant([1])], kind(count, 1, columns), f"{label}.deep")
    wide = e.op(
        "Expand",
        [deep, e.constant([count, block, columns])],
        kind(count, block, columns),
        f"{label}.wide",
    )
    flat = e.op(
        "Reshape", [wide, e.constant([-1, columns])], kind(count * block, columns), f"{label}.flat"
    )
    if count * block == rows:
        return flat
    ends = e.constant([0]), e.constant([rows]), e.constant([0])
    return e.op("Slice", [flat, *ends], kind(rows, columns), f"{label}.rows")


def lower_fp8_moe(
    e: Emitter, node: fx.Node, moe: Fp8Moe[ir.Value], write: Callable[..., ir.Value] = branches
) -> ir.Value:
    """Each chosen expert on its own quantised values; `write` as in `lower_branches`."""
    fused, count, block = moe.fused, moe.count, moe.block

    def ffn(e: Emitter, expert: int, rows: ir.Value) -> ir.Value:
        dtype = type_of(rows).dtype

        def product(
            rows: ir.Value,
            codes: list[ir.Value],
            scales: list[ir.Value],
            statics: list[ir.Value],
            label: str,
        ) -> list[ir.Value]:
            if fused or not statics:
                static = _of_expert(e, statics[0], expert) if statics else None
                rows = _rounded(e, rows, static, moe, f"{label}.input")
            if fused:
                turned = codes[0].name in e.weights.turned
                one, scale = (_of_expert(e, each[0], expert) for each in (codes, scales))
                axis = 0 if turned else 1
                weight = _dequantize(e, one, scale, axis, block, dtype, f"{label}.weight")
                return [(_turned if turned else _matmul)(e, rows, weight, label)]
            each_has = len(codes) // count
            found = []
            for i in range(expert * each_has, (expert + 1) * each_has):
                name = f"{label}.{i % each_has}" if each_has > 1 else label
                weight = _dequantize(e, codes[i], scales[i], 0, block, dtype, f"{name}.weight")
                own = _rounded(e, rows, statics[i], moe, f"{name}.input") if statics else rows
                found.append(_turned(e, own, weight, name))
            return found

        halves = product(rows, moe.gate_up, moe.gate_up_scale, moe.gate_up_input, "gate_up")
        if fused:
            tokens, width = type_of(halves[0]).shape
            half = type_of(rows).like(tokens, width // 2)
            halves = list(e.ops("Split", halves, (half, half), "halves", axis=-1, num_outputs=2))
        act = swiglu(e, *halves)
        return product(act, moe.down, moe.down_scale, moe.down_input, "down")[0]

    return write(e, node, moe, count, ffn)


def _of_expert(e: Emitter, fused: ir.Value, expert: int) -> ir.Value:
    return e.weights.slice(fused, expert) if type_of(fused).shape else fused


def _turned(e: Emitter, x: ir.Value, weight: ir.Value, label: str) -> ir.Value:
    """The product of rows and a weight [out, in]."""
    out = type_of(x).like(type_of(x).shape[0], type_of(weight).shape[0])
    return e.op("Gemm", [x, weight], out, label, transB=1)


def _matmul(e: Emitter, x: ir.Value, weight: ir.Value, label: str) -> ir.Value:
    kind = type_of(x)
    return e.op("MatMul", [x, weight], kind.like(kind.shape[0], type_of(weight).shape[1]), label)


def _rounded(
    e: Emitter, x: ir.Value, static: ir.Value | None, moe: Fp8Moe[ir.Value], label: str
) -> ir.Value:
    """x [t, D] rounded to quantised values, as the scheme's `inputs` say; `static` is its scale."""
    if moe.inputs == "none":
        return x
    scale, block = static, moe.block
    if scale is None:
        group = block if moe.inputs == "group" else 0
        tokens, width = type_of(x).shape
        kind = TensorType((tokens, -(-width // group)) if group else (tokens,), _FLOAT)
        scale = _token_scale(e, x, group, moe.bound, kind, f"{label}.scale")
    codes = _quantize(e, e.cast(x, _FLOAT, f"{label}.wide"), scale, 0, block, f"{label}.codes")
    return _dequantize(e, codes, scale, 0, block, type_of(x).dtype, f"{label}.rounded")
