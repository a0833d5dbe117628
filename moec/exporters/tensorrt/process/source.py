"""Refuse ONNX files whose meaning TensorRT's parser would silently change.

The parser recognises a node by its operator and ignores the domain. It ignores attributes and
inputs that it does not know, and it converts some types to wider ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from moec.artefact.engine_job import DTYPES
from moec.spec.errors import refuse


@dataclass(frozen=True, slots=True)
class Reads:
    """What the parser reads of a node: the first `inputs` inputs, and these `attributes`.

    None stands for the attributes of ONNX's own operator.
    """

    inputs: int
    attributes: frozenset[str] | None = None


#: The inputs with lengths differ between versions of Attention, so that only the mask may limit it.
_READS = {
    "Attention": Reads(inputs=4),
    "TRT_Attention": Reads(4, frozenset({"causal_kind", "TRT_decomposable"})),
}
#: attributes that the parser knows in addition to those of ONNX
_OWN = {"Attention": frozenset({"TRT_decomposable"})}
#: attributes that the parser reads of any node, to find a plugin
_ANY = frozenset({"plugin_version", "plugin_namespace"})


def check_source(path: str) -> onnx.ModelProto:
    """Load the model at `path` without external data, and check it.

    Raises:
        MoecError: the file is not an ONNX model, or TensorRT would change its meaning.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        refuse(path, error, "an ONNX model", "build the artefact again")
    local = {each.name for each in model.functions}
    versions = {each.domain: each.version for each in model.opset_import}
    for graph in graphs(model.graph):
        for held in (*graph.initializer, *(graph.input if graph is model.graph else ())):
            _check_dtype(path, held)
    for node in _nodes(model):
        if node.op_type not in local:
            _check_node(path, node, versions.get("", onnx.defs.onnx_opset_version()))
    return model


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """`graph` and all subgraphs inside it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from graphs(inner)


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for graph in graphs(model.graph):
        yield from graph.node
    for function in model.functions:
        yield from function.node


def _check_dtype(path: str, held: onnx.TensorProto | onnx.ValueInfoProto) -> None:
    is_weight = isinstance(held, onnx.TensorProto)
    number = held.data_type if is_weight else held.type.tensor_type.elem_type
    dtype = onnx.TensorProto.DataType.Name(number).lower()
    if dtype not in DTYPES:
        refuse(
            f"{path}: {'weight' if is_weight else 'input'} {held.name}",
            f"{dtype}, which TensorRT lacks or widens",
            f"one of {', '.join(DTYPES)}",
            "store bytes as int8 or float8e4m3fn",
        )


def _check_node(path: str, node: onnx.NodeProto, opset: int) -> None:
    where = f"{path}: node {node.name or '?'} ({node.op_type})"
    reads = _READS.get(node.op_type)
    for index, name in enumerate(node.input):
        if reads and name and index >= reads.inputs:
            refuse(
                where,
                f"input {index}, {name}, which TensorRT may ignore",
                f"{reads.inputs} inputs: queries, keys, values, mask",
                "express the limits of attention in the mask",
                exit_code=1,
            )
    known = reads.attributes if reads and reads.attributes else _attributes(node.op_type, opset)
    for attribute in node.attribute:
        if known is not None and attribute.name not in known | _ANY:
            refuse(
                where,
                f"attribute {attribute.name}, which TensorRT would ignore",
                f"only the attributes {', '.join(sorted(known))}",
                "leave the attribute out",
                exit_code=1,
            )
        if attribute.HasField("t"):
            constant = onnx.TensorProto(data_type=attribute.t.data_type, name=node.name)
            _check_dtype(path, constant)


def _attributes(op: str, opset: int) -> frozenset[str] | None:
    """The attributes of ONNX's operator `op`; None if ONNX has no such operator."""
    try:
        schema = onnx.defs.get_schema(op, opset)
    except onnx.defs.SchemaError:
        return None
    return frozenset(schema.attributes) | _OWN.get(op, frozenset())
