"""Lower an fx graph to ONNX: walk the graph and write each node by its lowering rule, to onnx_ir.

Weights become graph inputs with a name and a type. `external_data.set_external_data` later turns
them into initializers whose bytes are in a checkpoint. A dialect that packs weights uses its own
layout; each of its weights comes with the packing that makes it. An input with a default value is
both a graph input and an initializer, which is how ONNX lets a caller leave it out.
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
from moec.graph_builder.weights import is_list, weights_of
from moec.spec.data import dtypes
from moec.spec.errors import MoecError
from moec.spec.names import expert_of, scaled
from moec.weights.packing import Packing
from moec.weights.view import STORED, name_of

#: types of ONNX by those of torch
DTYPES: dict[torch.dtype, ir.DataType] = {
    getattr(torch, name): ir.DataType[theirs] for name, theirs in dtypes("torch", "onnx").items()
}
_TORCH = {theirs: ours for ours, theirs in DTYPES.items()}
UINT4 = _TORCH[ir.DataType.UINT4]
#: operators of this domain are written "com.microsoft::Name"
MICROSOFT = "com.microsoft"
#: functions of this domain are in the model itself
FUNCTIONS = "moec.functions"

Values = tuple[ir.Value, ...]
Lower = Callable[..., ir.Value | Values]


@dataclass(frozen=True, slots=True)
class Rule:
    """A lowering rule: `lower` writes the nodes of `op` for which `when` returns True.

    `lower` takes an emitter, the node, and the op's operands: as its record, if the op has one.
    """

    op: Op
    lower: Lower
    when: Callable[[fx.Node], bool] = lambda node: True


@dataclass(slots=True)
class Weights:
    """The weights of the model that is being written, by name, and the packings of packed ones.

    The stacks of experts `turned` are stored as [expert, out, in], and so are their scales of
    blocks.
    """

    packs: bool
    turned: frozenset[str] = frozenset()
    values: dict[str, ir.Value] = field(default_factory=dict)
    packings: dict[str, Packing] = field(default_factory=dict)  # by parameter

    def packed(self, parameter: ir.Value, packing: Packing) -> Values:
        """The ONNX values for the tensors in which `packing` stores `parameter`."""
        kind = type_of(parameter)
        names = packing.names(name_of(kind.dtype))
        self.packings[names[0]] = packing
        for name, (shape, dtype) in zip(names, packing.shapes(kind.shape), strict=True):
            if name not in self.values:
                self.values[name] = value(name, TensorType(shape, STORED[dtype]))
        return tuple(self.values[name] for name in names)

    def slice(self, stacked: ir.Value, index: int) -> ir.Value:
        """Expert `index` of a stacked weight [expert, in, out], as it is stored.

        That is a weight [in, out], or [out, in] where the stack is turned.
        """
        name, kind = expert_of(str(stacked.name), index), type_of(stacked)
        shape = kind.shape[1:]
        if scaled(str(stacked.name)) in self.turned:  # a weight's own name, or a scale's weight
            shape = shape[::-1]
        return self.values.setdefault(name, value(name, kind.like(*shape)))

    def as_uint4(self, stored: ir.Value) -> ir.Value:
        """A weight of bytes, [..., n], as the 4-bit integers in them, UINT4 [..., 2n]."""
        kind = type_of(stored)
        if kind.dtype == torch.uint8:
            shape = (*kind.shape[:-1], 2 * kind.shape[-1])
            stored.type, stored.shape = ir.TensorType(ir.DataType.UINT4), ir.Shape(shape)
        return stored


@dataclass(slots=True)
class Emitter:
    """Writes the ONNX nodes for one fx node. Every value gets a name, a type and a shape."""

    name: str
    nodes: list[ir.Node]
    constants: dict[tuple[Any, ...], ir.Value]
    weights: Weights
    opset: int
    functions: dict[tuple[Any, ...], ir.Function] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)

    def op(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        of: TensorType,
        label: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """Add a node of the ONNX operator `kind`, with one output of type `of`.

        `label` names an intermediate value of the fx node. The value without a label is the fx
        node's result.
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
        """Add a node with several outputs, one for each of `types`; otherwise like `op`."""
        count = self.used[label] = self.used.get(label, -1) + 1
        stem = f"{self.name}/{label}" if label else self.name
        stem += f".{count}" if count else ""
        outputs = [
            value(stem if len(types) == 1 else f"{stem}.{i}", each) for i, each in enumerate(types)
        ]
        domain, _, operator = kind.rpartition("::")
        self.nodes.append(
            ir.Node(domain, operator, inputs, _attributes(attributes), outputs=outputs, name=stem)
        )
        return tuple(outputs)

    def packed(self, parameter: ir.Value, **how: Any) -> Values:
        """The ONNX values that hold `parameter` in packed form; `how` has fields of `Packing`."""
        return self.weights.packed(parameter, Packing(source=str(parameter.name), **how))

    def constant(self, array: np.ndarray[Any, Any] | np.generic | list[int] | int) -> ir.Value:
        """A small int64, bool or float constant. Nodes that use the same constant share it."""
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
        """Return x in the type `dtype`.

        This is x itself if it has that type. If the dialect packs weights and x is one, the result
        is a weight that is stored in `dtype`.
        """
        have = type_of(x)
        if self.weights.packs and x.name in self.weights.values:
            return self.packed(x, dtype=name_of(dtype))[0]
        if have.dtype == dtype:
            return x
        to = TensorType(have.shape, dtype)
        return self.op("Cast", [x], to, label, to=DTYPES[dtype].value)

    def expert(self, stacked: ir.Value, index: int, dtype: torch.dtype) -> ir.Value:
        """Expert `index` [in, out] of a stacked weight [expert, in, out], cast to `dtype`."""
        return self.cast(self.weights.slice(stacked, index), dtype, f"{stacked.name}.cast")

    def graph(self, outputs: Sequence[ir.Value], inputs: Sequence[ir.Value] = ()) -> ir.Graph:
        """The nodes that this emitter wrote, as a subgraph, which may use outer values."""
        return ir.Graph(inputs, outputs, nodes=self.nodes, name=self.name)

    def function(
        self, name: str, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]
    ) -> ir.Function:
        """The nodes that this emitter wrote, as a function; its constants are nodes too."""
        constants = [
            ir.Node("", "Constant", [], [ir.AttrTensor("value", each.const_value)], outputs=[each])
            for each in self.constants.values()
            if each.const_value is not None
        ]
        domains = {node.domain: 1 for node in self.nodes} | {"": self.opset}
        graph = ir.Graph(
            inputs, outputs, nodes=[*constants, *self.nodes], opset_imports=domains, name=name
        )
        return ir.Function(FUNCTIONS, name, graph=graph, attributes=[])

    def body(self, label: str) -> "Emitter":
        """An emitter for a subgraph of this node, with its own nodes and the same constants."""
        return Emitter(
            f"{self.name}/{label}", [], self.constants, self.weights, self.opset, self.functions
        )


def value(name: str, of: TensorType) -> ir.Value:
    """Make an ONNX value; symbolic sizes become named dimensions."""
    return ir.Value(name=name, type=ir.TensorType(DTYPES[of.dtype]), shape=ir.Shape(list(of.shape)))


def weight_values(kinds: Mapping[str, TensorType]) -> dict[str, ir.Value]:
    """ONNX values for weights by name. Those of one type share it: a list has hundreds of these."""
    alike = {kind: value("", kind) for kind in set(kinds.values())}
    return {
        name: ir.Value(name=name, type=alike[kind].type, shape=alike[kind].shape)
        for name, kind in kinds.items()
    }


def type_of(x: ir.Value) -> TensorType:
    """The type and shape of an ONNX value that this module made."""
    assert x.shape is not None and x.dtype is not None
    shape = tuple(dim.value if isinstance(dim, ir.SymbolicDim) else dim for dim in x.shape)
    return TensorType(shape, _TORCH[x.dtype])


@dataclass(frozen=True, slots=True)
class Lowered:
    """An ONNX model, and the packing of each weight, by the name of its first tensor.

    `packings` is empty if the dialect does not pack weights.
    """

    model: ir.Model
    packings: dict[str, Packing]


def lower(
    graph: fx.GraphModule,
    rules: Sequence[Rule],
    opset: int,
    name: str,
    packs: bool = False,
    turned: frozenset[str] = frozenset(),
) -> Lowered:
    """Lower `graph` to an ONNX model called `name`.

    The first of `rules` that matches a node writes it. With `packs`, each weight is stored as its
    lowering rule asks for it, otherwise as it is in the checkpoint. `turned` are the stacks of FP8
    experts that are stored as [expert, out, in].

    Raises:
        MoecError: no lowering rule matches a node; the message lists the rules that were tried.
    """
    by_target: dict[Any, list[Rule]] = {}
    for rule in rules:
        by_target.setdefault(rule.op.target, []).append(rule)
    values: dict[fx.Node, Any] = {}
    inputs: list[ir.Value] = []
    weights, stored = Weights(packs, turned), set[str]()
    nodes: list[ir.Node] = []
    functions: dict[tuple[Any, ...], ir.Function] = {}
    constants: dict[tuple[Any, ...], ir.Value] = {}
    defaults: list[ir.Value] = []
    outputs: Sequence[ir.Value] = ()
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            given = weight_values(weights_of(node))
            weights.values |= given
            stored.update(given)
            values[node] = list(given.values())
            if not is_list(node):
                (values[node],) = values[node]
        elif node.op == "placeholder":
            values[node] = value(node.meta["name"], node.meta["type"])
            inputs.append(values[node])
            if (default := node.meta.get("default")) is not None:
                values[node].const_value = ir.tensor(default, name=node.meta["name"])
                defaults.append(values[node])
        elif node.op == "output":
            outputs = _outputs(node, values)
        elif node.op == "call_function" and node.target in by_target:
            rule = _first(by_target[node.target], node)
            args = fx.map_arg(node.args, values.__getitem__)
            emitter = Emitter(node.meta["name"], nodes, constants, weights, opset, functions)
            values[node] = rule.lower(emitter, node, *rule.op.given(args))
        elif node.op == "call_function" and node.target.__name__ == "getitem":
            values[node] = values[node.args[0]][node.args[1]]
            values[node].name = node.meta["name"]
        else:
            raise _no_rule(node, [rule.op.name for rule in rules])
    used = [each for each in weights.values.values() if each.uses()]
    if packs:  # weights that no lowering rule changed need a packing too
        for each in used:
            if each.name in stored and each.name not in weights.packings:
                kind = {"source": each.name, "dtype": name_of(type_of(each).dtype)}
                weights.packings[each.name] = Packing.model_validate(kind)
    domains = {node.domain: 1 for node in nodes} | {"": opset}
    ir_graph = ir.Graph(
        [*inputs, *used],
        outputs,
        nodes=nodes,
        initializers=[*constants.values(), *defaults],
        opset_imports=domains,
        name=name,
    )
    model = ir.Model(
        ir_graph, ir_version=11, producer_name="moec", functions=list(functions.values())
    )
    return Lowered(model, weights.packings)


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
        "add a lowering rule to the dialect's table",
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
