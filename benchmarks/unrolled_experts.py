"""Write MoE layers in plain ONNX with nodes for each expert: the peer of many_experts.py.

Tracing a model gives such a graph. It has norms, routers and routed experts only, without
attention, dense layers and shared experts. Its weights are the bytes that moec's graph uses.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from moec.spec import names
from moec.spec.model import ModelSpec
from moec.weights.shard import TensorEntry

_FLOAT = ir.DataType.FLOAT


def unrolled_experts(spec: ModelSpec, entries: Mapping[str, TensorEntry], root: Path) -> ir.Model:
    """A model of all MoE layers of `spec` in sequence, from x [tokens, dim] to y [tokens, dim].

    `entries` says where the weights are, in files below `root`.
    """
    x = graph_in = ir.val("x", _FLOAT, ["tokens", spec.text.dim])
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 24}, name="unrolled")
    tape = Tape(graph)

    def op(kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return tape.op(kind, inputs, attributes)

    def constant(name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        return tape.initializer(ir.tensor(array, name=name))

    def weight(entry: TensorEntry) -> ir.Value:
        tensor = ir.ExternalTensor(
            entry.file.relative_to(root).as_posix(), entry.offset, entry.nbytes,
            ir.DataType.BFLOAT16, shape=ir.Shape(entry.shape), name=entry.name, base_dir=root,
        )  # fmt: skip
        return op("Cast", tape.initializer(tensor), to=_FLOAT)

    one, flat = constant("one", np.array([1])), constant("flat", np.array([-1]))
    zero = constant("zero", np.array(0, np.float32))
    ids = [constant(f"expert.{e}", np.array(e)) for e in range(spec.text.experts.count)]
    for layer in (layer for layer in spec.text.all_layers if layer.moe):
        gate_up_name, down_name = names.routed(layer.index)
        scale = weight(entries[names.dense(layer.index, "norm", "weight")])
        normed = op("RMSNormalization", x, scale, axis=-1, epsilon=spec.text.norm_eps)
        router = weight(entries[names.moe(layer.index, "router", "weight")])
        logits = op("Gemm", normed, router, transB=1)
        best, chosen = tape.op_multi_out("TopK", [logits, one], {"axis": -1}, num_outputs=2)
        scaled = op("Mul", normed, op("Sigmoid", best))
        chosen = op("Reshape", chosen, flat)
        total = op("Mul", scaled, zero)
        for e, expert in enumerate(ids):
            rows = op("Transpose", op("NonZero", op("Equal", chosen, expert)), perm=[1, 0])
            mine = op("GatherND", scaled, rows)
            h = op("MatMul", mine, weight(entries[gate_up_name][e]))
            gate, up = tape.op_multi_out(
                "Split", [h], {"axis": -1, "num_outputs": 2}, num_outputs=2
            )
            act = op("Mul", op("Mul", gate, op("Sigmoid", gate)), up)
            down = op("MatMul", act, weight(entries[down_name][e]))
            total = op("ScatterND", total, rows, down)
        x = op("Add", x, total)
    x.name, x.type, x.shape = "y", graph_in.type, graph_in.shape
    graph.outputs.append(x)
    return ir.Model(graph, ir_version=11)
