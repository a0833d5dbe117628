"""ONNX models of a node or two, and the jobs that build them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto as T
from onnx import helper as h

from moec.artefact.engine_job import Job, Span

BATCH, HEADS, GROUPS, STEPS, SLOTS, SIZE = "batch", 8, 2, 4, 16, 64
#: the inputs of attention, and of what tests add to it
SHAPES = {
    "q": (BATCH, HEADS, STEPS, SIZE),
    "k": (BATCH, GROUPS, SLOTS, SIZE),
    "v": (BATCH, GROUPS, SLOTS, SIZE),
    "m": (BATCH, 1, STEPS, SLOTS),
    "n": (BATCH,),
}
_DTYPES = {"m": T.BOOL, "n": T.INT64}


def value(name: str, dtype: int, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    return h.make_tensor_value_info(name, dtype, shape)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    weights: Sequence[onnx.TensorProto] = (),
) -> onnx.ModelProto:
    graph = h.make_graph(list(nodes), "g", list(inputs), list(outputs), list(weights))
    opsets = [h.make_opsetid("", 24), h.make_opsetid("trt", 1)]
    return h.make_model(graph, opset_imports=opsets, ir_version=11)


def attention(
    reads: Sequence[str] = ("q", "k", "v", "m"),
    dtype: int = T.BFLOAT16,
    domain: str = "",
    op: str = "Attention",
    extra: Sequence[onnx.NodeProto] = (),
    outputs: Sequence[onnx.ValueInfoProto] = (),
    **attributes: Any,
) -> onnx.ModelProto:
    """One attention node "att" that reads `reads`, "" being an input that is left out."""
    node = h.make_node(op, list(reads), ["y"], name="att", domain=domain, **attributes)
    inputs = [value(n, _DTYPES.get(n, dtype), SHAPES[n]) for n in dict.fromkeys(reads) if n]
    y = value("y", dtype, SHAPES["q"])
    return model([*extra, node], inputs, [y, *outputs])


def spans(made: onnx.ModelProto) -> dict[str, Span]:
    """A profile of every input of `made` that has a symbolic size: 1 to 4 of it."""
    found = {}
    for each in made.graph.input:
        dims = each.type.tensor_type.shape.dim
        if any(dim.dim_param for dim in dims):
            low, high = (tuple(n if d.dim_param else d.dim_value for d in dims) for n in (1, 4))
            found[each.name] = Span(min=low, opt=low, max=high)
    return found


def job(made: onnx.ModelProto, folder: Path, **changes: Any) -> Job:
    """The job that builds `made`, saved in `folder`, for SM89."""
    path = folder / "model.onnx"
    onnx.save(made, path)

    def dtypes(values: Sequence[onnx.ValueInfoProto]) -> dict[str, str]:
        kinds = {each.name: each.type.tensor_type.elem_type for each in values}
        return {name: T.DataType.Name(kind).lower() for name, kind in kinds.items()}

    profile = spans(made)
    fields = {
        "onnx": str(path),
        "engine": str(folder / "model.engine"),
        "package": "tensorrt_rtx",
        "architectures": ("SM89",),
        "profiles": (profile,) if profile else (),
        "attentions": sum("Attention" in node.op_type for node in made.graph.node),
        "decomposable": False,
        "inputs": dtypes(made.graph.input),
        "outputs": dtypes(made.graph.output),
    }
    return Job.model_validate(fields | changes)
