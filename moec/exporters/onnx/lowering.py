"""Walk an fx graph and write ONNX, one rule per op, straight to onnx_ir.

Weights become graph inputs of the model: named, typed and unbound. `binding.bind` turns them into
initializers that point into a checkpoint. An input with a default is an input *and* an initializer,
which is how ONNX lets a caller leave it out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.convenience import convert_attributes
from torch import fx

from moec.graph_builder.ops import Op
from moec.graph_builder.types import TensorType
from moec.spec.errors import MoecError

DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int64: ir.DataType.INT64,
    torch.bool: ir.DataType.BOOL,
}

Values = tuple[ir.Value, ...]
Lower = Callable[..., ir.Value | Values]


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of a dialect: nodes of `op` for which `when` holds are written by `lower`."""

    op: Op
    lower: Lower
    when: Callable[[fx.Node], bool] = lambda node: True


@dataclass(slots=True)
class Emitter:
    """Writes ONNX nodes for one fx node. Every value gets a name, a type and a shape."""

    name: str
    nodes: list[ir.Node]
    constants: dict[tuple[Any, ...], ir.Value]
    used: dict[str, int] = field(default_factory=dict)

    def op(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        of: TensorType,
        label: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """Add a node of ONNX operator `kind` with one output.

        `label` names the value within the fx node; without one the value *is* the node's result.
        """
        return self.ops(kind, inputs, (of,), label, **attributes)[0]

    def ops(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        types: Sequence[TensorType],
        label: str = "",
        **attributes: Any,
    ) -> Values:
        """`op` for a node with several outputs: a value for each of `types`."""
        count = self.used[label] = self.used.get(label, -1) + 1
        stem = f"{self.name}/{label}" if label else self.name
        stem += f".{count}" if count else ""
        outputs = [
            value(stem if len(types) == 1 else f"{stem}.{i}", each) for i, each in enumerate(types)
        ]
        self.nodes.append(
            ir.Node("", kind, inputs, _attributes(attributes), outputs=outputs, name=stem)
        )
        return tuple(outputs)

    def constant(self, array: np.ndarray[Any, Any] | np.generic | list[int] | int) -> ir.Value:
        """A small int64, bool or float constant, shared by all nodes that want the same one."""
        array = np.asarray(array)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.constants:
            shown = "_".join(map(str, array.flat)) if array.size <= 4 else f"n{len(self.constants)}"
            name = f"constants.{array.dtype}_{array.ndim}d_{shown}"
            tensor = ir.tensor(array, name=name)
            self.constants[key] = ir.Value(
                name=name,
                type=ir.TensorType(tensor.dtype),
                shape=ir.Shape(array.shape),
                const_value=tensor,
            )
        return self.constants[key]

    def cast(self, x: ir.Value, dtype: torch.dtype, label: str) -> ir.Value:
        """x in `dtype`: x itself where it has it already."""
        have = type_of(x)
        if have.dtype == dtype:
            return x
        to = TensorType(have.shape, dtype)
        return self.op("Cast", [x], to, label, to=DTYPES[dtype].value)

    def body(self, label: str) -> "Emitter":
        """An emitter for a subgraph of this node: own nodes, the same constants."""
        return Emitter(f"{self.name}/{label}", [], self.constants)


def value(name: str, of: TensorType) -> ir.Value:
    """An ONNX value; symbolic sizes become named dimensions."""
    return ir.Value(name=name, type=ir.TensorType(DTYPES[of.dtype]), shape=ir.Shape(list(of.shape)))


def type_of(x: ir.Value) -> TensorType:
    """The type of an ONNX value that this module made."""
    assert x.shape is not None and x.dtype is not None
    dtype = next(ours for ours, theirs in DTYPES.items() if theirs == x.dtype)
    shape = tuple(dim.value if isinstance(dim, ir.SymbolicDim) else dim for dim in x.shape)
    return TensorType(shape, dtype)


def lower(graph: fx.GraphModule, rules: Sequence[Rule], opset: int, name: str) -> ir.Model:
    """Write `graph` by `rules`: for each node the first row that matches.

    Raises:
        MoecError: an op has no matching row; lists the rows tried.
    """
    by_target: dict[Any, list[Rule]] = {}
    for rule in rules:
        by_target.setdefault(rule.op.target, []).append(rule)
    values: dict[fx.Node, Any] = {}
    inputs: list[ir.Value] = []
    weights: list[ir.Value] = []
    nodes: list[ir.Node] = []
    constants: dict[tuple[Any, ...], ir.Value] = {}
    defaults: list[ir.Value] = []
    outputs: Sequence[ir.Value] = ()
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            values[node] = value(node.meta["name"], node.meta["type"])
            (inputs if node.op == "placeholder" else weights).append(values[node])
            if (default := node.meta.get("default")) is not None:
                values[node].const_value = ir.tensor(default, name=node.meta["name"])
                defaults.append(values[node])
        elif node.op == "output":
            outputs = _outputs(node, values)
        elif node.op == "call_function" and node.target in by_target:
            rule = _first(by_target[node.target], node)
            args = [values[arg] if isinstance(arg, fx.Node) else arg for arg in node.args]
            values[node] = rule.lower(Emitter(node.meta["name"], nodes, constants), node, *args)
        elif node.op == "call_function" and node.target.__name__ == "getitem":
            values[node] = values[node.args[0]][node.args[1]]
            values[node].name = node.meta["name"]
        else:
            raise _no_rule(node, [rule.op.name for rule in rules])
    ir_graph = ir.Graph(
        [*inputs, *weights],
        outputs,
        nodes=nodes,
        initializers=[*constants.values(), *defaults],
        opset_imports={"": opset},
        name=name,
    )
    return ir.Model(ir_graph, ir_version=11, producer_name="moec")


def _first(rules: Sequence[Rule], node: fx.Node) -> Rule:
    for rule in rules:
        if rule.when(node):
            return rule
    raise _no_rule(node, [f"{rule.op.name} when {rule.when.__name__}" for rule in rules])


def _no_rule(node: fx.Node, tried: list[str]) -> MoecError:
    return MoecError(
        f"lowering of {node.meta.get('name', node.name)}",
        f"{node.target} has no rule in this dialect",
        f"one of {', '.join(tried)}",
        "add a row to the dialect's table",
    )


def _outputs(node: fx.Node, values: Mapping[fx.Node, ir.Value]) -> list[ir.Value]:
    results = []
    sources = cast(tuple[fx.Node, ...], node.args[0])
    for name, source in zip(node.meta["outputs"], sources, strict=True):
        result = values[source]
        result.name = name
        results.append(result)
    return results


def _attributes(attributes: Mapping[str, Any]) -> list[ir.Attr]:
    return [
        ir.AttrGraph(name, of) if isinstance(of, ir.Graph) else convert_attributes({name: of})[0]
        for name, of in attributes.items()
    ]
