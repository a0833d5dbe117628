"""Names are for readers: rename any node, and each target makes the same of the graph.

Nodes are renamed where every builder ends, between the graph and the passes. What is no node's own
business stays: the names of inputs and weights, which files hold.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from torch import fx

from moec.artefact.engine_options import EngineOptions
from moec.exporters.onnx import write
from moec.exporters.precision import in_precision
from moec.exporters.tensorrt import onnx_model
from moec.exporters.torch import program
from moec.graph_builder.builder import Builder
from moec.graph_builder.passes.weights_as_inputs import lift_weights
from moec.graph_builder.roles import Role
from moec.spec.errors import MoecError
from moec.spec.model import ModelSpec
from tests.small import SMALL

Make = Callable[[ModelSpec], dict[str, fx.GraphModule]]
Lower = Callable[[fx.GraphModule, str], list[str]]


def _onnx(dialect: str, graph: fx.GraphModule, part: str) -> list[str]:
    lowered = write.lower_model(graph, dialect, part, part)
    return _written(lowered.model, lowered.packings)


_standard = partial(_onnx, "standard")


def _tensorrt(graph: fx.GraphModule, part: str) -> list[str]:
    return _written(*onnx_model.lower(graph, part, part))


def _written(model: Any, packings: dict[str, Any]) -> list[str]:
    graph = model.graph
    ports = [str(each.name) for each in (*graph.inputs, *graph.outputs)]
    return [*ports, *(node.op_type for node in graph), *sorted(packings)]


def _torch(graph: fx.GraphModule, part: str) -> list[str]:
    outputs = list(graph.graph.nodes)[-1].meta["outputs"]
    flat = lift_weights(graph)
    return [*outputs, *(f"{node.op} {node.target}" for node in flat.graph.nodes)]


def _kind(node: fx.Node) -> str:
    """What a node is: its role, or else its op."""
    return str(node.meta["role"].role if "role" in node.meta else node.target)


_OPTIONS = EngineOptions(context=32, piece=8, batch=2, build=False)
_CACHES = in_precision(SMALL, "fp8", "modelopt", "fp8")
#: target -> its spec, what makes graphs of it in a dialect, what writes one of them
TARGETS: dict[str, tuple[ModelSpec, Make, Lower]] = {
    "onnx": (_CACHES, partial(write.graphs_of, precision="fp32", dialect="standard"), _standard),
    **{
        dialect: (
            SMALL,
            partial(write.graphs_of, precision="fp32", dialect=dialect),
            partial(_onnx, dialect),
        )
        for dialect in ("ort", "ort-packed", "ort-int8", "ort-int4")
    },
    "torch": (
        in_precision(SMALL, "fp8", "dynamic", None),
        partial(program.graphs_of, precision="bf16"),
        _torch,
    ),
    **{
        dialect: (
            in_precision(SMALL, "fp8", scheme, None),
            partial(onnx_model.graphs_of, precision="bf16", dialect=dialect, options=_OPTIONS),
            _tensorrt,
        )
        for dialect, scheme in (("tensorrt", "static"), ("tensorrt-plugin", "mixed"))
    },
}


#: roles of latent attention and of multi-token prediction, which no graph here has
_OF_DEEPSEEK = {Role.QUERY_DOWN, Role.LATENT, Role.JOIN}
#: whose passes and rules are others' too; all their nodes are renamed at once, not one by one
ALIKE = ("ort", "ort-int8")
#: targets whose nodes take longest; the others have most of their passes
LONG = ("ort-packed", "ort-int4", "tensorrt-plugin")


class Seam:
    """Stands where builders close their graphs; `change` then has each node that has a name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.change: Callable[[fx.Node], None] = lambda node: None
        close = Builder.output

        def output(builder: Builder, outputs: dict[str, fx.Node]) -> fx.GraphModule:
            graph = close(builder, outputs)
            for node in graph.graph.nodes:
                if node.op == "call_function":
                    self.change(node)
            graph.recompile()
            return graph

        monkeypatch.setattr(Builder, "output", output)


@pytest.fixture
def seam(monkeypatch: pytest.MonkeyPatch) -> Seam:
    return Seam(monkeypatch)


def made(target: str, vision: bool = False) -> dict[str, list[str]]:
    """What `target` writes, part by part."""
    spec, make, lower = TARGETS[target]
    if not vision:
        spec = spec.model_copy(update={"vision": None})
    return {part: lower(graph, part) for part, graph in make(spec).items()}


@pytest.mark.full
@pytest.mark.parametrize(
    "target",
    [
        pytest.param(each, marks=pytest.mark.slow if each in LONG else ())
        for each in TARGETS
        if each not in ALIKE
    ],
)
def test_a_renamed_node_changes_nothing(target: str, seam: Seam) -> None:
    first: dict[str, str] = {}  # node of each kind
    seam.change = lambda node: first.setdefault(_kind(node), node.meta["name"])
    expected = made(target)
    assert {*Role} - _OF_DEEPSEEK <= first.keys()
    for kind, name in first.items():

        def rename(node: fx.Node, name: str = name) -> None:
            if node.meta["name"] == name:
                node._rename("another")
                node.meta["name"] = "another"

        seam.change = rename
        assert made(target) == expected, kind


@pytest.mark.full
@pytest.mark.parametrize("target", TARGETS)
def test_all_nodes_of_all_parts_renamed_change_nothing(target: str, seam: Seam) -> None:
    expected = made(target, vision=True)
    seam.change = lambda node: node.meta.update(name=f"another.{node.name}")
    assert made(target, vision=True) == expected


_LINEAR = {Role.QUERY, Role.KEY, Role.VALUE, Role.ATTENTION_OUT, Role.HEAD, Role.ROUTER}
_QUANTISED = _LINEAR | {Role.GATE, Role.UP, Role.DOWN}
_EXPERTS = {Role.EMBEDDING, Role.ROUTER, Role.EXPERTS}
_TABLES = {Role.ROPE_COS, Role.ROPE_SIN, Role.TEMPERATURE}
#: the roles that each target looks for
WANTED = {
    "onnx": {Role.KEYS, Role.VALUES},
    "ort-packed": set[Role](),
    "ort-int4": _QUANTISED,
    "torch": {Role.QUERY, Role.ATTENTION, Role.ATTENTION_OUT, Role.GATE, Role.DOWN}
    | _EXPERTS
    | _TABLES,
    "tensorrt-plugin": _EXPERTS,
}


@pytest.mark.full
@pytest.mark.parametrize("target", WANTED)
def test_a_role_that_is_missing_is_named(target: str, seam: Seam) -> None:
    expected, missed = made(target), set[Role]()
    for role in Role:

        def forget(node: fx.Node, role: Role = role) -> None:
            if _kind(node) == role:
                del node.meta["role"]

        seam.change = forget
        try:
            assert made(target) == expected, role
        except MoecError as error:
            missed.add(role)
            assert "without role: " in error.found and role in f"{error.found} {error.expected}"
    assert missed == WANTED[target]


def test_a_program_is_exported_of_renamed_nodes(seam: Seam) -> None:
    spec, make, _ = TARGETS["torch"]
    expected = program.program_of(make(spec)["model"]).ports
    seam.change = lambda node: node.meta.update(name=f"another.{node.name}")
    assert program.program_of(make(spec)["model"]).ports == expected
