"""Every node of a graph has a program in its library, of its constants, types and shapes."""

from pathlib import Path

import onnx
import pytest

pytest.importorskip("triton", reason="kernels need triton")

import moec
from moec.artefact.artefact import open_artefact
from moec.exporters.onnx.ort_cuda import FUSED_OPS
from moec.exporters.ort_library import operations
from moec.exporters.ort_library.operations import operations_for
from moec.graph_builder import ops
from moec.kernels.ahead_of_time.program import TYPES
from moec.kernels.ahead_of_time.variants import Given, Operation
from moec.kernels.sizes import constants_text
from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced

FEW = {"block": 128, "head_dim": 16}


def kind(value: onnx.ValueInfoProto) -> tuple[int, list[int | str]]:
    shape = value.type.tensor_type.shape.dim
    return value.type.tensor_type.elem_type, [dim.dim_param or dim.dim_value for dim in shape]


def fits(given: Given, found: tuple[int, list[int | str]]) -> bool:
    """A size of the graph that is a name is a variable of the program."""
    dtype, shape = found
    alike = zip(given.shape, shape, strict=True)
    return TYPES[given.dtype] == dtype and all(
        a == b if isinstance(a, int) else isinstance(b, str) for a, b in alike
    )


def runs(operation: Operation, node: onnx.NodeProto, known: dict[str, onnx.ValueInfoProto]) -> bool:
    if operation.name != node.op_type:
        return False
    if constants_text(operation.constants).encode() != node.attribute[0].s:
        return False
    given = [*operation.inputs, *operation.outputs]
    names = [*node.input, *node.output]
    return len(given) == len(names) and all(
        not name if each is None else bool(name) and fits(each, kind(known[name]))
        for each, name in zip(given, names, strict=True)
    )


@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_every_node_has_a_program(name: str, tmp_path: Path) -> None:
    spec: ModelSpec = reduced(PRESETS[name], **FEW)
    art = moec.export(spec, "ort", out=tmp_path / "art", device="cuda")
    graph = onnx.load(str(art.path / "model.onnx"), load_external_data=False).graph
    known = {each.name: each for each in (*graph.input, *graph.value_info, *graph.output)}
    library = operations_for(open_artefact(art.path).manifest)
    nodes = [node for node in graph.node if node.domain == "moec"]
    for node in nodes:
        assert sum(runs(each, node, known) for each in library) == 1, node.name
    assert len(nodes) > 4 * spec.text.layers


def test_every_op_of_the_dialect_has_an_operation() -> None:
    assert set(operations._OF) == {each.name for each in (*FUSED_OPS, ops.attention_fp8)}
