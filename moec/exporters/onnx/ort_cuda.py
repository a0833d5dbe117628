"""The dialect `ort-cuda-fp8`: the fused FP8 ops of target torch, for ONNX Runtime on a GPU.

Each fused op is one node of our own domain, of the op's name. moec's custom-op library runs it
(`moec.exporters.ort_library`). Its tensors are inputs, and its numbers are one attribute,
`constants`. Attention has its two caches as further outputs: the caller binds each to the memory of
the input that it continues. Weights are joined as target torch has them. Those that are one
piece of a file are initializers with external data, all others inputs.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from moec.exporters.onnx.lowering import DTYPES, Emitter, Rule, Values, type_of
from moec.exporters.onnx.standard import STANDARD, column
from moec.exporters.onnx.tensorrt import fuse_by_count
from moec.graph_builder import ops
from moec.graph_builder.ops.operands import arguments
from moec.graph_builder.ops.registry import Op
from moec.graph_builder.types import TensorType
from moec.kernels.sizes import constants_text
from moec.spec import names

#: the domain of our own operators
MOEC = "moec"
#: arguments that a node does not have: the library computes in bf16, and reads `last`
_UNSAID = ("dtype", "total")


def split(op: Op, given: Any) -> tuple[list[Any], dict[str, int | float]]:
    """The tensors among the arguments of `op`, and its numbers by name.

    An optional argument that is left out is None among the tensors, and absent among the numbers.
    """
    tensors, numbers = [], {}
    for argument, each in zip(op.target._schema.arguments, given, strict=True):
        if argument.name in _UNSAID:
            continue
        if "Tensor" in str(argument.type):
            tensors.append(each)
        elif each is not None:
            numbers[argument.name] = each
    return tensors, numbers


def whole(op: Op, tensors: Sequence[Any], text: str) -> list[Any]:
    """The arguments of `op`, from its tensors and the text of its numbers: `split` undone.

    `total` is that of buffers which are full.
    """
    rest, numbers = iter(tensors), dict(part.split("=") for part in text.split())
    found: list[Any] = []
    for argument in op.target._schema.arguments:
        if argument.name == "dtype":
            found.append("fp32")
        elif argument.name == "total":
            found.append(torch.tensor(tensors[4].shape[2], dtype=torch.int32))
        elif "Tensor" in str(argument.type):
            found.append(next(rest))
        else:
            value = numbers.get(argument.name)
            kind = float if "float" in str(argument.type) else int
            found.append(None if value is None else kind(value))
    return found


def _lower(e: Emitter, node: fx.Node, *operands: Any, op: Op) -> Values | ir.Value:
    given = arguments(operands[0]) if op.operands else operands
    inputs, numbers = split(op, given)
    types = node.meta["type"]
    one = not isinstance(types, tuple)
    text = {"constants": constants_text(numbers)}
    found = e.ops(f"{MOEC}::{op.name}", inputs, (types,) if one else types, **text)
    return found[0] if one else found


def _attention(e: Emitter, node: fx.Node, *operands: Any) -> Values:
    op = ops.attention_fp8
    inputs, numbers = split(op, arguments(operands[0]))
    caches = inputs[4:6]
    types = (*node.meta["type"], *(type_of(each) for each in caches))
    found = e.ops(f"{MOEC}::{op.name}", inputs, types, constants=constants_text(numbers))
    for cache, present in zip(caches, found[2:], strict=True):
        present.name = names.present_of(str(cache.name))
    return found[:2]


def _positions(e: Emitter, node: fx.Node, ids: ir.Value, past: ir.Value) -> ir.Value:
    """The positions without the size of ids, which ONNX Runtime would copy from the host."""
    out: TensorType = node.meta["type"]
    ones = _ones(e, ids, "ones")
    count = e.op("CumSum", [ones, e.constant(1)], out, "count")
    start = e.op("Sub", [past, e.constant(1)], type_of(past), "start")
    return e.op("Add", [column(e, start, "start.column"), count], out)


def _ones(e: Emitter, x: ir.Value, label: str) -> ir.Value:
    """Ones of the shape of x, int64."""
    kind = type_of(x)
    zeros = e.op("Mul", [x, e.constant(0)], kind, f"{label}.zeros")
    return e.op("Add", [zeros, e.constant(1)], kind, label)


def _fuse(
    e: Emitter, node: fx.Node, x: ir.Value, ids: ir.Value, features: ir.Value, token: int
) -> ir.Value:
    """Early fusion as in the dialect `tensorrt`, with the number of features on the GPU."""
    rows, size = type_of(features).shape[0], TensorType((1,), torch.int64)
    ends = [e.constant([each]) for each in (0, 1, 1)]
    first = e.op("Slice", [features, *ends], type_of(features).like(rows, 1), "first")
    whole = TensorType((rows, 1), torch.int64)
    number = e.op("Cast", [first], whole, "number", to=DTYPES[torch.int64].value)
    flat = e.op("Reshape", [_ones(e, number, "rows"), e.constant([-1])], whole.like(rows), "flat")
    given = e.op("ReduceSum", [flat, e.constant([0])], size, "given", keepdims=1)
    return fuse_by_count(e, node, x, ids, features, token, given)


def give_caches(model: ir.Model) -> None:
    """Make the caches that attention returns outputs of the graph."""
    for node in model.graph:
        if node.domain == MOEC and node.op_type == ops.attention_fp8.name:
            model.graph.outputs.extend(node.outputs[2:])


def weights_as_inputs(model: ir.Model) -> None:
    """Turn the weights of `model` that have external data into inputs."""
    graph = model.graph
    for each in list(graph.initializers.values()):
        if isinstance(each.const_value, ir.ExternalTensor):
            graph.initializers.pop(str(each.name))
            each.const_value = None
            graph.inputs.append(each)


#: the fused ops that the library runs
FUSED_OPS = (
    ops.norm_fp8,
    ops.skip_norm_fp8,
    ops.skip_norm,
    ops.rms_norm,
    ops.encode,
    ops.swiglu_fp8,
    ops.fp8_linear,
    ops.moe_layer,
    ops.norm_moe,
    ops.norm_moe_norm_fp8,
)
ORT_CUDA = (
    *(Rule(each, partial(_lower, op=each)) for each in FUSED_OPS),
    Rule(ops.attention_fp8, _attention),
    Rule(ops.fuse, _fuse),
    Rule(ops.positions, _positions),
    *STANDARD,
)
