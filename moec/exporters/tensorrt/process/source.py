"""What an ONNX file may not hold, because TensorRT's parser would silently make something else.

The parser takes a node by its operator alone, whatever the domain; it ignores attributes and inputs
that it does not know, and widens some dtypes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from moec.artefact.engine_job import DTYPES
from moec.spec.errors import refuse


@dataclass(frozen=True, slots=True)
class Reads:
    """What the parser reads of a node: the first `inputs`, and `attributes`, None: as ONNX has."""

    inputs: int
    attributes: frozenset[str] | None = None


#: attention's lengths have moved between versions: the mask alone says what may be seen
_READS = {
    "Attention": Reads(inputs=4),
    "TRT_Attention": Reads(4, frozenset({"causal_kind", "TRT_decomposable"})),
}
#: attributes that the parser knows beside those of ONNX
_OWN = {"Attention": frozenset({"TRT_decomposable"})}
#: and those that it reads of any node, to find a plugin
_ANY = frozenset({"plugin_version", "plugin_namespace"})


def check_source(path: str) -> onnx.ModelProto:
    """The model at `path`, without external data.

    Raises:
        MoecError: it is no model, or holds what TensorRT would take for something else.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        refuse(path, error, "an ONNX model", "build it again")
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
    """`graph` and all that its nodes hold."""
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
            ", ".join(DTYPES),
            "give bytes as int8 or float8e4m3fn",
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
                "put what it says into the mask",
                exit_code=1,
            )
    known = reads.attributes if reads and reads.attributes else _attributes(node.op_type, opset)
    for attribute in node.attribute:
        if known is not None and attribute.name not in known | _ANY:
            refuse(
                where,
                f"attribute {attribute.name}, which TensorRT would ignore",
                ", ".join(sorted(known)),
                "leave the attribute out",
                exit_code=1,
            )
        if attribute.HasField("t"):
            constant = onnx.TensorProto(data_type=attribute.t.data_type, name=node.name)
            _check_dtype(path, constant)


def _attributes(op: str, opset: int) -> frozenset[str] | None:
    """The attributes of ONNX's own operator `op`; None where there is no such operator."""
    try:
        schema = onnx.defs.get_schema(op, opset)
    except onnx.defs.SchemaError:
        return None
    return frozenset(schema.attributes) | _OWN.get(op, frozenset())
