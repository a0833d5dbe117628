"""Build a torch.fx graph of our ops. Its weights are on the meta device, so they take no memory."""

from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any

import torch
from torch import fx, nn

from moec.graph_builder.module import module_of
from moec.graph_builder.ops import Op
from moec.graph_builder.roles import Place
from moec.graph_builder.types import TensorType
from moec.graph_builder.weights import add_list, add_weight
from moec.spec import names
from moec.weights.view import TORCH_DTYPES


class Builder:
    """An fx graph under construction. Each node has its `name` and its `type` in `node.meta`.

    The names of fx nodes cannot hold dots. So `meta["name"]` is the name that users see in the ONNX
    graph, in reports and in errors. Passes go by `meta["role"]`: see `moec.graph_builder.roles`.
    """

    def __init__(
        self, parameters: dict[str, tuple[int, ...]], stored: Callable[[str], str]
    ) -> None:
        """Make a builder for `parameters`; `stored` says in which dtype each is stored."""
        self._shapes, self._stored = parameters, stored
        self._root, self._graph = nn.Module(), fx.Graph()
        self._known: dict[str, fx.Node] = {}

    def input(
        self,
        name: str,
        shape: tuple[Any, ...],
        dtype: torch.dtype,
        default: torch.Tensor | None = None,
    ) -> fx.Node:
        """Add a graph input. The module's signature has its `name` with underscores for dots.

        A caller may leave out an input that has a `default`. The default is in `node.meta`.
        """
        node = self._graph.placeholder(name.replace(".", "_"))
        node.meta["default"] = default
        return tag(node, name, TensorType(shape, dtype))

    def knows(self, name: str) -> bool:
        """Whether there is a parameter `name`."""
        return name in self._shapes

    def parameter(self, name: str) -> fx.Node:
        """The node of parameter `name`. A second call returns the same node."""
        if name not in self._known:
            self._known[name] = add_weight(self._root, self._graph, name, self._kind(name))
        return self._known[name]

    def experts(self, parameter: str, count: int) -> fx.Node:
        """The list of the tensors in which `count` experts have their shares of `parameter`."""
        parts = [part for e in range(count) for part in names.separate(parameter, e)]
        kinds = {part: self._kind(part) for part in parts}
        return add_list(self._root, self._graph, names.list_of(parameter), kinds)

    def _kind(self, name: str) -> TensorType:
        return TensorType(self._shapes[name], TORCH_DTYPES[self._stored(name)])

    def emit(self, op: Op, *args: Any, name: str, place: Place | None = None) -> fx.Node:
        """Add a node that calls `op`. The shape rule of `op` checks the operands first.

        `place` is the node's role, for the passes that look for it.
        """
        node = call(self._graph, op, *args, name=name)
        return node if place is None else _placed(node, place)

    def emit_pair(
        self, op: Op, *args: Any, name: str, places: Sequence[Place] = ()
    ) -> tuple[fx.Node, fx.Node]:
        """Do what `emit` does, for an op with two outputs, called `name.0` and `name.1`."""
        first, second = call_each(
            self._graph, op, *args, name=name, each=(f"{name}.0", f"{name}.1")
        )
        for node, place in zip((first, second), places, strict=False):
            _placed(node, place)
        return first, second

    def output(self, outputs: dict[str, fx.Node]) -> fx.GraphModule:
        """Close the graph. It returns a tuple of `outputs`; `meta["outputs"]` has their names."""
        node = self._graph.output(tuple(outputs.values()))
        node.meta["outputs"] = tuple(outputs)
        return module_of(self._root, self._graph)


def call(graph: fx.Graph, op: Op, *args: Any, name: str) -> fx.Node:
    """Add a node that calls `op`. The shape rule of `op` checks the operands first."""
    types = op.rule(*fx.map_arg(args, lambda node: node.meta["type"]))
    return tag(graph.call_function(op.target, args), name, types)


def call_each(
    graph: fx.Graph, op: Op, *args: Any, name: str, each: Sequence[str]
) -> tuple[fx.Node, ...]:
    """Do what `call` does, for an op with several outputs; return a node for each of `each`."""
    node = call(graph, op, *args, name=name)
    return tuple(
        tag(graph.call_function(getitem, (node, i)), label, kind)
        for i, (label, kind) in enumerate(zip(each, node.meta["type"], strict=True))
    )


def replace(
    graph: fx.Graph, old: Sequence[fx.Node], op: Op, *args: Any, name: str
) -> tuple[fx.Node, ...]:
    """Do what `call_each` does; the op's outputs take the places of the nodes `old`, in order."""
    new = call_each(graph, op, *args, name=name, each=[node.meta["name"] for node in old])
    for before, after in zip(old, new, strict=True):
        stand_in(after, before)
    return new


def stand_in(new: fx.Node, old: fx.Node) -> None:
    """Replace `old` by `new`, which takes the name, the role and all users of `old`."""
    new.meta["name"] = old.meta["name"]
    if "role" in old.meta:
        _placed(new, old.meta["role"])
    old.replace_all_uses_with(new)


def tag(node: fx.Node, name: str, kind: Any) -> fx.Node:
    """Store the name of `node`, and its type or types; return `node`."""
    node.meta["name"], node.meta["type"] = name, kind
    return node


def _placed(node: fx.Node, place: Place) -> fx.Node:
    node.meta["role"] = place
    return node
